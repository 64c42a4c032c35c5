// SPDX-License-Identifier: Apache-2.0
#include "kernels/linear/linear_backward.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/kernels/cuda_test_util.h"

namespace bebop {
namespace {

using testing::CudaTest;
using testing::DeviceArray;
using testing::DeviceMatrix;
using testing::kUnit;
using testing::Random;
using testing::RoundToBFloat16;
using testing::SameBits;

struct Shape {
  int64_t n, k, t;
};
// T is no multiple of 8 but once, and on both sides of where our own kernel hands over to cuBLASLt.
constexpr Shape kShapes[] = {{8, 16, 1}, {40, 72, 13}, {24, 256, 32}, {136, 8, 33}, {72, 40, 64}, {16, 24, 131}};

std::vector<float> SmallIntegers(Random& random, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = static_cast<float>(random.Below(9) - 4);
  return values;
}

class LinearBackwardCudaTest : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    plans_ = std::make_unique<cuda::LinearPlans>(&stream());
    operands_ = std::make_unique<DeviceArray<BFloat16>>(2 * kOperandValues);
    scratch_ = {.operands = {operands_->data(), operands_->data() + kOperandValues}, .bytes = kOperandValues * 2};
  }
  void TearDown() override {
    plans_.reset();
    if (operands_ != nullptr) {
      EXPECT_TRUE(operands_->GuardsUntouched());
    }
    operands_.reset();
    CudaTest::TearDown();
  }

  static constexpr int64_t kOperandValues = 128 * 1024;
  std::unique_ptr<cuda::LinearPlans> plans_;
  std::unique_ptr<DeviceArray<BFloat16>> operands_;
  cuda::LinearBackwardScratch scratch_;
};

// Small integers are bf16, and their sums are exact in any order, so that every product counts: dW against the CPU.
TEST_F(LinearBackwardCudaTest, WeightGradientsOfIntegersAreExact) {
  ThreadPool pool(1);
  cpu::LinearBackwardScratch host_scratch;
  for (const auto& [n, k, t] : kShapes) {
    Random random(static_cast<uint64_t>(n + k + t));
    std::vector<float> x = SmallIntegers(random, t * k), dy = SmallIntegers(random, t * n), start = SmallIntegers(random, n * k);
    for (const bool accumulate : {false, true}) {
      std::vector<float> expected = start;
      cpu::LinearBackwardWeight(
          {FloatMatrix(x.data(), t, k), FloatMatrix(dy.data(), t, n), accumulate, FloatMatrix(expected.data(), n, k)},
          host_scratch, pool);
      // Of both dtypes, in wider rows: columns of a fused matrix.
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
        SCOPED_TRACE(::testing::Message() << n << " x " << k << " x " << t << " " << DTypeName(dtype) << " " << accumulate);
        DeviceMatrix device_x(x, t, k, dtype, 24), device_dy(dy, t, n, dtype), dw(start, n, k, DType::kFloat32, 16);
        cuda::LinearBackwardWeight({device_x.View(), device_dy.View(), accumulate, dw.View()}, *plans_, scratch_, stream());
        EXPECT_EQ(dw.Values(), expected);
        EXPECT_TRUE(dw.GapsUntouched() && device_x.GapsUntouched());
      }
    }
  }
}

// y = x Wᵀ and dx = dy W of one float32 matrix, packed both ways.
TEST_F(LinearBackwardCudaTest, ProductsWithBothPackingsAreExact) {
  for (const auto& [n, k, t] : kShapes) {
    SCOPED_TRACE(::testing::Message() << n << " x " << k << " x " << t);
    Random random(static_cast<uint64_t>(n * k));
    const std::vector<float> x = SmallIntegers(random, t * k), dy = SmallIntegers(random, t * n),
                             w = SmallIntegers(random, n * k);
    const DeviceMatrix device_x(x, t, k, DType::kFloat32), device_dy(dy, t, n, DType::kFloat32, 24);
    const DeviceMatrix device_w(w, n, k, DType::kFloat32, 0);
    DeviceArray<BFloat16> packed(n * k), transposed(n * k);
    const PackedMatrix forward = cuda::PackBf16(device_w.View(), packed.data(), stream());
    const PackedMatrix backward = cuda::PackBf16Transposed(device_w.View(), transposed.data(), stream());
    EXPECT_TRUE(forward.rows == n && forward.cols == k && backward.rows == k && backward.cols == n);
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      DeviceMatrix y(t, n, dtype), dx(t, k, dtype, 16);
      cuda::LinearRounded({device_x.View(), forward, y.View()}, *plans_, scratch_, stream());
      cuda::LinearRounded({device_dy.View(), backward, dx.View()}, *plans_, scratch_, stream());
      std::vector<float> expected_y(static_cast<size_t>(t * n), 0.0f), expected_dx(static_cast<size_t>(t * k), 0.0f);
      for (int64_t row = 0; row < t; ++row) {
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t j = 0; j < k; ++j) {
            expected_y[static_cast<size_t>(row * n + i)] +=
                x[static_cast<size_t>(row * k + j)] * w[static_cast<size_t>(i * k + j)];
            expected_dx[static_cast<size_t>(row * k + j)] +=
                dy[static_cast<size_t>(row * n + i)] * w[static_cast<size_t>(i * k + j)];
          }
        }
      }
      EXPECT_EQ(y.Values(), dtype == DType::kFloat32 ? expected_y : RoundToBFloat16(expected_y));
      EXPECT_EQ(dx.Values(), dtype == DType::kFloat32 ? expected_dx : RoundToBFloat16(expected_dx));
      EXPECT_TRUE(y.GapsUntouched() && dx.GapsUntouched() && packed.GuardsUntouched() && transposed.GuardsUntouched());
    }
  }
}

// Operands are rounded once, to the nearest even: what the CPU makes of the rounded ones, up to the order of the float32 sum.
TEST_F(LinearBackwardCudaTest, RoundsItsOperandsOnce) {
  ThreadPool pool(1);
  cpu::LinearBackwardScratch host_scratch;
  constexpr int64_t kN = 40, kK = 24, kT = 77;
  Random random(5);
  const std::vector<float> x = random.Normals(kT * kK), dy = random.Normals(kT * kN);
  DeviceMatrix device_x(x, kT, kK, DType::kFloat32), device_dy(dy, kT, kN, DType::kFloat32), dw(kN, kK, DType::kFloat32);
  cuda::LinearBackwardWeight({device_x.View(), device_dy.View(), false, dw.View()}, *plans_, scratch_, stream());
  std::vector<float> rounded_x = RoundToBFloat16(x), rounded_dy = RoundToBFloat16(dy), expected(kN * kK), magnitude(kN * kK);
  cpu::LinearBackwardWeight({FloatMatrix(rounded_x.data(), kT, kK), FloatMatrix(rounded_dy.data(), kT, kN), false,
                             FloatMatrix(expected.data(), kN, kK)},
                            host_scratch, pool);
  for (float& value : rounded_x) value = std::fabs(value);
  for (float& value : rounded_dy) value = std::fabs(value);
  cpu::LinearBackwardWeight({FloatMatrix(rounded_x.data(), kT, kK), FloatMatrix(rounded_dy.data(), kT, kN), false,
                             FloatMatrix(magnitude.data(), kN, kK)},
                            host_scratch, pool);
  const std::vector<float> actual = dw.Values();
  // kT roundings of either sum; on a device the tensor cores' own, numerics.md.
  for (size_t i = 0; i < actual.size(); ++i) ASSERT_NEAR(actual[i], expected[i], 2 * (kT + 33) * kUnit * magnitude[i]) << i;
}

TEST_F(LinearBackwardCudaTest, NoRowsAddNothing) {
  const std::vector<float> start(8 * 16, 3.0f);
  DeviceMatrix dw(start, 8, 16, DType::kFloat32);
  const TensorView x = {nullptr, DType::kFloat32, 0, 16, 16}, dy = {nullptr, DType::kFloat32, 0, 8, 8};
  cuda::LinearBackwardWeight({x, dy, true, dw.View()}, *plans_, scratch_, stream());
  EXPECT_EQ(dw.Values(), start);
  cuda::LinearBackwardWeight({x, dy, false, dw.View()}, *plans_, scratch_, stream());
  EXPECT_EQ(dw.Values(), std::vector<float>(8 * 16, 0.0f));
  EXPECT_TRUE(dw.GapsUntouched());
}

TEST_F(LinearBackwardCudaTest, ConvertRoundsToNearestEvenAndBack) {
  for (const int64_t width : {8, 72, 2056}) {
    Random random(static_cast<uint64_t>(width));
    const std::vector<float> values = random.Normals(3 * width);
    const DeviceMatrix from(values, 3, width, DType::kFloat32, 24);
    DeviceMatrix rounded(3, width, DType::kBFloat16), back(3, width, DType::kFloat32, 16);
    cuda::Convert(from.View(), rounded.View(), stream());
    cuda::Convert(rounded.View(), back.View(), stream());
    EXPECT_TRUE(SameBits(back.Values(), RoundToBFloat16(values)));
    EXPECT_TRUE(rounded.GapsUntouched() && back.GapsUntouched());
  }
}

}  // namespace
}  // namespace bebop
