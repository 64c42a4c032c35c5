// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "kernels/rms_norm/rms_norm.h"
#include "tests/kernels/cuda_test_util.h"

namespace bebop {
namespace {

using testing::CudaTest;
using testing::DeviceArray;
using testing::DeviceMatrix;
using testing::kNan;
using testing::kUnit;
using testing::Random;
using testing::RoundToBFloat16;
using testing::SameBits;

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16};

std::vector<float> Rounded(const std::vector<float>& values, DType dtype) {
  return dtype == DType::kFloat32 ? values : RoundToBFloat16(values);
}
double StorageUnit(DType dtype) { return dtype == DType::kFloat32 ? 0.0 : 0x1.01p-8; }

// Normal numbers whose rows differ in size by powers of ten, so that eps matters in some.
std::vector<float> Rows(Random& random, int64_t rows, int64_t width) {
  std::vector<float> values = random.Normals(rows * width);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < width; ++c)
      values[static_cast<size_t>(r * width + c)] *= std::pow(10.0f, static_cast<float>(r % 5 - 3));
  }
  return values;
}

// Roundings of the device beyond the CPU's: half of those on a path of the sum of squares (8 of a vector, at most 4 vectors, 5
// shuffles in a warp and 5 over the warps), then the mean, eps, the root, its inverse, 1 + weight and two products.
constexpr double kDeviceUnits = (8 + 4 + 5 + 5) / 2.0 + 7;
constexpr double kCpuUnits = 4;  // rms_norm_test

class RmsNormCudaTest : public CudaTest {};

TEST_F(RmsNormCudaTest, AgreesWithTheCpu) {
  ThreadPool pool(1);
  for (const int64_t width : {8, 72, 256, 2560, 8216}) {
    const int64_t rows = width > 1000 ? 5 : 11;
    Random random(static_cast<uint64_t>(width));
    const std::vector<float> weight = random.Normals(width, 0.3f);
    const DeviceArray<float> device_weight(weight);
    for (const DType x_dtype : kDTypes) {
      for (const DType out_dtype : kDTypes) {
        for (const int residual : {-1, 0, 1}) {  // none, or the index of its type
          SCOPED_TRACE(::testing::Message() << width << ": " << DTypeName(x_dtype) << " -> " << DTypeName(out_dtype)
                                            << ", residual " << residual);
          std::vector<float> x = Rounded(Rows(random, rows, width), x_dtype);
          const DType residual_dtype = residual == 1 ? DType::kBFloat16 : DType::kFloat32;
          const std::vector<float> added = Rounded(Rows(random, rows, width), residual_dtype);
          DeviceMatrix stream_matrix(x, rows, width, x_dtype), device_added(added, rows, width, residual_dtype, 24),
              out(rows, width, out_dtype, 16);
          cuda::RmsNorm(
              {stream_matrix.View(), residual < 0 ? TensorView{} : device_added.View(), device_weight.data(), 1e-6f, out.View()},
              stream());

          if (residual >= 0) {
            for (size_t i = 0; i < x.size(); ++i) x[i] += added[i];
            x = Rounded(x, x_dtype);
          }
          EXPECT_TRUE(SameBits(stream_matrix.Values(), x)) << "the stream is x + residual, rounded once";
          std::vector<float> expected(x.size());
          cpu::RmsNorm({FloatMatrix(x.data(), rows, width), {}, weight.data(), 1e-6f, FloatMatrix(expected.data(), rows, width)},
                       pool);
          const std::vector<float> actual = out.Values();
          for (size_t i = 0; i < actual.size(); ++i) {
            const double factor = 1.0 + weight[i % static_cast<size_t>(width)];
            const double normed = factor == 0 ? 0 : std::fabs(expected[i] / factor);
            const double tolerance = (kDeviceUnits + kCpuUnits) * kUnit * normed * (1 + std::fabs(factor)) +
                                     StorageUnit(out_dtype) * std::fabs(expected[i]);
            ASSERT_NEAR(actual[i], expected[i], tolerance) << "value " << i;
          }
          EXPECT_TRUE(out.GapsUntouched() && stream_matrix.GapsUntouched() && device_added.GapsUntouched());
        }
      }
    }
  }
}

TEST_F(RmsNormCudaTest, ARowDoesNotDependOnItsBatchAndOutMayBeTheResidual) {
  constexpr int64_t kRows = 7, kWidth = 264;
  Random random(5);
  const std::vector<float> weight = random.Normals(kWidth);
  std::vector<float> x = random.Normals(kRows * kWidth), added = random.Normals(kRows * kWidth);
  const DeviceArray<float> device_weight(weight);
  const auto norm = [&](int64_t first, int64_t rows, bool alias) {
    const auto part = [&](const std::vector<float>& all) {
      return std::vector<float>(all.begin() + first * kWidth, all.begin() + (first + rows) * kWidth);
    };
    DeviceMatrix stream_matrix(part(x), rows, kWidth, DType::kFloat32), residual(part(added), rows, kWidth, DType::kBFloat16),
        out(rows, kWidth, DType::kBFloat16);
    cuda::RmsNorm({stream_matrix.View(), residual.View(), device_weight.data(), 1e-6f, alias ? residual.View() : out.View()},
                  stream());
    return alias ? residual.Values() : out.Values();
  };
  const std::vector<float> all = norm(0, kRows, false);
  EXPECT_TRUE(SameBits(all, norm(0, kRows, true)));
  for (int64_t r = 0; r < kRows; ++r) EXPECT_TRUE(SameBits(norm(r, 1, false).data(), all.data() + r * kWidth, kWidth)) << r;
  x[2 * kWidth + 100] = kNan;
  const std::vector<float> poisoned = norm(0, kRows, false);
  for (int64_t r = 0; r < kRows; ++r) {
    if (r != 2) {
      EXPECT_TRUE(SameBits(&poisoned[r * kWidth], &all[r * kWidth], kWidth)) << r;
      continue;
    }
    for (int64_t c = 0; c < kWidth; ++c) EXPECT_TRUE(std::isnan(poisoned[r * kWidth + c])) << c;
  }
}

TEST_F(RmsNormCudaTest, NoRowsAreNoWork) {
  const DeviceArray<float> weight(std::vector<float>(16, 0.0f));
  const TensorView empty = {nullptr, DType::kFloat32, 0, 16, 16};
  cuda::RmsNorm({empty, {}, weight.data(), 1e-6f, empty}, stream());
  cuda::GatedRmsNorm({empty, empty, weight.data(), 8, 1e-6f, empty}, stream());
}

class GatedRmsNormCudaTest : public CudaTest {};

TEST_F(GatedRmsNormCudaTest, AgreesWithTheCpuPerHead) {
  ThreadPool pool(1);
  // Half of the roundings of the sum of squares (8 of a vector, 4 vectors, 4 shuffles); mean, eps, root, inverse; three products;
  // the exponential (1 ulp, 2 units), the sum and the quotient.
  constexpr double kGatedUnits = (8 + 4 + 4) / 2.0 + 4 + 3 + 4;
  constexpr double kGatedCpuUnits = 10;  // rms_norm_test
  for (const int64_t dim : {8, 24, 128, 136, 512}) {
    const int64_t rows = 7, heads = 3, width = heads * dim;
    Random random(static_cast<uint64_t>(dim));
    const std::vector<float> weight = random.Normals(dim);
    const DeviceArray<float> device_weight(weight);
    for (const DType dtype : kDTypes) {
      for (const DType out_dtype : kDTypes) {
        SCOPED_TRACE(::testing::Message() << dim << ": " << DTypeName(dtype) << " -> " << DTypeName(out_dtype));
        std::vector<float> x = Rounded(Rows(random, rows, width), dtype),
                           gate = Rounded(random.Normals(rows * width, 5.0f), dtype);
        DeviceMatrix device_x(x, rows, width, dtype), device_gate(gate, rows, width, dtype, 24), out(rows, width, out_dtype, 16);
        const auto head_dim = static_cast<int32_t>(dim);
        cuda::GatedRmsNorm({device_x.View(), device_gate.View(), device_weight.data(), head_dim, 1e-6f, out.View()}, stream());
        std::vector<float> expected(x.size());
        cpu::GatedRmsNorm({FloatMatrix(x.data(), rows, width), FloatMatrix(gate.data(), rows, width), weight.data(), head_dim,
                           1e-6f, FloatMatrix(expected.data(), rows, width)},
                          pool);
        const std::vector<float> actual = out.Values();
        for (size_t i = 0; i < actual.size(); ++i) {
          ASSERT_NEAR(actual[i], expected[i],
                      ((kGatedUnits + kGatedCpuUnits) * kUnit + StorageUnit(out_dtype)) * std::fabs(expected[i]))
              << "value " << i;
        }
        EXPECT_TRUE(out.GapsUntouched() && device_x.GapsUntouched() && device_gate.GapsUntouched());
        if (dtype != out_dtype) continue;
        cuda::GatedRmsNorm({device_x.View(), device_gate.View(), device_weight.data(), head_dim, 1e-6f, device_x.View()},
                           stream());
        EXPECT_TRUE(SameBits(device_x.Values(), actual)) << "out may alias x";
      }
    }
  }
}

TEST_F(GatedRmsNormCudaTest, NanStaysInItsHead) {
  constexpr int64_t kDim = 24, kHeads = 5, kRows = 3, kWidth = kDim * kHeads;
  Random random(3);
  std::vector<float> x = random.Normals(kRows * kWidth);
  const std::vector<float> gate = random.Normals(kRows * kWidth);
  const DeviceArray<float> weight(random.Normals(kDim));
  const auto norm = [&] {
    DeviceMatrix in(x, kRows, kWidth, DType::kFloat32), gates(gate, kRows, kWidth, DType::kFloat32),
        out(kRows, kWidth, DType::kFloat32);
    cuda::GatedRmsNorm({in.View(), gates.View(), weight.data(), kDim, 1e-6f, out.View()}, stream());
    return out.Values();
  };
  const std::vector<float> clean = norm();
  const int64_t head = (kWidth + 2 * kDim) / kDim;  // of all heads of all rows
  x[static_cast<size_t>(head * kDim + 9)] = kNan;
  const std::vector<float> poisoned = norm();
  for (int64_t h = 0; h < kRows * kHeads; ++h) {
    for (int64_t i = h * kDim; i < (h + 1) * kDim; ++i) {
      EXPECT_TRUE(h == head ? std::isnan(poisoned[i]) : SameBits(&poisoned[i], &clean[i], 1)) << "head " << h;
    }
  }
}

}  // namespace
}  // namespace bebop
