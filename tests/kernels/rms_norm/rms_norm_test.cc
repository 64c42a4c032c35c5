// SPDX-License-Identifier: Apache-2.0
#include "kernels/rms_norm/rms_norm.h"

#include <gtest/gtest.h>

#include "tests/kernels/kernel_test_util.h"

namespace bebop {
namespace {

using testing::InstructionSets;
using testing::kUnit;
using testing::PaddedMatrix;
using testing::Random;
using testing::SameBits;

double InverseRms(const float* x, int64_t count, double eps) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += double{x[i]} * x[i];
  return 1.0 / std::sqrt(sum / static_cast<double>(count) + eps);
}

TEST(RmsNormTest, HandComputed) {
  ThreadPool pool(1);
  std::vector<float> x = {3, -4, 0, 0, 5}, weight = {0, 1, 7, 7, -0.5f}, out(5);
  cpu::RmsNorm({FloatMatrix(x.data(), 1, 5), {}, weight.data(), 0.0f, FloatMatrix(out.data(), 1, 5)}, pool);
  const double scale = 1.0 / std::sqrt(10.0);
  const std::vector<double> expected = {3 * scale, -8 * scale, 0, 0, 2.5 * scale};
  for (size_t i = 0; i < 5; ++i) EXPECT_NEAR(out[i], expected[i], 4 * kUnit * std::fabs(expected[i])) << i;
}

TEST(RmsNormTest, AgreesWithDoubleAndAddsTheResidual) {
  ThreadPool pool(2);
  for (const int64_t width : {1, 15, 16, 24, 64, 80, 128, 256, 1000}) {
    for (const bool with_residual : {false, true}) {
      Random random(static_cast<uint64_t>(width) * 2 + with_residual);
      const int64_t rows = 23;
      const std::vector<float> x = random.Normals(rows * width, 3.0f), residual = random.Normals(rows * width),
                               weight = random.Normals(width, 0.3f);
      std::vector<float> first;
      for (const auto set : InstructionSets()) {
        PaddedMatrix stream(x, rows, width), added(residual, rows, width), out(rows, width);
        cpu::RmsNormWith(set, {stream.View(), with_residual ? added.View() : TensorView{}, weight.data(), 1e-6f, out.View()},
                         pool);
        for (int64_t r = 0; r < rows; ++r) {
          std::vector<float> sum(x.begin() + r * width, x.begin() + (r + 1) * width);
          for (int64_t i = 0; with_residual && i < width; ++i) sum[i] += residual[r * width + i];
          ASSERT_TRUE(SameBits(sum.data(), stream.Row(r), width)) << "the stream is x + residual, rounded once";
          const double scale = InverseRms(sum.data(), width, 1e-6f);
          for (int64_t i = 0; i < width; ++i) {
            // Roundings: scale, 1 + weight, and two products.
            const double expected = sum[i] * scale * (1.0 + weight[i]);
            const double magnitude = std::fabs(sum[i] * scale) * (1.0 + std::fabs(1.0 + weight[i]));
            ASSERT_NEAR(out.Row(r)[i], expected, 4 * kUnit * magnitude) << width << " row " << r << " column " << i;
          }
        }
        EXPECT_TRUE(out.GapsUntouched() && stream.GapsUntouched());
        if (first.empty()) first = out.Values();
        EXPECT_TRUE(SameBits(first, out.Values())) << "sets differ at width " << width;
      }
    }
  }
}

TEST(RmsNormTest, OutMayBeTheResidualAndThreadsChangeNothing) {
  const int64_t rows = 37, width = 520;
  Random random(7);
  const std::vector<float> x = random.Normals(rows * width), residual = random.Normals(rows * width),
                           weight = random.Normals(width);
  std::vector<float> expected(x.size()), stream = x, added = residual;
  ThreadPool one(1);
  cpu::RmsNorm({FloatMatrix(stream.data(), rows, width), FloatMatrix(added.data(), rows, width), weight.data(), 1e-6f,
                FloatMatrix(expected.data(), rows, width)},
               one);
  for (const int threads : {1, 3}) {
    ThreadPool pool(threads);
    stream = x;
    added = residual;
    cpu::RmsNorm({FloatMatrix(stream.data(), rows, width), FloatMatrix(added.data(), rows, width), weight.data(), 1e-6f,
                  FloatMatrix(added.data(), rows, width)},
                 pool);
    EXPECT_TRUE(SameBits(expected, added));
  }
}

TEST(GatedRmsNormTest, AgreesWithDoublePerHead) {
  ThreadPool pool(2);
  for (const int64_t dim : {16, 24, 64, 80, 128, 256}) {
    Random random(static_cast<uint64_t>(dim));
    const int64_t rows = 9, heads = 3, width = heads * dim;
    const std::vector<float> x = random.Normals(rows * width, 0.1f), gate = random.Normals(rows * width, 5.0f),
                             weight = random.Normals(dim);
    for (const auto set : InstructionSets()) {
      PaddedMatrix in(x, rows, width), gates(gate, rows, width), out(rows, width);
      cpu::GatedRmsNormWith(set, {in.View(), gates.View(), weight.data(), static_cast<int32_t>(dim), 1e-6f, out.View()}, pool);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < width; ++i) {
          const double scale = InverseRms(&x[r * width + i / dim * dim], dim, 1e-6f), g = gate[r * width + i];
          const double expected = x[r * width + i] * scale * weight[i % dim] * g / (1.0 + std::exp(-g));
          // exp is within 2 ulp (4 units); scale, three products, the sum and the quotient round once each.
          ASSERT_NEAR(out.Row(r)[i], expected, 10 * kUnit * std::fabs(expected)) << dim << " row " << r << " column " << i;
        }
      }
      EXPECT_TRUE(out.GapsUntouched());
      cpu::GatedRmsNormWith(set, {in.View(), gates.View(), weight.data(), static_cast<int32_t>(dim), 1e-6f, in.View()}, pool);
      EXPECT_TRUE(SameBits(in.Values(), out.Values())) << "out may alias x";
    }
  }
}

TEST(GatedRmsNormTest, NanStaysInItsHead) {
  ThreadPool pool(1);
  Random random(3);
  const int64_t dim = 24, width = 2 * dim;
  std::vector<float> x = random.Normals(width), gate = random.Normals(width), weight = random.Normals(dim), clean(width),
                     out(width);
  const auto norm = [&](std::vector<float>& to) {
    cpu::GatedRmsNorm({FloatMatrix(x.data(), 1, width), FloatMatrix(gate.data(), 1, width), weight.data(),
                       static_cast<int32_t>(dim), 1e-6f, FloatMatrix(to.data(), 1, width)},
                      pool);
  };
  norm(clean);
  x[3] = testing::kNan;
  norm(out);
  for (int64_t i = 0; i < dim; ++i) EXPECT_TRUE(std::isnan(out[i]));
  EXPECT_TRUE(SameBits(&clean[dim], &out[dim], dim));
}

}  // namespace
}  // namespace bebop
