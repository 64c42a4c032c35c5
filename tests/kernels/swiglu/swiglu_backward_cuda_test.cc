// SPDX-License-Identifier: Apache-2.0
#include "kernels/swiglu/swiglu_backward.h"

#include <gtest/gtest.h>

#include "tests/kernels/cuda_test_util.h"

namespace bebop {
namespace {

using testing::CudaTest;
using testing::DeviceMatrix;
using testing::kUnit;
using testing::Random;
using testing::SameBits;

class SwiGluBackwardCudaTest : public CudaTest {};

TEST_F(SwiGluBackwardCudaTest, AgreesWithTheCpuAndMayOverwriteItsInputs) {
  ThreadPool pool(1);
  for (const int64_t width : {8, 72, 2056}) {
    const int64_t rows = 5;
    Random random(static_cast<uint64_t>(width));
    std::vector<float> gate = random.Normals(rows * width, 6.0f), up = random.Normals(rows * width),
                       dout = random.Normals(rows * width);
    gate[0] = 200.0f, gate[1] = -200.0f, gate[2] = 0.0f;  // where the exponential is 0 or infinite
    std::vector<float> expected[3];
    for (auto& values : expected) values.resize(gate.size());
    const auto host = [&](std::vector<float>& values) { return FloatMatrix(values.data(), rows, width); };
    cpu::SwiGluBackward({host(gate), host(up), host(dout), host(expected[0]), host(expected[1]), host(expected[2])}, pool);

    DeviceMatrix inputs[3] = {
        {gate, rows, width, DType::kFloat32}, {up, rows, width, DType::kFloat32, 24}, {dout, rows, width, DType::kFloat32, 16}};
    DeviceMatrix outputs[3] = {
        {rows, width, DType::kFloat32}, {rows, width, DType::kFloat32, 24}, {rows, width, DType::kFloat32}};
    cuda::SwiGluBackward(
        {inputs[0].View(), inputs[1].View(), inputs[2].View(), outputs[0].View(), outputs[1].View(), outputs[2].View()},
        stream());
    std::vector<float> values[3];
    for (int j = 0; j < 3; ++j) values[j] = outputs[j].Values();
    // Exponential (2 units either side), sum and quotient make the sigmoid's error, which 1 - sigmoid has as an absolute one;
    // then at most six products and sums.
    for (size_t i = 0; i < gate.size(); ++i) {
      const double slope = 1.0 / (1.0 + std::exp(-double{gate[i]})) * (1.0 + std::fabs(double{gate[i]}));
      ASSERT_NEAR(values[0][i], expected[0][i], 16 * kUnit * std::fabs(dout[i] * up[i]) * slope + 1e-37) << i;
      ASSERT_NEAR(values[1][i], expected[1][i], 16 * kUnit * std::fabs(expected[1][i]) + 1e-37) << i;
      ASSERT_NEAR(values[2][i], expected[2][i], 16 * kUnit * std::fabs(expected[2][i]) + 1e-37) << i;
    }
    const TensorView in[3] = {inputs[0].View(), inputs[1].View(), inputs[2].View()};
    cuda::SwiGluBackward({in[0], in[1], in[2], in[0], in[1], in[2]}, stream());
    for (int j = 0; j < 3; ++j) {
      EXPECT_TRUE(SameBits(inputs[j].Values(), values[j])) << j;
      EXPECT_TRUE(inputs[j].GapsUntouched() && outputs[j].GapsUntouched());
    }
  }
}

TEST_F(SwiGluBackwardCudaTest, NoRowsAreNoWork) {
  const TensorView empty = {nullptr, DType::kFloat32, 0, 8, 8};
  cuda::SwiGluBackward({empty, empty, empty, empty, empty, empty}, stream());
}

}  // namespace
}  // namespace bebop
