// SPDX-License-Identifier: Apache-2.0
#include "kernels/swiglu/swiglu.h"

#include <gtest/gtest.h>

#include "tests/kernels/kernel_test_util.h"

namespace bebop {
namespace {

using testing::InstructionSets;
using testing::kUnit;
using testing::PaddedMatrix;
using testing::Random;
using testing::SameBits;

TEST(SwiGluTest, AgreesWithDouble) {
  ThreadPool pool(2);
  for (const int64_t width : {1, 16, 24, 511, 512, 513, 1040}) {
    Random random(static_cast<uint64_t>(width));
    const int64_t rows = 11;
    std::vector<float> gate = random.Normals(rows * width, 8.0f), up = random.Normals(rows * width);
    for (const auto set : InstructionSets()) {
      PaddedMatrix gates(gate, rows, width), ups(up, rows, width), out(rows, width);
      cpu::SwiGluWith(set, {gates.View(), ups.View(), out.View()}, pool);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < width; ++i) {
          const double g = gate[r * width + i], expected = g / (1.0 + std::exp(-g)) * up[r * width + i];
          ASSERT_NEAR(out.Row(r)[i], expected, 7 * kUnit * std::fabs(expected)) << width << " row " << r << " column " << i;
        }
      }
      EXPECT_TRUE(out.GapsUntouched());
      cpu::SwiGluWith(set, {gates.View(), ups.View(), gates.View()}, pool);
      EXPECT_TRUE(SameBits(gates.Values(), out.Values())) << "out may alias gate";
    }
  }
}

TEST(SwiGluTest, ExtremeGates) {
  ThreadPool pool(1);
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> gate = {-1000, -90, 90, 1000, inf, testing::kNan, 0.0f}, up(gate.size(), 2.0f), out(gate.size());
  const int64_t n = static_cast<int64_t>(gate.size());
  for (const auto set : InstructionSets()) {
    cpu::SwiGluWith(set, {FloatMatrix(gate.data(), 1, n), FloatMatrix(up.data(), 1, n), FloatMatrix(out.data(), 1, n)}, pool);
    EXPECT_EQ(out[0], 0.0f);
    EXPECT_NEAR(out[1], 0.0f, 1e-30f);
    EXPECT_EQ(out[2], 180.0f);
    EXPECT_EQ(out[3], 2000.0f);
    EXPECT_EQ(out[4], inf);
    EXPECT_TRUE(std::isnan(out[5]));
    EXPECT_EQ(out[6], 0.0f);
  }
}

// The exponential that all operators share, through a kernel compiled for each set.
struct ExpArgs {
  const float* in;
  float* out;
};

}  // namespace
}  // namespace bebop

#define BEBOP_SIMD_SOURCE "tests/kernels/swiglu/exp_simd.inc"
#include "kernels/common/simd_targets.inc"

namespace bebop {
namespace {

TEST(ExpTest, WithinTwoUlpFromMinus86ToTheLargestFloat) {
  std::vector<float> in, out;
  for (float x = -86.0f; x < 88.72f; x += 0.00037f) in.push_back(x);
  in.push_back(88.7228f);
  for (int e = -40; e < 0; ++e) in.push_back(std::ldexp(1.0f, e));
  out.resize(in.size());
  for (const auto set : InstructionSets()) {
    BEBOP_SIMD_SELECT(set, ExpRange)({in.data(), out.data()}, 0, static_cast<int64_t>(in.size()));
    double worst = 0;
    for (size_t i = 0; i < in.size(); ++i) {
      const double expected = std::exp(double{in[i]});
      const double ulp = std::ldexp(1.0, std::ilogb(expected) - 23);
      worst = std::max(worst, std::fabs(out[i] - expected) / ulp);
    }
    EXPECT_LE(worst, 2.0) << cpu::InstructionSetName(set);
    RecordProperty(cpu::InstructionSetName(set), std::to_string(worst));
  }
}

TEST(ExpTest, Edges) {
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> in = {0.0f, -0.0f, -86.1f, -1000.0f, -inf, 88.73f, 1000.0f, inf, testing::kNan};
  std::vector<float> out(in.size());
  for (const auto set : InstructionSets()) {
    BEBOP_SIMD_SELECT(set, ExpRange)({in.data(), out.data()}, 0, static_cast<int64_t>(in.size()));
    const std::vector<float> expected = {1, 1, 0, 0, 0, inf, inf, inf};
    EXPECT_TRUE(SameBits(expected.data(), out.data(), 8)) << cpu::InstructionSetName(set);
    EXPECT_TRUE(std::isnan(out[8]));
  }
}

}  // namespace
}  // namespace bebop
