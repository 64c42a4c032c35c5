// SPDX-License-Identifier: Apache-2.0
#include "kernels/causal_conv/causal_conv.h"

#include <gtest/gtest.h>

#include "tests/kernels/kernel_test_util.h"

namespace bebop {
namespace {

using testing::InstructionSets;
using testing::kUnit;
using testing::OwnedBatch;
using testing::OwnedLinearState;
using testing::PaddedMatrix;
using testing::Random;
using testing::SameBits;

TEST(CausalConvTest, HandComputed) {
  ThreadPool pool(1);
  OwnedLinearState state(1, 2, 1, 1, 1, 1, 3);  // 3 channels, 3 taps
  std::vector<float> x = {1, 10, 100, 2, 20, 200}, weight = {1, 2, 3, 0, 0, 1, 1, 0, 0}, y(6);
  OwnedBatch batch;
  batch.Add({.num_rows = 2, .num_known_rows = 1, .state_src = -1, .state_dst = 0});
  cpu::CausalConv({batch.View(), FloatMatrix(x.data(), 2, 3), weight.data(), state.view, FloatMatrix(y.data(), 2, 3)}, pool);
  const auto silu = [](double v) { return v / (1 + std::exp(-v)); };
  const double sums[] = {3, 10, 0, 2 * 1 + 3 * 2, 20, 0};
  for (int i = 0; i < 6; ++i) EXPECT_NEAR(y[i], silu(sums[i]), 1e-5) << i;
  // Two inputs that end at the known row, then the draft row; the last window row is not used.
  const std::vector<float> expected = {0, 0, 0, 1, 10, 100, 2, 20, 200};
  EXPECT_TRUE(SameBits(expected.data(), state.conv_inputs.data(), 9));
  EXPECT_TRUE(std::isnan(state.conv_inputs[9]));
}

// Passes of random sizes over one long input against the convolution in double; the accepted rows of a window continue it.
TEST(CausalConvTest, AgreesWithDoubleAcrossPasses) {
  for (const int32_t width : {1, 2, 3, 4, 8}) {
    for (const auto& [key_heads, value_heads, dk, dv] : {std::array{1, 1, 16, 16}, {2, 6, 8, 24}, {1, 2, 20, 13}}) {
      for (const auto set : InstructionSets()) {
        constexpr int32_t kWindow = 8, kNumTokens = 150;
        OwnedLinearState state(2, kWindow, key_heads, value_heads, dk, dv, width);
        const int32_t channels = state.view.conv_channels();
        Random random(static_cast<uint64_t>(width));
        const std::vector<float> tokens = random.Normals(kNumTokens * channels), weight = random.Normals(channels * width);
        ThreadPool pool(2);
        int32_t computed = 0, replay = 0, slot = -1;
        while (computed < kNumTokens) {
          const int32_t known = std::min(random.Below(6), kNumTokens - computed);
          const int32_t drafts = std::max(known == 0 ? 1 : 0, random.Below(kWindow + 1));
          const int32_t accepted = std::min(random.Below(drafts + 1), kNumTokens - computed - known);
          PaddedMatrix x(random.Normals((known + drafts) * channels), known + drafts, channels), y(known + drafts, channels);
          for (int32_t i = 0; i < known + accepted; ++i) std::copy_n(&tokens[(computed + i) * channels], channels, x.Row(i));
          OwnedBatch batch;
          const int32_t destination = random.Below(2);
          batch.Add({.num_rows = known + drafts,
                     .num_known_rows = known,
                     .num_replay_rows = replay,
                     .state_src = slot,
                     .state_dst = destination});
          cpu::CausalConvWith(set, {batch.View(), x.View(), weight.data(), state.view, y.View()}, pool);
          for (int32_t i = 0; i < known + accepted; ++i) {
            for (int32_t c = 0; c < channels; ++c) {
              double sum = 0, magnitude = 0;
              for (int32_t j = 0; j < width; ++j) {
                const int32_t t = computed + i - (width - 1) + j;
                if (t < 0) continue;
                sum += double{weight[c * width + j]} * tokens[t * channels + c];
                magnitude += std::fabs(double{weight[c * width + j]} * tokens[t * channels + c]);
              }
              // `width` products and sums; the slope of SiLU is at most 1.1.
              const double expected = sum / (1 + std::exp(-sum));
              ASSERT_NEAR(y.Row(i)[c], expected, 1.1 * (width + 1) * kUnit * magnitude + 7 * kUnit * std::fabs(expected))
                  << "width " << width << " token " << computed + i << " channel " << c;
            }
          }
          EXPECT_TRUE(y.GapsUntouched());
          computed += known + accepted;
          replay = accepted;
          slot = destination;
        }
      }
    }
  }
}

TEST(CausalConvTest, OtherSlotsAndTheMatrixAreUntouched) {
  ThreadPool pool(2);
  OwnedLinearState state(3, 4, 1, 1, 16, 80, 4);
  const int32_t channels = state.view.conv_channels();
  Random random(9);
  std::vector<float> x = random.Normals(6 * channels), weight = random.Normals(4 * channels), y(x.size());
  OwnedBatch batch;
  batch.Add({.num_rows = 6, .num_known_rows = 3, .state_src = -1, .state_dst = 1});
  cpu::CausalConv(
      {batch.View(), FloatMatrix(x.data(), 6, channels), weight.data(), state.view, FloatMatrix(y.data(), 6, channels)}, pool);
  for (const int32_t slot : {0, 2}) {
    for (const float value : state.Slot(slot)) ASSERT_TRUE(std::isnan(value));
  }
  for (const auto* array : {&state.matrix, &state.window_k, &state.window_v, &state.window_gate}) {
    for (const float value : *array) ASSERT_TRUE(std::isnan(value));
  }
}

}  // namespace
}  // namespace bebop
