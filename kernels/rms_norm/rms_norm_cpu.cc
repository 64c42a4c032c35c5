// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "kernels/common/check.h"
#include "kernels/rms_norm/rms_norm.h"

#define BEBOP_SIMD_SOURCE "kernels/rms_norm/rms_norm_simd.inc"
#include "kernels/common/simd_targets.inc"

namespace bebop::cpu {
namespace {

// Work (floats) that is worth waking a thread for.
constexpr int64_t kGrain = 8192;

}  // namespace

void RmsNorm(const RmsNormArgs& args, ThreadPool& pool) { RmsNormWith(DetectInstructionSet(), args, pool); }

void RmsNormWith(InstructionSet set, const RmsNormArgs& args, ThreadPool& pool) {
  BEBOP_CHECK(args.x.cols > 0 && args.out.rows == args.x.rows && args.out.cols == args.x.cols);
  const auto kernel = BEBOP_SIMD_SELECT(set, NormRows);
  pool.ParallelFor(args.x.rows, kGrain / args.x.cols + 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void GatedRmsNorm(const GatedRmsNormArgs& args, ThreadPool& pool) { GatedRmsNormWith(DetectInstructionSet(), args, pool); }

void GatedRmsNormWith(InstructionSet set, const GatedRmsNormArgs& args, ThreadPool& pool) {
  BEBOP_CHECK(args.head_dim > 0 && args.x.cols % args.head_dim == 0);
  BEBOP_CHECK(args.gate.cols == args.x.cols && args.out.cols == args.x.cols);
  const auto kernel = BEBOP_SIMD_SELECT(set, GatedNormHeads);
  pool.ParallelFor(args.x.rows * (args.x.cols / args.head_dim), kGrain / args.head_dim + 1,
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace bebop::cpu
