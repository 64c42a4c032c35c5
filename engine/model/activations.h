// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "engine/config/model_config.h"
#include "engine/memory/device_memory.h"
#include "kernels/common/ragged_batch.h"
#include "kernels/common/tensor_view.h"

namespace bebop {

// The activations of one pass over T rows: views into the model's Workspace, valid until its next pass. The stream is float32, the rest
// has the model's activation dtype.
struct Activations {
  TensorView stream;   // [T, H] residual stream
  TensorView update;   // [T, H] what a block adds to the stream
  TensorView normed;   // [T, H] normalised stream: a block's input
  TensorView conv;     // [T, C] linear attention: q, k, v after the convolution
  TensorView query;    // [T, nq*head_dim] full attention: q after norm and RoPE
  TensorView mixed;    // [T, max(nq*head_dim, Hv*dv)] what a mixer gives its output projection
  TensorView wide;     // [T, widest] fused projections and the MTP input, see Wide

  // A dense [T, cols] matrix in the wide buffer; overwrites the last one. REQUIRES: cols <= wide.cols.
  TensorView Wide(int64_t cols) const;
};

// Owns the activation memory of a model for passes of up to `max_rows` rows, sized once: a pass allocates nothing.
// One caller at a time (the engine thread).
class Workspace {
 public:
  // RESOURCE_EXHAUSTED when `memory` has not the bytes.
  static absl::StatusOr<std::unique_ptr<Workspace>> Create(const ModelConfig& config, int32_t max_rows, DType dtype, DeviceMemory* memory);
  // What Create takes.
  static int64_t Bytes(const ModelConfig& config, int32_t max_rows, DType dtype);

  // Views of `rows` rows. REQUIRES: rows <= max_rows.
  Activations ForRows(int32_t rows) const;
  // `batch` with its row maps: the caller's, or, in host memory, filled in here from `sequences`.
  RaggedBatch WithRowMaps(const RaggedBatch& batch);

  int32_t max_rows() const { return max_rows_; }

 private:
  Workspace(const ModelConfig& config, int32_t max_rows, DType dtype);
  // The views, and the bytes that all of them take at max_rows. Without memory the views are shapes only.
  Activations Carve(int32_t rows, int64_t* used) const;

  const int32_t max_rows_;
  const DType dtype_;
  const int64_t hidden_, channels_, query_width_, mixed_width_, wide_width_;
  std::shared_ptr<void> bytes_;                 // the buffers of Activations, one after the other
  std::unique_ptr<int32_t[]> row_maps_;         // [2, max_rows]: row_sequence, row_position; null on a device
};

}  // namespace bebop
