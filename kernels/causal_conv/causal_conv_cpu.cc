// SPDX-License-Identifier: Apache-2.0
#include "kernels/causal_conv/causal_conv.h"

#include <algorithm>

#include "kernels/common/check.h"

namespace bebop::cpu {
namespace {

constexpr int32_t kMaxConvWidth = 8;
// Channels of an item: a multiple of 16, and as many as the threads leave. Long runs of a row let the processor fetch ahead; rows
// lie many pages apart.
constexpr int64_t kMinBlock = 64;
constexpr int64_t kMaxBlock = 512;

struct Blocks {
  const CausalConvArgs& args;
  int64_t size;  // channels
};

}  // namespace
}  // namespace bebop::cpu

#define BEBOP_SIMD_SOURCE "kernels/causal_conv/causal_conv_simd.inc"
#include "kernels/common/simd_targets.inc"

namespace bebop::cpu {

void CausalConv(const CausalConvArgs& args, ThreadPool& pool) { CausalConvWith(DetectInstructionSet(), args, pool); }

void CausalConvWith(InstructionSet set, const CausalConvArgs& args, ThreadPool& pool) {
  const int64_t channels = args.state.conv_channels();
  BEBOP_CHECK(args.state.conv_width >= 1 && args.state.conv_width <= kMaxConvWidth && args.x.cols == channels &&
              args.y.cols == channels);
  const int64_t share = (channels / pool.num_threads() + kMinBlock - 1) / kMinBlock * kMinBlock;
  const Blocks blocks{args, std::clamp(share, kMinBlock, kMaxBlock)};
  const auto kernel = BEBOP_SIMD_SELECT(set, ConvolveBlocks);
  const int64_t num_blocks = (channels + blocks.size - 1) / blocks.size;
  pool.ParallelFor(num_blocks, 1, [&](int64_t begin, int64_t end) { kernel(blocks, begin, end); });
}

}  // namespace bebop::cpu
