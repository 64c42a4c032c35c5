// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>

#include "engine/config/model_config.h"
#include "kernels/common/ragged_batch.h"
#include "kernels/common/tensor_view.h"
#include "kernels/linear/linear.h"

namespace bebop {

// The activations of one pass over T rows, all float32: views into the model's Workspace, valid until its next pass.
struct Activations {
  TensorView stream;   // [T, H] residual stream
  TensorView update;   // [T, H] what a block adds to the stream
  TensorView normed;   // [T, H] normalised stream: a block's input
  TensorView conv;     // [T, C] linear attention: q, k, v after the convolution
  TensorView query;    // [T, nq*head_dim] full attention: q after norm and RoPE
  TensorView mixed;    // [T, max(nq*head_dim, Hv*dv)] what a mixer gives its output projection
  float* wide = nullptr;  // fused projections and the MTP input, see Wide
  int64_t wide_cols = 0;

  // A dense [T, cols] matrix in the wide buffer; overwrites the last one. REQUIRES: cols <= wide_cols.
  TensorView Wide(int64_t cols) const;
};

// Owns the activation memory of a model for passes of up to `max_rows` rows, sized once: a pass allocates nothing.
// One caller at a time (the engine thread).
class Workspace {
 public:
  Workspace(const ModelConfig& config, int32_t max_rows);

  // Views of `rows` rows. REQUIRES: rows <= max_rows.
  Activations ForRows(int32_t rows);
  // `batch` with its row maps: the caller's, or filled in here from `sequences`.
  RaggedBatch WithRowMaps(const RaggedBatch& batch);

  cpu::LinearScratch& linear_scratch() { return linear_scratch_; }
  int32_t max_rows() const { return max_rows_; }

 private:
  const int32_t max_rows_;
  const int64_t hidden_, channels_, query_width_, mixed_width_, wide_width_;
  const std::unique_ptr<float[]> floats_;       // the buffers of Activations, one after the other
  const std::unique_ptr<int32_t[]> row_maps_;   // [2, max_rows]: row_sequence, row_position
  cpu::LinearScratch linear_scratch_;
};

}  // namespace bebop
