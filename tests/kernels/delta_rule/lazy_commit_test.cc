// SPDX-License-Identifier: Apache-2.0
// Causal convolution and delta rule together, as a layer runs them: whatever is drafted and accepted, outputs and states are bit
// for bit those of decoding token by token.
#include <gtest/gtest.h>

#include "kernels/causal_conv/causal_conv.h"
#include "kernels/delta_rule/delta_rule.h"
#include "tests/kernels/delta_rule/lazy_commit_test_util.h"

namespace bebop {
namespace {

using testing::Case;
using testing::InstructionSets;
using testing::kWindow;
using testing::OwnedBatch;
using testing::OwnedLinearState;
using testing::Random;
using testing::Rows;
using testing::SameBits;
using testing::Shape;

// The layer with its state; constants of the layer come from `seed`.
class Layer {
 public:
  Layer(const Shape& shape, int32_t num_slots, uint64_t seed, cpu::InstructionSet set, int num_threads)
      : state(num_slots, kWindow, shape.key_heads, shape.value_heads, shape.key_dim, shape.value_dim, shape.conv_width),
        shape_(shape),
        set_(set),
        pool_(num_threads) {
    Random random(seed);
    weight_ = random.Normals(int64_t{shape.channels()} * shape.conv_width, 0.5f);
    a_log_ = random.Normals(shape.value_heads);
    dt_bias_ = random.Normals(shape.value_heads);
  }

  // Returns the outputs [T, Hv*dv].
  std::vector<float> Run(const OwnedBatch& batch, Rows& rows) {
    const int32_t count = batch.num_rows();
    EXPECT_EQ(count, rows.count());
    std::vector<float> y(rows.x.size()), out(static_cast<size_t>(count) * static_cast<size_t>(shape_.value_width()));
    cpu::CausalConvWith(set_,
                        {batch.View(), FloatMatrix(rows.x.data(), count, shape_.channels()), weight_.data(), state.view,
                         FloatMatrix(y.data(), count, shape_.channels())},
                        pool_);
    cpu::DeltaRuleWith(
        set_,
        {batch.View(), FloatMatrix(y.data(), count, shape_.channels()), FloatMatrix(rows.a.data(), count, shape_.value_heads),
         FloatMatrix(rows.b.data(), count, shape_.value_heads), a_log_.data(), dt_bias_.data(), state.view,
         FloatMatrix(out.data(), count, shape_.value_width())},
        pool_);
    return out;
  }
  // The same for one sequence.
  std::vector<float> RunOne(SequenceRows sequence, Rows& rows) {
    OwnedBatch batch;
    batch.Add(sequence);
    return Run(batch, rows);
  }

  const OwnedLinearState& State() const { return state; }

  OwnedLinearState state;

 private:
  Shape shape_;
  cpu::InstructionSet set_;
  ThreadPool pool_;
  std::vector<float> weight_, a_log_, dt_bias_;
};

class LazyCommitTest : public ::testing::TestWithParam<Case> {};

TEST_P(LazyCommitTest, RandomWindowsLeaveWhatTokenByTokenDecodingLeaves) {
  for (const auto set : InstructionSets()) {
    SCOPED_TRACE(cpu::InstructionSetName(set));
    Layer reference(GetParam().shape, 1, 5, set, 1), layer(GetParam().shape, 3, 5, set, 3);
    // Some prompts are longer than the kernel's runs of 64.
    testing::CheckRandomWindows(reference, layer, GetParam(), 900, 60);
  }
}

TEST_P(LazyCommitTest, ForksLeaveTheParentAlone) {
  const auto set = cpu::DetectInstructionSet();
  Layer reference(GetParam().shape, 1, 5, set, 1), layer(GetParam().shape, 3, 5, set, 2);
  testing::CheckForks(reference, layer, GetParam());
}

// A later sequence of a call reads the slot that an earlier one writes: the committed state, and even its window.
TEST_P(LazyCommitTest, LaterSequencesReadWhatEarlierOnesWrote) {
  const auto [shape, gate_shift] = GetParam();
  const auto set = cpu::DetectInstructionSet();
  Random random(4);
  const Rows tokens(shape, 20, gate_shift, random);
  for (const int32_t replay : {0, 3}) {
    const std::vector<SequenceRows> sequences = {
        {.num_rows = 5, .num_known_rows = 5, .state_src = -1, .state_dst = 0},
        {.num_rows = 7, .num_known_rows = 3, .state_src = 0, .state_dst = 1},
        {.num_rows = 6, .num_known_rows = 2, .num_replay_rows = replay, .state_src = 1, .state_dst = 1},
        {.num_rows = 2, .num_known_rows = 1, .num_replay_rows = replay, .state_src = 1, .state_dst = 0}};
    Layer together(shape, 2, 5, set, 3), apart(shape, 2, 5, set, 1);
    OwnedBatch batch;
    for (const SequenceRows& sequence : sequences) batch.Add(sequence);
    Rows all = tokens;
    const std::vector<float> out = together.Run(batch, all);
    std::vector<float> expected;
    int32_t row = 0;
    for (const SequenceRows& sequence : sequences) {
      Rows rows(shape);
      for (int32_t i = 0; i < sequence.num_rows; ++i) rows.AppendFrom(tokens, row++);
      const std::vector<float> part = apart.RunOne(sequence, rows);
      expected.insert(expected.end(), part.begin(), part.end());
    }
    EXPECT_TRUE(SameBits(out, expected)) << replay;
    for (int32_t slot = 0; slot < 2; ++slot) EXPECT_TRUE(SameBits(together.state.Slot(slot), apart.state.Slot(slot))) << replay;
  }
}

TEST_P(LazyCommitTest, BatchMatesThreadsAndNansChangeNothing) {
  const auto [shape, gate_shift] = GetParam();
  for (const auto set : InstructionSets()) {
    Random random(6);
    const Rows tokens(shape, 21, gate_shift, random);
    Layer alone(shape, 3, 5, set, 1);
    Rows middle(shape);
    for (int32_t i = 7; i < 14; ++i) middle.AppendFrom(tokens, i);
    const std::vector<float> expected =
        alone.RunOne({.num_rows = 7, .num_known_rows = 4, .state_src = -1, .state_dst = 1}, middle);
    for (const int threads : {1, 2, 5}) {
      for (const bool poison : {false, true}) {
        Layer layer(shape, 3, 5, set, threads);
        OwnedBatch batch;
        for (int32_t s = 0; s < 3; ++s) batch.Add({.num_rows = 7, .num_known_rows = 4, .state_src = -1, .state_dst = s});
        Rows rows = tokens;
        for (const int32_t row : {3, 6, 15}) {
          if (!poison) continue;
          rows.x[row * shape.channels() + 1] = testing::kNan;
          rows.x[(row + 1) * shape.channels() - 1] = std::numeric_limits<float>::infinity();
          rows.a[row * shape.value_heads] = testing::kNan;
        }
        const std::vector<float> out = layer.Run(batch, rows);
        EXPECT_TRUE(SameBits(&out[7 * shape.value_width()], expected.data(), static_cast<int64_t>(expected.size())))
            << threads << " threads, poison " << poison;
        EXPECT_TRUE(SameBits(layer.state.Slot(1), alone.state.Slot(1)));
        // Rows before the poisoned one of a sequence are unharmed, the row itself is not.
        if (poison) {
          EXPECT_TRUE(std::isnan(out[3 * shape.value_width()]) && !std::isnan(out[2 * shape.value_width()]));
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, LazyCommitTest,
                         ::testing::Values(Case{{2, 2, 16, 16, 4}, 0.0f},      // the smallest
                                           Case{{1, 3, 24, 80, 4}, 0.0f},      // 3 value heads a key head, ragged sizes
                                           Case{{2, 4, 32, 48, 3}, -12.0f},    // decay near 1
                                           Case{{2, 4, 48, 32, 2}, 12.0f},     // decay near 0
                                           Case{{1, 2, 16, 24, 1}, 0.0f},      // no conv history
                                           Case{{1, 1, 128, 128, 4}, 0.0f}));  // the real head

}  // namespace
}  // namespace bebop
