// SPDX-License-Identifier: Apache-2.0
#include "kernels/causal_conv/causal_conv.h"

#include <algorithm>

#include "kernels/common/check.h"
#include "kernels/common/simd.h"

namespace bebop::cpu {
namespace {

using simd::Floats;
using simd::kWidth;

constexpr int32_t kMaxConvWidth = 8;
constexpr int32_t kBlock = 4 * kWidth;  // channels of one item: whole cache lines of x, y and the state
constexpr int64_t kGrain = 4;           // items worth waking a thread for

// One sequence, channels [channel, channel + count). `weight` is that block of the weights, tap by tap.
template <class Set>
BEBOP_SIMD_INLINE void ConvolveSequence(const CausalConvArgs& args, const SequenceRows& sequence, const float (*weight)[kBlock],
                                        int64_t channel, int64_t count) {
  const LinearStateView& state = args.state;
  const int32_t width = state.conv_width, taps = width - 1;
  const int64_t channels = state.conv_channels(), slot_rows = taps + state.window;

  // The raw inputs of the K-1 rows before the first one. Copied, as the destination may be the same slot.
  float history[kMaxConvWidth - 1][kBlock] = {};
  if (sequence.state_src >= 0) {
    const float* source = state.conv_inputs + (sequence.state_src * slot_rows + sequence.num_replay_rows) * channels + channel;
    for (int32_t j = 0; j < taps; ++j) std::copy_n(source + j * channels, count, history[j]);
  }

  for (int64_t lane = 0; lane < count; lane += kWidth) {
    const int64_t valid = count - lane;
    for (int32_t row = 0; row < sequence.num_rows; ++row) {
      Floats<Set> sum = simd::Zero<Set>();
      for (int32_t j = 0; j < width; ++j) {
        const int32_t index = row - taps + j;  // below 0: before the first row
        const float* x = index < 0 ? history[index + taps] + lane : args.x.Row<float>(sequence.first_row + index) + channel + lane;
        sum = simd::MulAdd(simd::Load<Set>(weight[j] + lane), simd::LoadPartial<Set>(x, valid), sum);
      }
      simd::StorePartial(simd::Silu(sum), args.y.Row<float>(sequence.first_row + row) + channel + lane, valid);
    }
  }

  float* destination = state.conv_inputs + sequence.state_dst * slot_rows * channels + channel;
  for (int32_t index = sequence.num_known_rows - taps; index < sequence.num_rows; ++index, destination += channels) {
    std::copy_n(index < 0 ? history[index + taps] : args.x.Row<float>(sequence.first_row + index) + channel, count, destination);
  }
}

// An item is a block of channels, with all sequences in order.
template <class Set>
BEBOP_SIMD_INLINE void ConvolveBlocks(const CausalConvArgs& args, int64_t begin, int64_t end) {
  const int64_t channels = args.state.conv_channels();
  for (int64_t block = begin; block < end; ++block) {
    const int64_t channel = block * kBlock, count = std::min<int64_t>(kBlock, channels - channel);
    float weight[kMaxConvWidth][kBlock] = {};
    for (int64_t c = 0; c < count; ++c) {
      for (int32_t j = 0; j < args.state.conv_width; ++j) weight[j][c] = args.weight[(channel + c) * args.state.conv_width + j];
    }
    for (int32_t s = 0; s < args.batch.num_sequences; ++s) {
      ConvolveSequence<Set>(args, args.batch.sequences[s], weight, channel, count);
    }
  }
}
BEBOP_SIMD_RANGE_KERNEL(ConvolveBlocks, CausalConvArgs)

}  // namespace

void CausalConv(const CausalConvArgs& args, ThreadPool& pool) { CausalConvWith(DetectInstructionSet(), args, pool); }

void CausalConvWith(InstructionSet set, const CausalConvArgs& args, ThreadPool& pool) {
  const int64_t channels = args.state.conv_channels();
  BEBOP_CHECK(args.state.conv_width >= 1 && args.state.conv_width <= kMaxConvWidth && args.x.cols == channels && args.y.cols == channels);
  const auto kernel = ConvolveBlocksFor(set);
  const int64_t num_blocks = (channels + kBlock - 1) / kBlock;
  pool.ParallelFor(num_blocks, kGrain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace bebop::cpu
