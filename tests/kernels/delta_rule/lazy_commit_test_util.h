// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include "tests/kernels/kernel_test_util.h"

// What the lazy-commit tests of the CPU and of a device share. A `Layer` is a causal convolution and a delta rule with their
// state:
//   std::vector<float> Run(const OwnedBatch&, Rows&)            outputs [T, Hv*dv]
//   std::vector<float> RunOne(SequenceRows, Rows&)              the same for one sequence
//   const OwnedLinearState& State()                             all slots as they are now
namespace bebop::testing {

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

// What token-by-token decoding leaves: outputs of each token, and matrix and conv history after it.
struct Trace {
  template <typename Layer>
  Trace(Layer& layer, const Rows& tokens) {
    for (int32_t i = 0; i < tokens.count(); ++i) {
      Rows one(tokens.shape);
      one.AppendFrom(tokens, i);
      out.push_back(layer.RunOne({.num_rows = 1, .num_known_rows = 1, .state_src = i == 0 ? -1 : 0, .state_dst = 0}, one));
      matrix.push_back(layer.State().Matrix(0));
      history.push_back(layer.State().ConvHistory(0));
    }
  }
  std::vector<std::vector<float>> out, matrix, history;
};

struct Case {
  Shape shape;
  float gate_shift;  // moves a: -12: decay near 1; +12: decay near 0
};

// Runs windows with random drafts, acceptances and slots: prompts, decode steps, and passes of drafts alone. `reference` has one
// slot, `layer` three; both are fresh and of the same constants. Prompts have up to long_prompt + 19 rows.
template <typename Layer>
void CheckRandomWindows(Layer& reference, Layer& layer, const Case& test_case, int32_t num_tokens, int32_t long_prompt) {
  const auto [shape, gate_shift] = test_case;
  Random random(17);
  const Rows tokens(shape, num_tokens, gate_shift, random);
  const Trace trace(reference, tokens);
  bool none_accepted = false, all_accepted = false, moved = false;
  int32_t windows = 0, computed = 0, replay = 0,
          slot = -1;  // `computed` tokens are in the slot, its window's accepted rows included
  while (computed < num_tokens - 1) {
    // A decode step, a prompt chunk (some longer than the kernel's runs of 64), or nothing but drafts.
    const int32_t kind = random.Below(24);
    const int32_t wanted = kind <= 1 && windows > 0 ? 0
                           : kind == 2              ? long_prompt + random.Below(20)
                           : kind < 6               ? 1 + random.Below(9)
                                                    : 1;
    const int32_t known = std::min(wanted, num_tokens - computed);
    const int32_t drafts = std::max(known == 0 ? 1 : 0, random.Below(kWindow + 1));
    const int32_t accepted = std::min(random.Below(4) == 0 ? drafts : random.Below(drafts + 1), num_tokens - computed - known);
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
          << "window " << windows << " row " << i << " of token " << computed + i;
    }
    const int32_t committed = computed + known;
    if (committed > 0) {
      ASSERT_TRUE(SameBits(layer.State().Matrix(destination), trace.matrix[committed - 1])) << "window " << windows;
      ASSERT_TRUE(SameBits(layer.State().ConvHistory(destination), trace.history[committed - 1])) << "window " << windows;
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

// Two children start from the window of one parent slot, in one call, and accept different numbers of its rows.
template <typename Layer>
void CheckForks(Layer& reference, Layer& layer, const Case& test_case) {
  const auto [shape, gate_shift] = test_case;
  Random random(3);
  const Rows tokens(shape, 12, gate_shift, random);
  const Trace trace(reference, tokens);
  Rows first(shape);
  for (int32_t i = 0; i < 9; ++i) first.AppendFrom(tokens, i);
  layer.RunOne({.num_rows = 9, .num_known_rows = 4, .state_src = -1, .state_dst = 2}, first);  // 5 drafts, all right
  const std::vector<float> parent = layer.State().Slot(2);

  OwnedBatch batch;
  Rows rows(shape);
  batch.Add({.num_rows = 3, .num_known_rows = 1, .num_replay_rows = 2, .state_src = 2, .state_dst = 0});
  for (int32_t i = 6; i < 9; ++i) rows.AppendFrom(tokens, i);
  batch.Add({.num_rows = 3, .num_known_rows = 3, .num_replay_rows = 5, .state_src = 2, .state_dst = 1});
  for (int32_t i = 9; i < 12; ++i) rows.AppendFrom(tokens, i);
  const std::vector<float> out = layer.Run(batch, rows);

  for (int32_t i = 0; i < 6; ++i)
    EXPECT_TRUE(SameBits(&out[i * shape.value_width()], trace.out[6 + i].data(), shape.value_width())) << i;
  EXPECT_TRUE(SameBits(layer.State().Matrix(0), trace.matrix[6]));
  EXPECT_TRUE(SameBits(layer.State().Matrix(1), trace.matrix[11]));
  EXPECT_TRUE(SameBits(layer.State().ConvHistory(0), trace.history[6]));
  EXPECT_TRUE(SameBits(layer.State().ConvHistory(1), trace.history[11]));
  EXPECT_TRUE(SameBits(layer.State().Slot(2), parent));
}

}  // namespace bebop::testing
