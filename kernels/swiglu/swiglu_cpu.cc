// SPDX-License-Identifier: Apache-2.0
#include "kernels/swiglu/swiglu.h"

#include <algorithm>

#include "kernels/common/check.h"
#include "kernels/common/simd.h"

namespace bebop::cpu {
namespace {

constexpr int64_t kBlock = 512;  // columns of one item
constexpr int64_t kGrain = 4;    // items worth waking a thread for

template <class Set>
BEBOP_SIMD_INLINE void SwiGluBlocks(const SwiGluArgs& args, int64_t begin, int64_t end) {
  const int64_t num_blocks = (args.gate.cols + kBlock - 1) / kBlock;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / num_blocks, first = item % num_blocks * kBlock, last = std::min(first + kBlock, args.gate.cols);
    const float* gate = args.gate.Row<float>(row);
    const float* up = args.up.Row<float>(row);
    float* out = args.out.Row<float>(row);
    for (int64_t i = first; i < last; i += simd::kWidth) {
      const simd::Floats<Set> product =
          simd::Silu(simd::LoadPartial<Set>(gate + i, last - i)) * simd::LoadPartial<Set>(up + i, last - i);
      simd::StorePartial(product, out + i, last - i);
    }
  }
}
BEBOP_SIMD_RANGE_KERNEL(SwiGluBlocks, SwiGluArgs)

}  // namespace

void SwiGlu(const SwiGluArgs& args, ThreadPool& pool) { SwiGluWith(DetectInstructionSet(), args, pool); }

void SwiGluWith(InstructionSet set, const SwiGluArgs& args, ThreadPool& pool) {
  BEBOP_CHECK(args.gate.cols == args.up.cols && args.gate.cols == args.out.cols);
  BEBOP_CHECK(args.gate.rows == args.up.rows && args.gate.rows == args.out.rows);
  const auto kernel = SwiGluBlocksFor(set);
  const int64_t num_blocks = (args.gate.cols + kBlock - 1) / kBlock;
  pool.ParallelFor(args.gate.rows * num_blocks, kGrain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace bebop::cpu
