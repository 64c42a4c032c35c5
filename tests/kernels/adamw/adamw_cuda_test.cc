// SPDX-License-Identifier: Apache-2.0
#include "kernels/adamw/adamw.h"

#include <gtest/gtest.h>

#include "tests/kernels/cuda_test_util.h"

namespace bebop {
namespace {

using testing::CudaTest;
using testing::DeviceArray;
using testing::kUnit;
using testing::Random;
using testing::SameBits;

class AdamWCudaTest : public CudaTest {};

// Both sides compute in double and round each result once: equal but where a double next to a float's boundary rounds the other
// way (fused multiply-add), which is one unit in the last place.
TEST_F(AdamWCudaTest, AgreesWithTheCpuToTheLastPlace) {
  ThreadPool pool(1);
  for (const int64_t count : {1, 4, 1023, 2050}) {
    Random random(static_cast<uint64_t>(count));
    std::vector<float> parameters = random.Normals(count), first = random.Normals(count, 0.01f),
                       second = random.Normals(count, 1e-3f), gradients = random.Normals(count);
    for (float& value : second) value *= value;
    second[0] = 0.0f, first[0] = 0.0f, gradients[0] = 0.0f;  // epsilon alone below the line
    AdamWArgs args;
    args.count = count;
    args.clip = 0.37, args.rate = 3e-3, args.keep = 1.0 - 3e-3 * 0.1;
    args.first_correction = 1.0 - 0.9 * 0.9, args.second_correction = 1.0 - 0.999 * 0.999;
    DeviceArray<float> device_parameters(parameters), device_first(first), device_second(second);
    const DeviceArray<float> device_gradients(gradients);
    for (int step = 0; step < 2; ++step) {
      args.parameters = device_parameters.data(), args.first = device_first.data(), args.second = device_second.data();
      args.gradients = device_gradients.data();
      cuda::AdamWUpdate(args, stream());
      args.parameters = parameters.data(), args.first = first.data(), args.second = second.data(),
      args.gradients = gradients.data();
      cpu::AdamWUpdate(args, pool);
    }
    const auto near = [&](const std::vector<float>& actual, const std::vector<float>& expected, const char* what) {
      for (size_t i = 0; i < actual.size(); ++i)
        ASSERT_NEAR(actual[i], expected[i], 4 * kUnit * std::fabs(expected[i])) << what << i;
    };
    near(device_parameters.Download(), parameters, "parameter ");
    near(device_first.Download(), first, "first moment ");
    near(device_second.Download(), second, "second moment ");
    EXPECT_EQ(device_parameters.Download()[0], parameters[0]);
    EXPECT_TRUE(device_parameters.GuardsUntouched() && device_first.GuardsUntouched() && device_second.GuardsUntouched());
  }
}

TEST_F(AdamWCudaTest, SquaredNorm) {
  ThreadPool pool(1);
  for (const int64_t count : {0, 1, 7, 4096, 100003}) {  // blocks of 32768
    Random random(static_cast<uint64_t>(count));
    std::vector<float> values = random.Normals(count);
    if (count > 3) values[3] = 1e25f;  // its square is no float
    const DeviceArray<float> device_values(values);
    DeviceArray<double> result(2);
    cuda::SquaredNorm(device_values.data(), count, result.data(), stream());
    cuda::SquaredNorm(device_values.data(), count, result.data() + 1, stream());
    const double expected = cpu::SquaredNorm(values.data(), count, pool);
    const std::vector<double> actual = result.Download();
    EXPECT_NEAR(actual[0], expected, 1e-12 * expected);
    EXPECT_EQ(actual[0], actual[1]);
    EXPECT_TRUE(result.GuardsUntouched());
    if (count < 4096) continue;
    for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
      values.back() = bad;
      const DeviceArray<float> broken(values);
      cuda::SquaredNorm(broken.data(), count, result.data(), stream());
      EXPECT_FALSE(std::isfinite(result.Download()[0]));
    }
  }
}

// The sum of a short array whose doubles are exact, so that a value left out shows.
TEST_F(AdamWCudaTest, SquaredNormCountsEveryValueOnce) {
  std::vector<float> values(70001);
  double expected = 0.0;
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(i % 251 + 1);
    expected += double{values[i]} * values[i];
  }
  const DeviceArray<float> device_values(values);
  DeviceArray<double> result(1);
  cuda::SquaredNorm(device_values.data(), static_cast<int64_t>(values.size()), result.data(), stream());
  EXPECT_EQ(result.Download()[0], expected);
}

}  // namespace
}  // namespace bebop
