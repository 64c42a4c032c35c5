// SPDX-License-Identifier: Apache-2.0
#include "kernels/common/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/common/cpu_features.h"
#include "tests/support/allocation_counter.h"

namespace bebop {
namespace {

using Ranges = std::vector<std::pair<int64_t, int64_t>>;

Ranges RangesOf(ThreadPool& pool, int64_t count, int64_t grain) {
  std::mutex mutex;
  Ranges ranges;
  pool.ParallelFor(count, grain, [&](int64_t begin, int64_t end) {
    const std::lock_guard<std::mutex> lock(mutex);
    ranges.emplace_back(begin, end);
  });
  std::sort(ranges.begin(), ranges.end());
  return ranges;
}

TEST(ThreadPoolTest, RangesPartitionTheCountOnGrainBorders) {
  for (int threads : {1, 2, 3, 7}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.num_threads(), threads);
    for (int64_t count : {1, 2, 3, 5, 16, 17, 100, 1001}) {
      for (int64_t grain : {1, 2, 4, 16, 5000}) {
        const Ranges ranges = RangesOf(pool, count, grain);
        const int64_t units = (count + grain - 1) / grain;
        EXPECT_EQ(static_cast<int64_t>(ranges.size()), std::min<int64_t>(threads, units)) << count << " by " << grain;
        int64_t next = 0;
        for (const auto& [begin, end] : ranges) {
          EXPECT_EQ(begin, next);
          EXPECT_LT(begin, end);
          EXPECT_EQ(begin % grain, 0);
          // No range is more than a unit larger than another.
          EXPECT_LE(end - begin, (units / static_cast<int64_t>(ranges.size()) + 1) * grain);
          next = end;
        }
        EXPECT_EQ(next, count);
        EXPECT_EQ(ranges, RangesOf(pool, count, grain)) << "the split must not change from call to call";
      }
    }
  }
}

TEST(ThreadPoolTest, NothingToDoCallsNothing) {
  ThreadPool pool(3);
  EXPECT_TRUE(RangesOf(pool, 0, 1).empty());
  EXPECT_TRUE(RangesOf(pool, -5, 4).empty());
}

TEST(ThreadPoolTest, RangesRunOnDistinctThreadsAndOneOnTheCaller) {
  ThreadPool pool(3);
  std::mutex mutex;
  std::set<std::thread::id> ids;
  pool.ParallelFor(3, 1, [&](int64_t, int64_t) {
    const std::lock_guard<std::mutex> lock(mutex);
    ids.insert(std::this_thread::get_id());
  });
  EXPECT_EQ(ids.size(), 3u);
  EXPECT_TRUE(ids.contains(std::this_thread::get_id()));

  std::thread::id single;
  pool.ParallelFor(100, 100, [&](int64_t, int64_t) { single = std::this_thread::get_id(); });
  EXPECT_EQ(single, std::this_thread::get_id());
}

TEST(ThreadPoolTest, TakesBodiesOfEveryValueCategory) {
  ThreadPool pool(2);
  std::atomic<int64_t> sum{0};
  auto body = [&](int64_t begin, int64_t end) { sum += end - begin; };
  const auto const_body = body;
  pool.ParallelFor(10, 1, body);
  pool.ParallelFor(10, 1, const_body);
  pool.ParallelFor(10, 1, std::move(body));
  EXPECT_EQ(sum, 30);
}

// Plain (not atomic) memory goes from range to caller and from call to call: a race detector sees any missing edge, and a lost or
// early wake shows as a wrong sum.
TEST(ThreadPoolTest, EachCallSeesWhatTheCallBeforeWrote) {
  for (int threads : {2, 3, 5}) {
    ThreadPool pool(threads);
    std::vector<int64_t> values(static_cast<size_t>(threads) * 3, 0);
    const auto count = static_cast<int64_t>(values.size());
    int64_t expected = 0;
    for (int round = 0; round < 3000; ++round) {
      // The range borders move with the count, so values pass from one thread to another.
      const int64_t used = 1 + round % count;
      pool.ParallelFor(used, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) values[static_cast<size_t>(i)] += i + 1;
      });
      expected += used * (used + 1) / 2;
      int64_t sum = 0;
      for (const int64_t value : values) sum += value;
      ASSERT_EQ(sum, expected) << "round " << round << " with " << threads << " threads";
      // Now and then let the workers fall asleep.
      if (round % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }
}

TEST(ThreadPoolTest, WaitsForTheSlowestRange) {
  ThreadPool pool(3);
  for (int slow = 0; slow < 3; ++slow) {
    std::atomic<int> finished{0};
    pool.ParallelFor(3, 1, [&](int64_t begin, int64_t) {
      if (begin == slow) std::this_thread::sleep_for(std::chrono::milliseconds(20));
      ++finished;
    });
    EXPECT_EQ(finished, 3);
  }
}

TEST(ThreadPoolTest, CallsAllocateNothing) {
  ThreadPool pool(3);
  std::atomic<int64_t> sum{0};
  const auto run = [&] { pool.ParallelFor(9, 1, [&](int64_t begin, int64_t end) { sum += end - begin; }); };
  run();
  const int64_t before = test::NumAllocations();
  for (int i = 0; i < 100; ++i) run();
  EXPECT_EQ(test::NumAllocations(), before);
  EXPECT_EQ(sum, 909);
}

// Far more threads than processors: a pool whose waiters spin without bound would take seconds for this.
TEST(ThreadPoolTest, OversubscriptionStaysUsable) {
  ThreadPool pool(32);
  std::vector<int64_t> values(32, 0);
  const auto start = std::chrono::steady_clock::now();
  for (int round = 0; round < 200; ++round) {
    pool.ParallelFor(32, 1, [&](int64_t begin, int64_t) { ++values[static_cast<size_t>(begin)]; });
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
  EXPECT_EQ(values, std::vector<int64_t>(32, 200));
}

TEST(ThreadPoolTest, StartsAndStopsWithoutWork) {
  for (int i = 0; i < 50; ++i) ThreadPool pool(1 + i % 4);
}

TEST(CpuFeaturesTest, DetectionIsStableAndNamed) {
  const cpu::InstructionSet set = cpu::DetectInstructionSet();
  EXPECT_EQ(set, cpu::DetectInstructionSet());
  std::set<std::string> names;
  for (int i = 0; i <= static_cast<int>(cpu::InstructionSet::kAvx512Bf16); ++i) {
    names.insert(cpu::InstructionSetName(static_cast<cpu::InstructionSet>(i)));
  }
  EXPECT_EQ(names.size(), 4u);
  EXPECT_FALSE(names.contains("unknown"));
}

}  // namespace
}  // namespace bebop
