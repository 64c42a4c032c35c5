// SPDX-License-Identifier: Apache-2.0
#include "engine/model/activations.h"

#include <algorithm>

#include "engine/base/status_macros.h"
#include "engine/weights/model_weights.h"
#include "kernels/common/check.h"

namespace bebop {
namespace {

constexpr int64_t kAlignment = 256;  // of every buffer: what DeviceMemory gives

}  // namespace

TensorView Activations::Wide(int64_t cols) const {
  BEBOP_CHECK(cols <= wide.cols);
  return {wide.data, wide.dtype, wide.rows, cols, cols};
}

Workspace::Workspace(const ModelConfig& config, int32_t max_rows, DType dtype)
    : max_rows_(max_rows),
      dtype_(dtype),
      hidden_(config.hidden_size),
      channels_(config.conv_channels()),
      query_width_(static_cast<int64_t>(config.num_attention_heads) * config.head_dim),
      mixed_width_(std::max<int64_t>(query_width_, config.linear_value_width())),
      wide_width_(std::max({LinearSegments(config).total, FullSegments(config).total, MlpSegments(config).total, 2 * hidden_})) {}

absl::StatusOr<std::unique_ptr<Workspace>> Workspace::Create(const ModelConfig& config, int32_t max_rows, DType dtype, DeviceMemory* memory) {
  std::unique_ptr<Workspace> workspace(new Workspace(config, max_rows, dtype));
  BEBOP_ASSIGN_OR_RETURN(workspace->bytes_, memory->Allocate(Bytes(config, max_rows, dtype), "activations"));
  if (memory->is_host()) workspace->row_maps_.reset(new int32_t[2 * static_cast<int64_t>(max_rows)]());
  return workspace;
}

int64_t Workspace::Bytes(const ModelConfig& config, int32_t max_rows, DType dtype) {
  int64_t bytes = 0;
  Workspace(config, max_rows, dtype).Carve(max_rows, &bytes);
  return bytes;
}

Activations Workspace::Carve(int32_t rows, int64_t* used) const {
  char* const base = static_cast<char*>(bytes_.get());
  *used = 0;
  const auto take = [&](DType dtype, int64_t cols) {
    const TensorView view{base == nullptr ? nullptr : base + *used, dtype, rows, cols, cols};
    *used += RoundUp(max_rows_ * cols * ElementBytes(dtype), kAlignment);
    return view;
  };
  Activations act;
  act.stream = take(DType::kFloat32, hidden_);
  act.update = take(dtype_, hidden_);
  act.normed = take(dtype_, hidden_);
  act.conv = take(dtype_, channels_);
  act.query = take(dtype_, query_width_);
  act.mixed = take(dtype_, mixed_width_);
  act.wide = take(dtype_, wide_width_);
  return act;
}

Activations Workspace::ForRows(int32_t rows) const {
  BEBOP_CHECK(0 < rows && rows <= max_rows_);
  int64_t used = 0;
  return Carve(rows, &used);
}

RaggedBatch Workspace::WithRowMaps(const RaggedBatch& batch) {
  if (batch.row_sequence != nullptr && batch.row_position != nullptr) return batch;
  BEBOP_CHECK(row_maps_ != nullptr);  // on a device the batch comes with its maps
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
