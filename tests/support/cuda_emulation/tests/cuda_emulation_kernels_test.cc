// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <thread>
#include <vector>

#include "cuda_emulation_control.h"
#include "device_array.h"
#include "good_kernels.h"
#include "kernels/common/dtype.h"

// Kernels that keep the rules compute what they should, in every order of threads and blocks, and no check complains.
namespace bebop::emulation_tests {
namespace {

constexpr uint64_t kSeeds = 12;

template <typename Test>
void InManyOrders(Test&& test) {
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    emulation::SetSeed(seed);
    SCOPED_TRACE(seed);
    test();
  }
}

std::vector<float> Integers(int n, int modulus, int offset) {
  std::vector<float> values(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) values[static_cast<size_t>(i)] = static_cast<float>(i * 7 % modulus - offset);
  return values;
}
std::vector<uint16_t> Halves(const std::vector<float>& values) {
  std::vector<uint16_t> halves;
  for (const float value : values) halves.push_back(ToBFloat16(value).bits);
  return halves;
}

TEST(Kernels, BlockReductions) {
  const int rows = 9, cols = 1003;
  const std::vector<float> values = Integers(rows * cols, 23, 11);
  std::vector<float> sums(rows, 0.0f);
  float total_sum = 0.0f;
  for (int row = 0; row < rows; ++row) {
    for (int col = 0; col < cols; ++col) sums[static_cast<size_t>(row)] += values[static_cast<size_t>(row * cols + col)];
    total_sum += sums[static_cast<size_t>(row)];
  }
  const DeviceArray<float> x(values), y(rows), partial_sums(rows), total(1);
  const DeviceArray<unsigned> ticket(std::vector<unsigned>{0});
  InManyOrders([&] {
    ASSERT_EQ(RowSums(x.data(), y.data(), rows, cols, nullptr), cudaSuccess);
    EXPECT_EQ(y.Read(), sums);
    ASSERT_EQ(TotalSum(x.data(), partial_sums.data(), ticket.data(), total.data(), rows, cols, nullptr), cudaSuccess);
    EXPECT_EQ(total.Read()[0], total_sum);
    EXPECT_EQ(ticket.Read()[0], 0u);
  });
}

TEST(Kernels, MatrixProducts) {
  const int m = 48, n = 24, k = 80;
  const std::vector<float> a = Integers(m * k, 13, 6), b = Integers(n * k, 11, 5);
  std::vector<float> by_rows(static_cast<size_t>(m * n)), by_cols(static_cast<size_t>(m * n));  // b as [n, k] and as [k, n]
  for (int row = 0; row < m; ++row) {
    for (int col = 0; col < n; ++col) {
      for (int i = 0; i < k; ++i) {
        by_rows[static_cast<size_t>(row * n + col)] += a[static_cast<size_t>(row * k + i)] * b[static_cast<size_t>(col * k + i)];
        by_cols[static_cast<size_t>(row * n + col)] += a[static_cast<size_t>(row * k + i)] * b[static_cast<size_t>(i * n + col)];
      }
    }
  }
  const DeviceArray<uint16_t> a_device(Halves(a)), b_device(Halves(b));
  const DeviceArray<float> c(static_cast<size_t>(m * n));
  InManyOrders([&] {
    ASSERT_EQ(ProductBf16(a_device.data(), b_device.data(), c.data(), m, n, k, nullptr), cudaSuccess);
    EXPECT_EQ(c.Read(), by_rows);
    ASSERT_EQ(ProductBf16Trans(a_device.data(), b_device.data(), c.data(), m, n, k, nullptr), cudaSuccess);
    EXPECT_EQ(c.Read(), by_cols);
  });
}

TEST(Kernels, Tf32IgnoresLowBits) {
  std::vector<float> a = Integers(16 * 8, 13, 6), b = Integers(8 * 8, 11, 5), expected(16 * 8, 0.0f);
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < 8; ++col) {
      for (int i = 0; i < 8; ++i)
        expected[static_cast<size_t>(row * 8 + col)] += a[static_cast<size_t>(row * 8 + i)] * b[static_cast<size_t>(col * 8 + i)];
    }
  }
  for (float& value : a) value = std::nextafter(value, 1000.0f * value);  // away from zero, in the last bit alone
  const DeviceArray<float> a_device(a), b_device(b), c(16 * 8);
  ASSERT_EQ(ProductTf32(a_device.data(), b_device.data(), c.data(), nullptr), cudaSuccess);
  EXPECT_EQ(c.Read(), expected);
}

TEST(Kernels, SyncWarpOrdersItsLanes) {
  const int blocks = 3;
  std::vector<int> in(static_cast<size_t>(blocks * 64)), expected(in.size());
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i * i % 37);
  for (size_t i = 0; i < in.size(); ++i) {
    for (size_t j = 0; j < 16; ++j) expected[i] += in[i / 16 * 16 + j];
  }
  const DeviceArray<int> in_device(in), out(in.size());
  InManyOrders([&] {
    ASSERT_EQ(HalfWarpSums(in_device.data(), out.data(), blocks, nullptr), cudaSuccess);
    EXPECT_EQ(out.Read(), expected);
  });
}

TEST(Kernels, AtomicsOfManyThreads) {
  std::vector<int> keys(1000);
  std::vector<unsigned> expected(32, 0);
  for (size_t i = 0; i < keys.size(); ++i) ++expected[static_cast<size_t>(keys[i] = static_cast<int>(i * i % 29))];
  const DeviceArray<int> keys_device(keys);
  InManyOrders([&] {
    const DeviceArray<unsigned> bins(std::vector<unsigned>(32, 0));
    ASSERT_EQ(Histogram(keys_device.data(), bins.data(), 1000, nullptr), cudaSuccess);
    EXPECT_EQ(bins.Read(), expected);
  });
}

TEST(Kernels, NeighboursShareWords) {
  const int blocks = 4;
  const DeviceArray<uint16_t> out(blocks * 63);
  std::vector<uint16_t> expected(blocks * 63);
  for (size_t i = 0; i < expected.size(); ++i) expected[i] = static_cast<uint16_t>(i);
  InManyOrders([&] {
    ASSERT_EQ(HalfWords(out.data(), blocks, nullptr), cudaSuccess);
    EXPECT_EQ(out.Read(), expected);
  });
}

TEST(Kernels, HostAndDeviceTalkThroughPinnedMemory) {
  int* words = nullptr;
  ASSERT_EQ(cudaMallocHost(reinterpret_cast<void**>(&words), 2 * sizeof(int)), cudaSuccess);
  volatile int* const flag = words;
  volatile int* const answer = words + 1;
  InManyOrders([&] {
    *flag = 0;
    *answer = 0;
    ASSERT_EQ(AnswerHost(flag, answer, nullptr), cudaSuccess);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    EXPECT_EQ(*answer, 0);
    *flag = 41;
    // The device gets on without being waited for.
    while (*answer == 0) std::this_thread::yield();
    EXPECT_EQ(*answer, 42);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  });
  EXPECT_EQ(cudaFreeHost(words), cudaSuccess);
}

TEST(Kernels, CollectivesOfAWarp) {
  const DeviceArray<int64_t> out(32 * kNumCollectives);
  InManyOrders([&] {
    ASSERT_EQ(Collectives(out.data(), nullptr), cudaSuccess);
    const std::vector<int64_t> all = out.Read();
    for (int lane = 0; lane < 32; ++lane) {
      SCOPED_TRACE(lane);
      const int64_t* results = all.data() + lane * kNumCollectives;
      EXPECT_EQ(results[0], 70);
      EXPECT_EQ(results[1], (lane / 8 * 8 + 3) * 10);
      EXPECT_EQ(results[2], (lane < 2 ? lane : lane - 2) * 10);
      EXPECT_EQ(results[3], (lane % 16 < 2 ? lane : lane - 2) * 10);
      EXPECT_EQ(results[4], (lane > 26 ? lane : lane + 5) * 10);
      EXPECT_EQ(results[5], (lane % 8 > 2 ? lane : lane + 5) * 10);
      EXPECT_EQ(results[6], static_cast<int64_t>(lane ^ 9) << 40);
      EXPECT_EQ(results[7], 2 * (lane ^ 1));
      EXPECT_EQ(results[8], 0x49249249);
      EXPECT_EQ(results[9], 1);
      EXPECT_EQ(results[10], 1);
      EXPECT_EQ(results[11], 31 * 16 - 20 * 32);
      EXPECT_EQ(results[12], -20);
      EXPECT_EQ(results[13], 0xffffffff);
      EXPECT_EQ(results[14], lane % 2 == 0 ? 240 : 0);
      int64_t same = 0;
      for (int other = lane % 5; other < 32; other += 5) same |= int64_t{1} << other;
      EXPECT_EQ(results[15], same);
    }
  });
}

TEST(Kernels, ThreeDimensions) {
  InManyOrders([&] {
    for (const auto& [grid, block] :
         std::vector<std::pair<dim3, dim3>>{{dim3(3, 2, 4), dim3(8, 4, 2)}, {dim3(5), dim3(33)}, {dim3(1, 7), dim3(1, 1, 64)}}) {
      const size_t threads = size_t{grid.x} * grid.y * grid.z * block.x * block.y * block.z;
      const DeviceArray<unsigned> out(threads);
      ASSERT_EQ(Indices(out.data(), grid, block, nullptr), cudaSuccess);
      const std::vector<unsigned> values = out.Read();
      for (size_t i = 0; i < threads; ++i) ASSERT_EQ(values[i], i + 1);
    }
  });
}

// Prints what README.md quotes: processor time, which other work on the machine disturbs little.
double ProcessorSeconds() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

TEST(Kernels, SpeedForTheRecord) {
  const DeviceArray<float> data(65536);
  ASSERT_EQ(cudaMemset(data.data(), 0, 65536 * sizeof(float)), cudaSuccess);
  const auto seconds = [&](int kind, int rounds, int blocks) {
    const double start = ProcessorSeconds();
    EXPECT_EQ(Measure(kind, rounds, blocks, 256, data.data(), nullptr), cudaSuccess);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    return ProcessorSeconds() - start;
  };
  const char* const names[] = {"empty thread", "__syncthreads, a thread", "shuffle, a thread",
                               "mma, a warp",  "load of global memory",   "store to and load from shared memory"};
  seconds(1, 1, 1);
  for (int kind = 0; kind <= 5; ++kind) {
    const int rounds = kind == 0 ? 0 : 200, blocks = kind == 0 ? 400 : 10;
    const double units = kind == 0 ? 256.0 * blocks : 256.0 * blocks * rounds / (kind == 3 ? 32 : 1);
    const double each = seconds(kind, rounds, blocks) / units;
    std::printf("%s: %.1f ns\n", names[kind], each * 1e9);
    EXPECT_TRUE(std::isfinite(each));
  }
  const double start = ProcessorSeconds();
  for (int i = 0; i < 1000; ++i) ASSERT_EQ(Nothing(1, 32, 0, nullptr), cudaSuccess);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  std::printf("launch: %.1f us\n", (ProcessorSeconds() - start) * 1e3);
}

}  // namespace
}  // namespace bebop::emulation_tests
