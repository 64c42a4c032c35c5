// SPDX-License-Identifier: Apache-2.0
#include "engine/model/activations.h"

#include <algorithm>

#include "engine/weights/model_weights.h"
#include "kernels/common/check.h"

namespace bebop {

TensorView Activations::Wide(int64_t cols) const {
  BEBOP_CHECK(cols <= wide_cols);
  return FloatMatrix(wide, stream.rows, cols);
}

Workspace::Workspace(const ModelConfig& config, int32_t max_rows)
    : max_rows_(max_rows),
      hidden_(config.hidden_size),
      channels_(config.conv_channels()),
      query_width_(static_cast<int64_t>(config.num_attention_heads) * config.head_dim),
      mixed_width_(std::max<int64_t>(query_width_, config.linear_value_width())),
      wide_width_(std::max({LinearSegments(config).total, FullSegments(config).total, MlpSegments(config).total, 2 * hidden_})),
      floats_(new float[max_rows * (3 * hidden_ + channels_ + query_width_ + mixed_width_ + wide_width_)]()),
      row_maps_(new int32_t[2 * static_cast<int64_t>(max_rows)]()) {
  // Inputs of matrix products: normed stream and MTP pair, mixer output, SwiGLU output.
  linear_scratch_.Reserve(max_rows, std::max<int64_t>({2 * hidden_, mixed_width_, config.intermediate_size}));
}

Activations Workspace::ForRows(int32_t rows) {
  BEBOP_CHECK(0 < rows && rows <= max_rows_);
  float* next = floats_.get();
  const auto take = [&](int64_t cols) {
    const TensorView view = FloatMatrix(next, rows, cols);
    next += max_rows_ * cols;
    return view;
  };
  Activations act;
  act.stream = take(hidden_);
  act.update = take(hidden_);
  act.normed = take(hidden_);
  act.conv = take(channels_);
  act.query = take(query_width_);
  act.mixed = take(mixed_width_);
  act.wide = next;
  act.wide_cols = wide_width_;
  return act;
}

RaggedBatch Workspace::WithRowMaps(const RaggedBatch& batch) {
  if (batch.row_sequence != nullptr && batch.row_position != nullptr) return batch;
  int32_t* const row_sequence = row_maps_.get();
  int32_t* const row_position = row_maps_.get() + max_rows_;
  for (int32_t s = 0; s < batch.num_sequences; ++s) {
    const SequenceRows& sequence = batch.sequences[s];
    for (int32_t i = 0; i < sequence.num_rows; ++i) {
      row_sequence[sequence.first_row + i] = s;
      row_position[sequence.first_row + i] = sequence.first_position + i;
    }
  }
  RaggedBatch mapped = batch;
  mapped.row_sequence = row_sequence;
  mapped.row_position = row_position;
  return mapped;
}

}  // namespace bebop
