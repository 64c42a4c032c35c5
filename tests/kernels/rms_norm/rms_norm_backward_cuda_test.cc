// SPDX-License-Identifier: Apache-2.0
#include "kernels/rms_norm/rms_norm_backward.h"

#include <gtest/gtest.h>

#include "tests/kernels/cuda_test_util.h"

namespace bebop {
namespace {

using testing::CudaTest;
using testing::DeviceArray;
using testing::DeviceMatrix;
using testing::kNan;
using testing::kUnit;
using testing::Random;
using testing::SameBits;

// What a row's dx and dweight are made of, in double: |s·g|, |s·n|·mean|g·n| and |dy·n|, whose sum bounds what roundings act on.
struct Magnitudes {
  std::vector<double> dx, dweight;
};
Magnitudes MagnitudesOf(const std::vector<float>& x, const std::vector<float>& dy, const std::vector<float>& weight,
                        int64_t rows) {
  const auto width = static_cast<int64_t>(weight.size());
  Magnitudes out = {std::vector<double>(x.size()), std::vector<double>(weight.size(), 0.0)};
  for (int64_t r = 0; r < rows; ++r) {
    double square = 0, dot = 0;
    for (int64_t c = 0; c < width; ++c) {
      const size_t at = static_cast<size_t>(r * width + c);
      square += double{x[at]} * x[at];
      dot += std::fabs(x[at] * (dy[at] * (1.0 + weight[static_cast<size_t>(c)])));
    }
    const double scale = 1.0 / std::sqrt(square / static_cast<double>(width) + 1e-6);
    for (int64_t c = 0; c < width; ++c) {
      const size_t at = static_cast<size_t>(r * width + c);
      const double normed = std::fabs(x[at] * scale);
      out.dx[at] = scale * (std::fabs(dy[at]) * (1.0 + std::fabs(weight[static_cast<size_t>(c)])) +
                            normed * dot * scale / static_cast<double>(width));
      out.dweight[static_cast<size_t>(c)] += std::fabs(dy[at]) * normed;
    }
  }
  return out;
}

class RmsNormBackwardCudaTest : public CudaTest {};

TEST_F(RmsNormBackwardCudaTest, AgreesWithTheCpu) {
  ThreadPool pool(1);
  struct Shape {
    int64_t rows, width;
  };
  for (const auto& [rows, width] : {Shape{1, 8}, {19, 72}, {37, 2568}, {3, 8216}}) {
    Random random(static_cast<uint64_t>(width));
    std::vector<float> x = random.Normals(rows * width), dy = random.Normals(rows * width), start = random.Normals(rows * width);
    // Rows differ in size by powers of ten, so that eps matters in some.
    for (int64_t i = 0; i < rows * width; ++i)
      x[static_cast<size_t>(i)] *= std::pow(10.0f, static_cast<float>(i / width % 5 - 3));
    const std::vector<float> weight = random.Normals(width, 0.3f), sums = random.Normals(width);
    const Magnitudes magnitudes = MagnitudesOf(x, dy, weight, rows);
    const DeviceArray<float> device_weight(weight);
    // Sums of a row are at most half of width long on either side (less on the device, which sums in a tree), then the square
    // root, its inverse and ten products and sums.
    const double row_units = static_cast<double>(width) / 2 + 14;
    for (const bool accumulate : {false, true}) {
      for (const bool alias : {false, true}) {
        SCOPED_TRACE(::testing::Message() << rows << " x " << width << " accumulate " << accumulate << " alias " << alias);
        if (accumulate && alias) continue;
        DeviceMatrix device_x(x, rows, width, DType::kFloat32), device_dy(dy, rows, width, DType::kFloat32, 24),
            dx(start, rows, width, DType::kFloat32, 16);
        DeviceArray<float> dweight(sums);
        cuda::RmsNormBackward({device_x.View(), device_weight.data(), 1e-6f, device_dy.View(),
                               alias ? device_dy.View() : dx.View(), accumulate, dweight.data()},
                              stream());
        std::vector<float> expected = start, expected_dweight = sums;
        cpu::RmsNormBackward({FloatMatrix(x.data(), rows, width), weight.data(), 1e-6f, FloatMatrix(dy.data(), rows, width),
                              FloatMatrix(expected.data(), rows, width), accumulate, expected_dweight.data()},
                             pool);
        const std::vector<float> actual = (alias ? device_dy : dx).Values(), actual_dweight = dweight.Download();
        for (size_t i = 0; i < actual.size(); ++i) {
          ASSERT_NEAR(actual[i], expected[i], kUnit * (row_units * magnitudes.dx[i] + 2 * std::fabs(expected[i]))) << "dx " << i;
        }
        for (size_t c = 0; c < actual_dweight.size(); ++c) {
          // The sum over the rows, of terms that have the row's roundings.
          ASSERT_NEAR(actual_dweight[c], expected_dweight[c],
                      kUnit * (row_units + static_cast<double>(rows)) * (magnitudes.dweight[c] + std::fabs(sums[c])))
              << "dweight " << c;
        }
        EXPECT_TRUE(device_x.GapsUntouched() && device_dy.GapsUntouched() && dx.GapsUntouched() && dweight.GuardsUntouched());
      }
    }
    // A frozen x: dweight alone.
    DeviceMatrix device_x(x, rows, width, DType::kFloat32), device_dy(dy, rows, width, DType::kFloat32);
    DeviceArray<float> dweight(sums), again(sums);
    DeviceMatrix dx(rows, width, DType::kFloat32);
    cuda::RmsNormBackward({device_x.View(), device_weight.data(), 1e-6f, device_dy.View(), {}, true, dweight.data()}, stream());
    cuda::RmsNormBackward({device_x.View(), device_weight.data(), 1e-6f, device_dy.View(), dx.View(), false, again.data()},
                          stream());
    EXPECT_TRUE(SameBits(dweight.Download(), again.Download()));
  }
}

// A wrong value stays in its row of dx, and shows in its column of dweight.
TEST_F(RmsNormBackwardCudaTest, NanStaysInItsRow) {
  constexpr int64_t kRows = 11, kWidth = 40;
  Random random(3);
  std::vector<float> x = random.Normals(kRows * kWidth);
  x[4 * kWidth + 5] = kNan;
  const DeviceArray<float> weight(random.Normals(kWidth));
  DeviceMatrix device_x(x, kRows, kWidth, DType::kFloat32), dy(random.Normals(kRows * kWidth), kRows, kWidth, DType::kFloat32),
      dx(kRows, kWidth, DType::kFloat32);
  DeviceArray<float> dweight(std::vector<float>(kWidth, 0.0f));
  cuda::RmsNormBackward({device_x.View(), weight.data(), 1e-6f, dy.View(), dx.View(), false, dweight.data()}, stream());
  const std::vector<float> values = dx.Values();
  for (int64_t i = 0; i < kRows * kWidth; ++i) EXPECT_EQ(std::isnan(values[static_cast<size_t>(i)]), i / kWidth == 4) << i;
  for (const float value : dweight.Download()) EXPECT_TRUE(std::isnan(value));
}

// More rows than blocks of 8: every block has more of them.
TEST_F(RmsNormBackwardCudaTest, ManyRows) {
  constexpr int64_t kRows = 8 * 1024 + 5, kWidth = 8;
  const std::vector<float> ones(kRows * kWidth, 1.0f);
  const DeviceArray<float> weight(std::vector<float>(kWidth, 0.0f));
  DeviceMatrix x(ones, kRows, kWidth, DType::kFloat32, 0), dy(ones, kRows, kWidth, DType::kFloat32, 0);
  DeviceArray<float> dweight(std::vector<float>(kWidth, 0.0f));
  cuda::RmsNormBackward({x.View(), weight.data(), 0.0f, dy.View(), {}, false, dweight.data()}, stream());
  for (const float value : dweight.Download()) EXPECT_EQ(value, static_cast<float>(kRows));
}

TEST_F(RmsNormBackwardCudaTest, NoRowsAreNoWork) {
  const DeviceArray<float> weight(std::vector<float>(8, 1.0f));
  DeviceArray<float> dweight(std::vector<float>(8, 2.0f));
  const TensorView empty = {nullptr, DType::kFloat32, 0, 8, 8};
  cuda::RmsNormBackward({empty, weight.data(), 1e-6f, empty, {}, false, dweight.data()}, stream());
  for (const float value : dweight.Download()) EXPECT_EQ(value, 2.0f);
}

}  // namespace
}  // namespace bebop
