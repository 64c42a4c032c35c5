// SPDX-License-Identifier: Apache-2.0
#include "engine/training/optimizer.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "engine/base/status_macros.h"

namespace bebop {

double LearningRate(const OptimizerOptions& options, int64_t step) {
  if (step < options.warmup_steps)
    return options.learning_rate * static_cast<double>(step) / static_cast<double>(options.warmup_steps);
  if (options.decay == RateDecay::kNone || options.total_steps <= options.warmup_steps) return options.learning_rate;
  const double share = std::min(
      1.0, static_cast<double>(step - options.warmup_steps) / static_cast<double>(options.total_steps - options.warmup_steps));
  if (options.decay == RateDecay::kLinear) return options.learning_rate * (1.0 - share);
  return options.learning_rate * 0.5 * (1.0 + std::cos(std::numbers::pi * share));
}

AdamW::AdamW(const MtpLayout& layout, const OptimizerOptions& options, TrainingOps* ops)
    : layout_(layout), options_(options), ops_(*ops) {}

absl::StatusOr<std::unique_ptr<AdamW>> AdamW::Create(const MtpLayout& layout, const OptimizerOptions& options,
                                                     DeviceMemory* memory, TrainingOps* ops) {
  std::unique_ptr<AdamW> optimizer(new AdamW(layout, options, ops));
  const int64_t bytes = 2 * layout.total * static_cast<int64_t>(sizeof(float));
  BEBOP_ASSIGN_OR_RETURN(optimizer->storage_, memory->Allocate(bytes, "optimizer moments"));
  optimizer->first_ = static_cast<float*>(optimizer->storage_.get());
  optimizer->second_ = optimizer->first_ + layout.total;
  return optimizer;
}

double AdamW::Norm(const float* gradients) { return std::sqrt(ops_.SquaredNorm(gradients, layout_.total)); }

void AdamW::Step(int64_t step, double norm, const float* gradients, float* parameters) {
  const double rate = LearningRate(options_, step);
  AdamWArgs args;
  args.clip = options_.clip_norm > 0 && norm > options_.clip_norm ? options_.clip_norm / norm : 1.0;
  args.rate = rate;
  args.beta1 = options_.beta1;
  args.beta2 = options_.beta2;
  args.epsilon = options_.epsilon;
  args.first_correction = 1.0 - std::pow(options_.beta1, static_cast<double>(step));
  args.second_correction = 1.0 - std::pow(options_.beta2, static_cast<double>(step));
  for (const MtpTensor& tensor : layout_.tensors) {
    args.parameters = parameters + tensor.offset;
    args.first = first_ + tensor.offset;
    args.second = second_ + tensor.offset;
    args.gradients = gradients + tensor.offset;
    args.count = tensor.size();
    args.keep = tensor.is_vector ? 1.0 : 1.0 - rate * options_.weight_decay;
    ops_.AdamWUpdate(args);
  }
}

}  // namespace bebop
