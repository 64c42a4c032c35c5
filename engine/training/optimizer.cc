// SPDX-License-Identifier: Apache-2.0
#include "engine/training/optimizer.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace bebop {
namespace {

constexpr int64_t kBlock = 16 * 1024;  // floats whose squares are summed before the blocks are

}  // namespace

double LearningRate(const OptimizerOptions& options, int64_t step) {
  if (step < options.warmup_steps)
    return options.learning_rate * static_cast<double>(step) / static_cast<double>(options.warmup_steps);
  if (options.decay == RateDecay::kNone || options.total_steps <= options.warmup_steps) return options.learning_rate;
  const double share = std::min(
      1.0, static_cast<double>(step - options.warmup_steps) / static_cast<double>(options.total_steps - options.warmup_steps));
  if (options.decay == RateDecay::kLinear) return options.learning_rate * (1.0 - share);
  return options.learning_rate * 0.5 * (1.0 + std::cos(std::numbers::pi * share));
}

AdamW::AdamW(const MtpLayout& layout, const OptimizerOptions& options)
    : layout_(layout),
      options_(options),
      first_(static_cast<size_t>(layout.total), 0.0f),
      second_(static_cast<size_t>(layout.total), 0.0f) {}

double AdamW::Norm(const float* gradients, ThreadPool& pool) const {
  const int64_t num_blocks = (layout_.total + kBlock - 1) / kBlock;
  std::vector<double> sums(static_cast<size_t>(num_blocks), 0.0);
  pool.ParallelFor(num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      double sum = 0;
      const int64_t last = std::min(layout_.total, (block + 1) * kBlock);
      for (int64_t i = block * kBlock; i < last; ++i) sum += double{gradients[i]} * gradients[i];
      sums[static_cast<size_t>(block)] = sum;
    }
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return std::sqrt(total);
}

void AdamW::Step(int64_t step, double norm, const float* gradients, float* parameters, ThreadPool& pool) {
  const double clip = options_.clip_norm > 0 && norm > options_.clip_norm ? options_.clip_norm / norm : 1.0;
  const double rate = LearningRate(options_, step);
  const double first_correction = 1.0 - std::pow(options_.beta1, static_cast<double>(step));
  const double second_correction = 1.0 - std::pow(options_.beta2, static_cast<double>(step));
  for (const MtpTensor& tensor : layout_.tensors) {
    const double keep = tensor.is_vector ? 1.0 : 1.0 - rate * options_.weight_decay;
    pool.ParallelFor(tensor.size(), kBlock, [&](int64_t begin, int64_t end) {
      for (int64_t i = tensor.offset + begin; i < tensor.offset + end; ++i) {
        const double gradient = clip * gradients[i];
        const double first = options_.beta1 * first_[static_cast<size_t>(i)] + (1.0 - options_.beta1) * gradient;
        const double second = options_.beta2 * second_[static_cast<size_t>(i)] + (1.0 - options_.beta2) * gradient * gradient;
        first_[static_cast<size_t>(i)] = static_cast<float>(first);
        second_[static_cast<size_t>(i)] = static_cast<float>(second);
        const double denominator = std::sqrt(second / second_correction) + options_.epsilon;
        parameters[i] = static_cast<float>(keep * parameters[i] - rate * (first / first_correction) / denominator);
      }
    });
  }
}

}  // namespace bebop
