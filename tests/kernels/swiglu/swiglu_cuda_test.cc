// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "kernels/swiglu/swiglu.h"
#include "tests/kernels/cuda_test_util.h"

namespace bebop {
namespace {

using testing::CudaTest;
using testing::DeviceMatrix;
using testing::kNan;
using testing::kUnit;
using testing::Random;
using testing::RoundToBFloat16;
using testing::SameBits;

class SwiGluCudaTest : public CudaTest {};

TEST_F(SwiGluCudaTest, AgreesWithTheCpu) {
  // exp is within 1 ulp (2 units) on the device and 2 ulp on the CPU; each rounds the sum, the quotient and the product once.
  constexpr double kUnits = (2 + 3) + (4 + 3);
  ThreadPool pool(1);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const int64_t cols : {8, 72, 2048, 2056}) {  // a block takes 2048
      const int64_t rows = 5;
      Random random(static_cast<uint64_t>(cols));
      std::vector<float> gate = random.Normals(rows * cols, 6.0f), up = random.Normals(rows * cols);
      gate[0] = 100.0f, gate[1] = -100.0f, gate[2] = 0.0f, gate[3] = -0.0f, gate[4] = kNan;
      if (dtype == DType::kBFloat16) gate = RoundToBFloat16(gate), up = RoundToBFloat16(up);
      // Columns of one wider product, as in the network.
      std::vector<float> both;
      for (int64_t r = 0; r < rows; ++r) {
        both.insert(both.end(), gate.begin() + r * cols, gate.begin() + (r + 1) * cols);
        both.insert(both.end(), up.begin() + r * cols, up.begin() + (r + 1) * cols);
      }
      DeviceMatrix product(both, rows, 2 * cols, dtype), out(rows, cols, dtype, 16);
      const TensorView view = product.View();
      cuda::SwiGlu({view.Columns(0, cols), view.Columns(cols, cols), out.View()}, stream());
      std::vector<float> expected(gate.size());
      cpu::SwiGlu(
          {FloatMatrix(gate.data(), rows, cols), FloatMatrix(up.data(), rows, cols), FloatMatrix(expected.data(), rows, cols)},
          pool);
      const std::vector<float> actual = out.Values();
      for (size_t i = 0; i < actual.size(); ++i) {
        if (i == 4) {
          EXPECT_TRUE(std::isnan(actual[i]));
          continue;
        }
        const double storage = dtype == DType::kFloat32 ? 0 : 0x1.01p-8;
        ASSERT_NEAR(actual[i], expected[i], (kUnits * kUnit + storage) * std::fabs(expected[i]) + 0x1.0p-126)
            << DTypeName(dtype) << " " << cols << ": value " << i;
      }
      EXPECT_TRUE(out.GapsUntouched() && product.GapsUntouched());
      cuda::SwiGlu({view.Columns(0, cols), view.Columns(cols, cols), view.Columns(0, cols)}, stream());
      const std::vector<float> in_place = product.Values();
      for (int64_t r = 0; r < rows; ++r) {
        EXPECT_TRUE(SameBits(&in_place[r * 2 * cols], &actual[r * cols], cols)) << "out may alias gate";
        EXPECT_TRUE(SameBits(&in_place[(r * 2 + 1) * cols], &up[r * cols], cols));
      }
    }
  }
}

TEST_F(SwiGluCudaTest, NoRowsAreNoWork) {
  const TensorView empty = {nullptr, DType::kBFloat16, 0, 16, 16};
  cuda::SwiGlu({empty, empty, empty}, stream());
}

}  // namespace
}  // namespace bebop
