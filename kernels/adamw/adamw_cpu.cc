// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/adamw/adamw.h"

namespace bebop::cpu {
namespace {

constexpr int64_t kBlock = 16 * 1024;  // floats whose squares are summed before the blocks are

}  // namespace

double SquaredNorm(const float* values, int64_t count, ThreadPool& pool) {
  std::vector<double> sums(static_cast<size_t>((count + kBlock - 1) / kBlock), 0.0);
  pool.ParallelFor(static_cast<int64_t>(sums.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      double sum = 0;
      const int64_t last = std::min(count, (block + 1) * kBlock);
      for (int64_t i = block * kBlock; i < last; ++i) sum += double{values[i]} * values[i];
      sums[static_cast<size_t>(block)] = sum;
    }
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

void AdamWUpdate(const AdamWArgs& args, ThreadPool& pool) {
  pool.ParallelFor(args.count, kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double gradient = args.clip * args.gradients[i];
      const double first = args.beta1 * args.first[i] + (1.0 - args.beta1) * gradient;
      const double second = args.beta2 * args.second[i] + (1.0 - args.beta2) * gradient * gradient;
      args.first[i] = static_cast<float>(first);
      args.second[i] = static_cast<float>(second);
      const double denominator = std::sqrt(second / args.second_correction) + args.epsilon;
      args.parameters[i] =
          static_cast<float>(args.keep * args.parameters[i] - args.rate * (first / args.first_correction) / denominator);
    }
  });
}

}  // namespace bebop::cpu
