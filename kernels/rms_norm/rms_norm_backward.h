// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/common/cpu_features.h"
#include "kernels/common/stream.h"
#include "kernels/common/tensor_view.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

// Backward of the zero-centred RMSNorm y = x·s·(1 + weight), s = 1 / sqrt(mean(x²) + eps), per row. With n = x·s and g = dy·(1 +
// weight):
//   dx (+)= s·(g - n·mean(g·n));   dweight += Σ_rows dy·n.
//   x, dy, dx: [T, H] float32, dweight: [H] float32. dx may alias dy, not x.
// The sum of squares is in double, the other row sum in float; dweight sums blocks of 64 rows in order, whatever the threads.
struct RmsNormBackwardArgs {
  TensorView x;
  const float* weight = nullptr;
  float eps = 1e-6f;
  TensorView dy;
  TensorView dx;               // optional: data == nullptr where x is frozen
  bool accumulate_dx = false;  // dx += instead of dx =
  float* dweight = nullptr;
};

namespace cpu {
// Allocates its partial sums.
void RmsNormBackward(const RmsNormBackwardArgs& args, ThreadPool& pool);
// The same with a chosen instruction set (tests). REQUIRES: the processor has it.
void RmsNormBackwardWith(InstructionSet set, const RmsNormBackwardArgs& args, ThreadPool& pool);
}  // namespace cpu

namespace cuda {
// Enqueues the same on the device: H a multiple of 8, rows and weight aligned to 16 bytes. All sums are float32, in an order that T and H
// decide; the partial ones are in the stream's workspace.
void RmsNormBackward(const RmsNormBackwardArgs& args, Stream& stream);
}  // namespace cuda
}  // namespace bebop
