// SPDX-License-Identifier: Apache-2.0
#include "kernels/scatter/scatter.h"

#include <numeric>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/cuda_test_util.h"

namespace bebop::testing {
namespace {

class ScatterCudaTest : public CudaTest {};

// Writes of 0, 1, 2 .. words, more than a block has threads, into places with gaps between them: the device's memory afterwards
// is the host's, gaps and all.
TEST_F(ScatterCudaTest, WritesWhatTheCpuWrites) {
  constexpr int32_t kLengths[] = {1, 2, 0, 127, 128, 129, 1, 700, 3};
  constexpr int32_t kNumWrites = static_cast<int32_t>(std::size(kLengths));
  constexpr int32_t kGap = 3;
  const int32_t total = std::accumulate(std::begin(kLengths), std::end(kLengths), 0);
  std::mt19937 random(5);
  std::vector<uint32_t> words(static_cast<size_t>(total));
  for (uint32_t& word : words) word = static_cast<uint32_t>(random());
  std::vector<uint32_t> expected(static_cast<size_t>(total + kNumWrites * kGap));
  for (uint32_t& word : expected) word = static_cast<uint32_t>(random());
  const DeviceArray<uint32_t> target(expected), source(words);

  std::vector<ScatterWrite> on_host, on_device;
  int32_t from = total, to = 0;  // sources backwards, so that no order is right by accident
  for (const int32_t length : kLengths) {
    from -= length;
    on_host.push_back({expected.data() + to, from, length});
    on_device.push_back({target.data() + to, from, length});
    to += length + kGap;
  }
  const DeviceArray<ScatterWrite> writes(on_device);
  cpu::Scatter({.num_writes = kNumWrites, .writes = on_host.data(), .words = words.data()});
  cuda::Scatter({.num_writes = kNumWrites, .writes = writes.data(), .words = source.data()}, stream());
  EXPECT_EQ(target.Download(), expected);
  EXPECT_TRUE(target.GuardsUntouched());
}

TEST_F(ScatterCudaTest, NoWritesAreNoLaunch) {
  cuda::Scatter({}, stream());
  EXPECT_TRUE(stream().ok()) << stream().error();
}

}  // namespace
}  // namespace bebop::testing
