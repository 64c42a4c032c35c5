// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/stream.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

// One AdamW update (Loshchilov, Hutter, "Decoupled weight decay regularization", 2019, algorithm 2) of `count` float32 parameters, with
// g = clip·gradient:
//   first = beta1·first + (1 - beta1)·g;   second = beta2·second + (1 - beta2)·g²
//   parameter = keep·parameter - rate·(first / first_correction) / (√(second / second_correction) + epsilon)
// keep = 1 - rate·weight_decay; corrections are 1 - betaⁿ of step n. The arithmetic of an element is in double; elements are independent.
struct AdamWArgs {
  float* parameters = nullptr;  // [count]
  float* first = nullptr;
  float* second = nullptr;
  const float* gradients = nullptr;
  int64_t count = 0;
  double clip = 1.0;
  double rate = 0.0;
  double keep = 1.0;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
  double first_correction = 1.0;
  double second_correction = 1.0;
};

namespace cpu {
void AdamWUpdate(const AdamWArgs& args, ThreadPool& pool);
// Σ values[i]² in double, over blocks in order: its bits do not depend on the thread count.
double SquaredNorm(const float* values, int64_t count, ThreadPool& pool);
}  // namespace cpu

namespace cuda {
// Enqueued; `args` points to device memory, aligned to 16 bytes.
void AdamWUpdate(const AdamWArgs& args, Stream& stream);
// Enqueued; *result and `values` are device memory, `values` aligned to 16 bytes. The order of the sum is decided by `count`.
void SquaredNorm(const float* values, int64_t count, double* result, Stream& stream);
}  // namespace cuda

}  // namespace bebop
