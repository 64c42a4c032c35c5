// SPDX-License-Identifier: Apache-2.0
#include "kernels/swiglu/swiglu_backward.h"

#include "kernels/common/check.h"

#define BEBOP_SIMD_SOURCE "kernels/swiglu/swiglu_backward_simd.inc"
#include "kernels/common/simd_targets.inc"

namespace bebop::cpu {

void SwiGluBackward(const SwiGluBackwardArgs& args, ThreadPool& pool) { SwiGluBackwardWith(DetectInstructionSet(), args, pool); }

void SwiGluBackwardWith(InstructionSet set, const SwiGluBackwardArgs& args, ThreadPool& pool) {
  for (const TensorView* view : {&args.up, &args.dout, &args.dgate, &args.dup, &args.out}) {
    BEBOP_CHECK(view->rows == args.gate.rows && view->cols == args.gate.cols);
  }
  const auto kernel = BEBOP_SIMD_SELECT(set, SwiGluBackwardRows);
  pool.ParallelFor(args.gate.rows, 4, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace bebop::cpu
