// SPDX-License-Identifier: Apache-2.0
// Causal convolution and delta rule together, as a layer runs them: whatever is drafted and accepted, outputs and states are bit
// for bit those of decoding token by token.
#include <gtest/gtest.h>

#include "kernels/causal_conv/causal_conv.h"
#include "kernels/delta_rule/delta_rule.h"
#include "tests/kernels/kernel_test_util.h"

namespace bebop {
namespace {

using testing::InstructionSets;
using testing::OwnedBatch;
using testing::OwnedLinearState;
using testing::Random;
using testing::SameBits;

struct Shape {
  int32_t key_heads, value_heads, key_dim, value_dim, conv_width;
  int32_t channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
  int32_t value_width() const { return value_heads * value_dim; }
};

constexpr int32_t kWindow = 8;

// Inputs of a layer, a row per token.
struct Rows {
  explicit Rows(const Shape& shape) : shape(shape) {}
  Rows(const Shape& shape, int32_t count, float gate_shift, Random& random) : shape(shape) {
    for (int32_t i = 0; i < count; ++i) AppendRandom(gate_shift, random);
  }
  void AppendRandom(float gate_shift, Random& random) {
    Append(random.Normals(shape.channels()).data(), random.Normals(shape.value_heads, 2.0f),
           random.Normals(shape.value_heads, 2.0f));
    for (int32_t h = 0; h < shape.value_heads; ++h) a[a.size() - 1 - static_cast<size_t>(h)] += gate_shift;
  }
  void Append(const float* x_row, const std::vector<float>& a_row, const std::vector<float>& b_row) {
    x.insert(x.end(), x_row, x_row + shape.channels());
    a.insert(a.end(), a_row.begin(), a_row.end());
    b.insert(b.end(), b_row.begin(), b_row.end());
  }
  void AppendFrom(const Rows& other, int32_t row) {
    const auto part = [&](const std::vector<float>& values, int32_t width) {
      return std::vector<float>(values.begin() + row * width, values.begin() + (row + 1) * width);
    };
    Append(part(other.x, shape.channels()).data(), part(other.a, shape.value_heads), part(other.b, shape.value_heads));
  }
  int32_t count() const { return static_cast<int32_t>(a.size()) / shape.value_heads; }

  Shape shape;
  std::vector<float> x, a, b;
};

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

  OwnedLinearState state;

 private:
  Shape shape_;
  cpu::InstructionSet set_;
  ThreadPool pool_;
  std::vector<float> weight_, a_log_, dt_bias_;
};

// What token-by-token decoding leaves: outputs of each token, and matrix and conv history after it ([0]: before the first).
struct Trace {
  Trace(Layer& layer, const Rows& tokens) {
    for (int32_t i = 0; i < tokens.count(); ++i) {
      Rows one(tokens.shape);
      one.AppendFrom(tokens, i);
      out.push_back(layer.RunOne({.num_rows = 1, .num_known_rows = 1, .state_src = i == 0 ? -1 : 0, .state_dst = 0}, one));
      matrix.push_back(layer.state.Matrix(0));
      history.push_back(layer.state.ConvHistory(0));
    }
  }
  std::vector<std::vector<float>> out, matrix, history;
};

struct Case {
  Shape shape;
  float gate_shift;  // moves a: -12: decay near 1; +12: decay near 0
};

class LazyCommitTest : public ::testing::TestWithParam<Case> {};

TEST_P(LazyCommitTest, RandomWindowsLeaveWhatTokenByTokenDecodingLeaves) {
  const auto [shape, gate_shift] = GetParam();
  constexpr int32_t kNumTokens = 900;
  for (const auto set : InstructionSets()) {
    Random random(17);
    const Rows tokens(shape, kNumTokens, gate_shift, random);
    Layer reference(shape, 1, 5, set, 1), layer(shape, 3, 5, set, 3);
    const Trace trace(reference, tokens);
    bool none_accepted = false, all_accepted = false, moved = false;
    int32_t windows = 0, computed = 0, replay = 0,
            slot = -1;  // `computed` tokens are in the slot, its window's accepted rows included
    while (computed < kNumTokens - 1) {
      // A decode step, a prompt chunk (some longer than the kernel's runs of 64), or nothing but drafts.
      const int32_t kind = random.Below(24);
      const int32_t wanted = kind <= 1 && windows > 0 ? 0
                             : kind == 2              ? 60 + random.Below(20)
                             : kind < 6               ? 1 + random.Below(9)
                                                      : 1;
      const int32_t known = std::min(wanted, kNumTokens - computed);
      const int32_t drafts = std::max(known == 0 ? 1 : 0, random.Below(kWindow + 1));
      const int32_t accepted = std::min(random.Below(4) == 0 ? drafts : random.Below(drafts + 1), kNumTokens - computed - known);
      Rows rows(shape);
      for (int32_t i = 0; i < known + accepted; ++i) rows.AppendFrom(tokens, computed + i);
      for (int32_t i = accepted; i < drafts; ++i) rows.AppendRandom(gate_shift, random);  // wrong drafts
      const int32_t destination = slot < 0 || random.Below(3) == 0 ? random.Below(3) : slot;
      moved |= slot >= 0 && destination != slot;
      const std::vector<float> out = layer.RunOne({.num_rows = known + drafts,
                                                   .num_known_rows = known,
                                                   .num_replay_rows = replay,
                                                   .first_position = computed,
                                                   .state_src = slot,
                                                   .state_dst = destination},
                                                  rows);
      for (int32_t i = 0; i < known + accepted; ++i) {
        ASSERT_TRUE(SameBits(&out[i * shape.value_width()], trace.out[computed + i].data(), shape.value_width()))
            << cpu::InstructionSetName(set) << " window " << windows << " row " << i << " of token " << computed + i;
      }
      const int32_t committed = computed + known;
      if (committed > 0) {
        ASSERT_TRUE(SameBits(layer.state.Matrix(destination), trace.matrix[committed - 1])) << "window " << windows;
        ASSERT_TRUE(SameBits(layer.state.ConvHistory(destination), trace.history[committed - 1])) << "window " << windows;
      }
      none_accepted |= drafts > 0 && accepted == 0;
      all_accepted |= drafts == kWindow && accepted == kWindow;
      computed += known + accepted;
      replay = accepted;
      slot = destination;
      ++windows;
    }
    EXPECT_GE(windows, 64);
    EXPECT_TRUE(none_accepted && all_accepted && moved);
  }
}

// Two children start from the window of one parent slot, in one call, and accept different numbers of its rows.
TEST_P(LazyCommitTest, ForksLeaveTheParentAlone) {
  const auto [shape, gate_shift] = GetParam();
  const auto set = cpu::DetectInstructionSet();
  Random random(3);
  const Rows tokens(shape, 12, gate_shift, random);
  Layer reference(shape, 1, 5, set, 1), layer(shape, 3, 5, set, 2);
  const Trace trace(reference, tokens);
  Rows first(shape);
  for (int32_t i = 0; i < 9; ++i) first.AppendFrom(tokens, i);
  layer.RunOne({.num_rows = 9, .num_known_rows = 4, .state_src = -1, .state_dst = 2}, first);  // 5 drafts, all right
  const std::vector<float> parent = layer.state.Slot(2);

  OwnedBatch batch;
  Rows rows(shape);
  batch.Add({.num_rows = 3, .num_known_rows = 1, .num_replay_rows = 2, .state_src = 2, .state_dst = 0});
  for (int32_t i = 6; i < 9; ++i) rows.AppendFrom(tokens, i);
  batch.Add({.num_rows = 3, .num_known_rows = 3, .num_replay_rows = 5, .state_src = 2, .state_dst = 1});
  for (int32_t i = 9; i < 12; ++i) rows.AppendFrom(tokens, i);
  const std::vector<float> out = layer.Run(batch, rows);

  for (int32_t i = 0; i < 6; ++i)
    EXPECT_TRUE(SameBits(&out[i * shape.value_width()], trace.out[6 + i].data(), shape.value_width())) << i;
  EXPECT_TRUE(SameBits(layer.state.Matrix(0), trace.matrix[6]));
  EXPECT_TRUE(SameBits(layer.state.Matrix(1), trace.matrix[11]));
  EXPECT_TRUE(SameBits(layer.state.ConvHistory(0), trace.history[6]));
  EXPECT_TRUE(SameBits(layer.state.ConvHistory(1), trace.history[11]));
  EXPECT_TRUE(SameBits(layer.state.Slot(2), parent));
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
