// SPDX-License-Identifier: Apache-2.0
#include "kernels/causal_conv/causal_conv.h"

#include <algorithm>
#include <cmath>

#include "kernels/common/check.h"

namespace bebop::cpu {
namespace {

constexpr int32_t kMaxWidth = 8;
constexpr int32_t kBlock = 64;  // channels

void ConvolveBlock(const CausalConvArgs& args, const SequenceRows& sequence, int64_t channel, int32_t count) {
  const LinearStateView& state = args.state;
  const int32_t width = state.conv_width, taps = width - 1;
  const int64_t channels = state.conv_channels(), slot_rows = taps + state.window;
  // The K-1 raw inputs before the first row.
  float history[kMaxWidth][kBlock] = {};
  if (sequence.state_src >= 0) {
    const float* source = state.conv_inputs + (sequence.state_src * slot_rows + sequence.num_replay_rows) * channels + channel;
    for (int32_t j = 0; j < taps; ++j) std::copy_n(source + j * channels, count, history[j]);
  }
  const auto input = [&](int32_t index) {  // raw input of row `index`, from -(K-1)
    return index < 0 ? history[index + taps] : args.x.Row<const float>(sequence.first_row + index) + channel;
  };
  for (int32_t row = 0; row < sequence.num_rows; ++row) {
    float* y = args.y.Row<float>(sequence.first_row + row) + channel;
    for (int32_t c = 0; c < count; ++c) {
      float sum = 0.0f;
      for (int32_t j = 0; j < width; ++j) sum += args.weight[(channel + c) * width + j] * input(row - taps + j)[c];
      y[c] = sum / (1.0f + std::exp(-sum));
    }
  }
  float* destination = state.conv_inputs + sequence.state_dst * slot_rows * channels + channel;
  for (int32_t j = -taps; j < sequence.num_rows - sequence.num_known_rows; ++j, destination += channels) {
    std::copy_n(input(sequence.num_known_rows + j), count, destination);
  }
}

}  // namespace

void CausalConv(const CausalConvArgs& args, ThreadPool& pool) {
  const int32_t channels = args.state.conv_channels();
  BEBOP_CHECK(args.state.conv_width >= 1 && args.state.conv_width <= kMaxWidth && args.x.cols == channels && args.y.cols == channels);
  const int64_t num_blocks = (channels + kBlock - 1) / kBlock;
  pool.ParallelFor(num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t channel = block * kBlock;
      const int32_t count = static_cast<int32_t>(std::min<int64_t>(kBlock, channels - channel));
      for (int32_t s = 0; s < args.batch.num_sequences; ++s) ConvolveBlock(args, args.batch.sequences[s], channel, count);
    }
  });
}

}  // namespace bebop::cpu
