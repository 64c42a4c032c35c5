// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <vector>

#include "cuda_emulation_control.h"
#include "planted_bugs.h"

// Each planted bug ends the process with its complaint, whatever the order of threads.
namespace bebop::emulation_tests {
namespace {

class PlantedBug : public testing::TestWithParam<int> {};

TEST_P(PlantedBug, IsCaughtInEveryOrder) {
  const Bug& bug = kBugs[GetParam()];
  float* data = nullptr;
  uint16_t* halves = nullptr;
  BugArguments arguments;
  std::vector<float> host(64);
  arguments.host = host.data();
  ASSERT_EQ(cudaMalloc(reinterpret_cast<void**>(&data), 256 * sizeof(float)), cudaSuccess);
  ASSERT_EQ(cudaMalloc(reinterpret_cast<void**>(&halves), 4096 * sizeof(uint16_t)), cudaSuccess);
  ASSERT_EQ(cudaMalloc(reinterpret_cast<void**>(&arguments.freed), 1024), cudaSuccess);
  ASSERT_EQ(cudaMallocHost(reinterpret_cast<void**>(&arguments.pinned), 64 * sizeof(float)), cudaSuccess);
  ASSERT_EQ(cudaMalloc(reinterpret_cast<void**>(&arguments.counter), sizeof(unsigned)), cudaSuccess);
  ASSERT_EQ(cudaMemset(data, 0, 256 * sizeof(float)), cudaSuccess);
  ASSERT_EQ(cudaMemset(halves, 0, 4096 * sizeof(uint16_t)), cudaSuccess);
  ASSERT_EQ(cudaMemset(arguments.counter, 0, sizeof(unsigned)), cudaSuccess);
  ASSERT_EQ(cudaFree(arguments.freed), cudaSuccess);
  arguments.data = data;
  arguments.halves = halves;
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    EXPECT_DEATH(
        {
          emulation::SetSeed(seed);
          emulation::SetSpinLimit(0.1);
          const cudaError_t error = bug.launch(arguments, nullptr);
          cudaDeviceSynchronize();
          fprintf(stderr, "launched: %s\n", cudaGetErrorName(error));
        },
        bug.complaint)
        << "seed " << seed;
  }
  EXPECT_EQ(cudaFree(data), cudaSuccess);
  EXPECT_EQ(cudaFree(halves), cudaSuccess);
  EXPECT_EQ(cudaFreeHost(arguments.pinned), cudaSuccess);
  EXPECT_EQ(cudaFree(arguments.counter), cudaSuccess);
}

INSTANTIATE_TEST_SUITE_P(All, PlantedBug, testing::Range(0, kNumBugs),
                         [](const testing::TestParamInfo<int>& info) { return std::string(kBugs[info.param].name); });

}  // namespace
}  // namespace bebop::emulation_tests
