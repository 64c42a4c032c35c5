// SPDX-License-Identifier: Apache-2.0
#include "kernels/swiglu/swiglu.h"

#include <algorithm>

#include "kernels/common/check.h"

namespace bebop::cpu {
namespace {

constexpr int64_t kBlock = 512;  // columns of one item
constexpr int64_t kGrain = 4;    // items worth waking a thread for

}  // namespace
}  // namespace bebop::cpu

#define BEBOP_SIMD_SOURCE "kernels/swiglu/swiglu_simd.inc"
#include "kernels/common/simd_targets.inc"

namespace bebop::cpu {

void SwiGlu(const SwiGluArgs& args, ThreadPool& pool) { SwiGluWith(DetectInstructionSet(), args, pool); }

void SwiGluWith(InstructionSet set, const SwiGluArgs& args, ThreadPool& pool) {
  BEBOP_CHECK(args.gate.cols == args.up.cols && args.gate.cols == args.out.cols);
  BEBOP_CHECK(args.gate.rows == args.up.rows && args.gate.rows == args.out.rows);
  const auto kernel = BEBOP_SIMD_SELECT(set, SwiGluBlocks);
  const int64_t num_blocks = (args.gate.cols + kBlock - 1) / kBlock;
  pool.ParallelFor(args.gate.rows * num_blocks, kGrain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace bebop::cpu
