// SPDX-License-Identifier: Apache-2.0
#include "kernels/delta_rule/delta_rule.h"

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

// The recurrence of the header, in double, for one sequence from the zero state.
struct Reference {
  std::vector<double> out;     // [T, Hv*dv]
  std::vector<double> matrix;  // [Hv, dk, dv] after the last row
  double largest = 0;          // largest norm of a column of S on the way
};

struct Inputs {
  std::vector<float> qkv, a, b, a_log, dt_bias;
};

Reference Recur(const Inputs& in, int32_t num_rows, int32_t key_heads, int32_t value_heads, int32_t dk, int32_t dv) {
  Reference reference;
  reference.out.resize(static_cast<size_t>(num_rows * value_heads * dv));
  reference.matrix.resize(static_cast<size_t>(value_heads * dk * dv));
  const int32_t channels = 2 * key_heads * dk + value_heads * dv;
  for (int32_t h = 0; h < value_heads; ++h) {
    double* s = &reference.matrix[static_cast<size_t>(h * dk * dv)];
    for (int32_t t = 0; t < num_rows; ++t) {
      const int32_t key_head = h / (value_heads / key_heads);
      const float* q = &in.qkv[t * channels + key_head * dk];
      const float* k = q + key_heads * dk;
      const float* v = &in.qkv[t * channels + 2 * key_heads * dk + h * dv];
      double qq = 1e-6, kk = 1e-6;
      for (int32_t i = 0; i < dk; ++i) qq += double{q[i]} * q[i], kk += double{k[i]} * k[i];
      const double a = double{in.a[t * value_heads + h]} + in.dt_bias[h];
      const double decay = std::exp(-std::exp(double{in.a_log[h]}) * (std::log1p(std::exp(-std::fabs(a))) + std::max(a, 0.0)));
      const double beta = 1.0 / (1.0 + std::exp(-double{in.b[t * value_heads + h]}));
      for (int32_t c = 0; c < dv; ++c) {
        double sk = 0, sq = 0, norm = 0;
        for (int32_t i = 0; i < dk; ++i) {
          s[i * dv + c] *= decay;
          sk += s[i * dv + c] * k[i] / std::sqrt(kk);
        }
        const double delta = beta * (v[c] - sk);
        for (int32_t i = 0; i < dk; ++i) {
          s[i * dv + c] += k[i] / std::sqrt(kk) * delta;
          sq += s[i * dv + c] * q[i] / std::sqrt(qq) / std::sqrt(double(dk));
          norm += s[i * dv + c] * s[i * dv + c];
        }
        reference.out[(t * value_heads + h) * dv + c] = sq;
        reference.largest = std::max(reference.largest, std::max(std::sqrt(norm), double{std::fabs(v[c])}));
      }
    }
  }
  return reference;
}

Inputs RandomInputs(int32_t num_rows, int32_t key_heads, int32_t value_heads, int32_t dk, int32_t dv, uint64_t seed) {
  Random random(seed);
  return {random.Normals(int64_t{num_rows} * (2 * key_heads * dk + value_heads * dv)),
          random.Normals(num_rows * value_heads, 2.0f), random.Normals(num_rows * value_heads, 2.0f),
          random.Normals(value_heads, 1.5f), random.Normals(value_heads, 2.0f)};
}

struct Sizes {
  int32_t key_heads, value_heads, dk, dv, rows;
};

TEST(DeltaRuleTest, AgreesWithDouble) {
  for (const auto& [key_heads, value_heads, dk, dv, rows] :
       {Sizes{1, 1, 16, 16, 3}, Sizes{2, 4, 24, 80, 20}, Sizes{2, 6, 64, 16, 70}, Sizes{1, 2, 80, 24, 150},
        Sizes{2, 2, 128, 128, 100}, Sizes{1, 3, 256, 64, 20}, Sizes{1, 1, 16, 256, 65}}) {
    const Inputs in = RandomInputs(rows, key_heads, value_heads, dk, dv, static_cast<uint64_t>(dk * 1000 + dv));
    const Reference reference = Recur(in, rows, key_heads, value_heads, dk, dv);
    for (const auto set : InstructionSets()) {
      OwnedLinearState state(2, 4, key_heads, value_heads, dk, dv, 4);
      const int32_t drafts = std::min(3, rows - 1);
      PaddedMatrix qkv(in.qkv, rows, state.view.conv_channels()), a(in.a, rows, value_heads), b(in.b, rows, value_heads);
      PaddedMatrix out(rows, value_heads * dv);
      ThreadPool pool(2);
      const auto run = [&](int32_t known) {
        OwnedBatch batch;
        batch.Add({.num_rows = rows, .num_known_rows = known, .state_src = -1, .state_dst = 1});
        cpu::DeltaRuleWith(
            set, {batch.View(), qkv.View(), a.View(), b.View(), in.a_log.data(), in.dt_bias.data(), state.view, out.View()},
            pool);
      };
      // Errors of a step: the sums over dk (each term of size |S||k|, dk roundings at most) and a few roundings of S. The step is
      // a contraction, so they add up over the rows at worst.
      const double tolerance = rows * (dk + 16) * kUnit * reference.largest;
      run(rows);
      const std::vector<float> matrix = state.Matrix(1);
      for (size_t i = 0; i < reference.matrix.size(); ++i) {
        ASSERT_NEAR(matrix[i], reference.matrix[i], tolerance) << cpu::InstructionSetName(set) << " S " << i;
      }
      run(rows - drafts);
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t i = 0; i < value_heads * dv; ++i) {
          ASSERT_NEAR(out.Row(t)[i], reference.out[t * value_heads * dv + i], tolerance)
              << cpu::InstructionSetName(set) << " dk " << dk << " row " << t << " column " << i;
        }
      }
      EXPECT_TRUE(out.GapsUntouched());
      // The window holds raw k and v and the gates of the draft rows; the untouched slot stays as it was.
      for (int32_t i = 0; i < drafts; ++i) {
        const int64_t row = rows - drafts + i, key_width = key_heads * dk;
        EXPECT_TRUE(SameBits(&state.window_k[(4 + i) * key_width], qkv.Row(row) + key_width, key_width));
        EXPECT_TRUE(SameBits(&state.window_v[(4 + i) * value_heads * dv], qkv.Row(row) + 2 * key_width, value_heads * dv));
        for (int32_t h = 0; h < value_heads; ++h) {
          const double x = double{in.a[row * value_heads + h]} + in.dt_bias[h];
          const double g = -std::exp(double{in.a_log[h]}) * (std::log1p(std::exp(-std::fabs(x))) + std::max(x, 0.0));
          const double beta = 1.0 / (1.0 + std::exp(-double{in.b[row * value_heads + h]}));
          const float* gate = &state.window_gate[((4 + i) * value_heads + h) * 2];
          // Relative to g: x rounds once, with up to (|a| + |bias|) / softplus magnified.
          EXPECT_NEAR(gate[0], g, 8 * kUnit * (std::fabs(g) + std::exp(double{in.a_log[h]}) * (std::fabs(x) + 1)));
          EXPECT_NEAR(gate[1], beta, 4 * kUnit);
        }
      }
      for (const float value : state.Slot(0)) ASSERT_TRUE(std::isnan(value));
    }
  }
}

// One token from the zero state: S = k δᵀ with δ = β v, o = (k·q) δ. All by hand.
TEST(DeltaRuleTest, HandComputedSingleToken) {
  ThreadPool pool(1);
  OwnedLinearState state(1, 0, 1, 1, 2, 1, 1);
  std::vector<float> qkv = {1, 0, 3, 4, 10}, a = {0}, b = {0}, a_log = {0}, dt_bias = {0}, out(1);
  OwnedBatch batch;
  batch.Add({.num_rows = 1, .num_known_rows = 1, .state_src = -1, .state_dst = 0});
  cpu::DeltaRule({batch.View(), FloatMatrix(qkv.data(), 1, 5), FloatMatrix(a.data(), 1, 1), FloatMatrix(b.data(), 1, 1),
                  a_log.data(), dt_bias.data(), state.view, FloatMatrix(out.data(), 1, 1)},
                 pool);
  // k = (0.6, 0.8), q = (1, 0)/√2, beta = 1/2, delta = 5.
  EXPECT_NEAR(state.matrix[0], 3.0, 1e-5);
  EXPECT_NEAR(state.matrix[1], 4.0, 1e-5);
  EXPECT_NEAR(out[0], 3.0 / std::sqrt(2.0), 1e-5);
  // The same token again: S halves (e^g = 1/2), then delta = (10 - 2.5) / 2 = 3.75, and S = (1.5 + 2.25, 2 + 3).
  batch.sequences[0].state_src = 0;
  cpu::DeltaRule({batch.View(), FloatMatrix(qkv.data(), 1, 5), FloatMatrix(a.data(), 1, 1), FloatMatrix(b.data(), 1, 1),
                  a_log.data(), dt_bias.data(), state.view, FloatMatrix(out.data(), 1, 1)},
                 pool);
  EXPECT_NEAR(state.matrix[0], 3.75, 1e-5);
  EXPECT_NEAR(state.matrix[1], 5.0, 1e-5);
  EXPECT_NEAR(out[0], 3.75 / std::sqrt(2.0), 1e-5);
}

// Gates far out: a decay of exactly 0 forgets, a decay of exactly 1 with beta 0 keeps every bit.
TEST(DeltaRuleTest, ExtremeGates) {
  ThreadPool pool(1);
  for (const auto set : InstructionSets()) {
    constexpr int32_t kDim = 32;
    OwnedLinearState state(1, 0, 1, 1, kDim, kDim, 1);
    Random random(1);
    std::vector<float> qkv = random.Normals(3 * kDim), a_log = {0}, dt_bias = {0}, out(kDim);
    const auto run = [&](float a, float b, int32_t source) {
      OwnedBatch batch;
      batch.Add({.num_rows = 1, .num_known_rows = 1, .state_src = source, .state_dst = 0});
      cpu::DeltaRuleWith(set,
                         {batch.View(), FloatMatrix(qkv.data(), 1, 3 * kDim), FloatMatrix(&a, 1, 1), FloatMatrix(&b, 1, 1),
                          a_log.data(), dt_bias.data(), state.view, FloatMatrix(out.data(), 1, kDim)},
                         pool);
    };
    run(0, 3, -1);
    const std::vector<float> fresh = state.matrix, fresh_out = out;
    run(1000, 3, 0);  // e^-1000 = 0
    EXPECT_TRUE(SameBits(state.matrix, fresh) && SameBits(out, fresh_out));
    run(-1000, -1000, 0);  // softplus = 0, sigmoid = 0
    EXPECT_TRUE(SameBits(state.matrix, fresh));
  }
}

}  // namespace
}  // namespace bebop
