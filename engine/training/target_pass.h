// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/statusor.h"
#include "engine/config/model_config.h"
#include "engine/memory/model_state.h"
#include "engine/model/model.h"
#include "engine/runtime/backend.h"
#include "engine/runtime/batch_builder.h"
#include "engine/runtime/device_batch.h"
#include "engine/training/training_data.h"
#include "engine/weights/model_weights.h"

namespace bebop {

// The frozen target over whole documents: the pass that serves them, with pages and states of its own that hold nothing between
// calls. One caller at a time; all pointers must outlive it.
class TargetPass {
 public:
  // For documents of up to `max_rows` rows in all. RESOURCE_EXHAUSTED: not the memory.
  static absl::StatusOr<std::unique_ptr<TargetPass>> Create(const ModelConfig& config, const ModelWeights* weights,
                                                            Backend* backend, int64_t max_rows);
  static int64_t Bytes(const ModelConfig& config, DType weight_dtype, DType activation_dtype, int64_t max_rows);

  // hidden [R, H] in the activation dtype: the post-norm hidden states of all rows, documents one after the other.
  void Run(std::span<const TrainingDocument* const> documents, const TensorView& hidden);
  // Multiplications and additions of the matrix products of a row.
  double RowFlops() const { return row_flops_; }

 private:
  TargetPass() = default;
  void RunGroup(std::span<const TrainingDocument* const> documents, const TensorView& hidden);

  std::unique_ptr<Model> model_;
  std::unique_ptr<ModelStateStorage> storage_;
  std::unique_ptr<DeviceBatch> device_batch_;
  BatchBuilder builder_;
  double row_flops_ = 0.0;
};

}  // namespace bebop
