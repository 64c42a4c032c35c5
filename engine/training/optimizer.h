// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "engine/memory/device_memory.h"
#include "engine/training/mtp_parameters.h"
#include "engine/training/training_ops.h"

namespace bebop {

enum class RateDecay : uint8_t { kNone, kLinear, kCosine };

// The defaults are the paper's recipe (arXiv 2606.12370): a constant rate after the warm-up.
struct OptimizerOptions {
  double learning_rate = 3.5e-5;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
  double weight_decay = 0.0;  // of matrices; norms are not decayed
  double clip_norm = 1.0;     // gradients of a larger norm are scaled down to it; 0: never
  int64_t warmup_steps = 0;   // the rate grows linearly up to step warmup_steps
  int64_t total_steps = 0;    // where kLinear and kCosine reach 0
  RateDecay decay = RateDecay::kNone;
};

// The rate of step `step` = 1, 2, ...
double LearningRate(const OptimizerOptions& options, int64_t step);

// AdamW (kernels/adamw) over the flat parameters of MtpLayout, with its moments in float32 and in the backend's memory. Bits do
// not depend on the thread count. One caller at a time.
class AdamW {
 public:
  // The moments are zero. `memory` and `ops` must outlive it. RESOURCE_EXHAUSTED: not the memory.
  static absl::StatusOr<std::unique_ptr<AdamW>> Create(const MtpLayout& layout, const OptimizerOptions& options,
                                                       DeviceMemory* memory, TrainingOps* ops);

  // √Σ gradient². Not finite when a gradient is not: then do not call Step.
  double Norm(const float* gradients);
  // The update of step `step` = 1, 2, ... `norm`: of the gradients, for clipping. All pointers are memory of the backend.
  void Step(int64_t step, double norm, const float* gradients, float* parameters);

  // What a checkpoint holds, [layout.total] each, memory of the backend.
  float* first_moment() { return first_; }
  float* second_moment() { return second_; }

 private:
  AdamW(const MtpLayout& layout, const OptimizerOptions& options, TrainingOps* ops);

  const MtpLayout layout_;
  const OptimizerOptions options_;
  TrainingOps& ops_;
  std::shared_ptr<void> storage_;
  float* first_ = nullptr;
  float* second_ = nullptr;
};

}  // namespace bebop
