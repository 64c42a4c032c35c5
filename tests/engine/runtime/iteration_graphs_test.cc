// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/iteration_graphs.h"

#include <gtest/gtest.h>

#include <vector>

#include "kernels/scatter/scatter.h"
#include "tests/kernels/cuda_test_util.h"

namespace bebop::testing {
namespace {

class IterationGraphsTest : public CudaTest {};

TEST(IterationKeys, BucketsHoldTheirSequences) {
  int32_t sizes = 0;
  for (int32_t count = 1, last = 0; count <= 256; ++count) {
    const int32_t bucket = BatchBucket(count, 256);
    ASSERT_GE(bucket, count);
    EXPECT_LE(8 * (bucket - count), 3 * bucket) << count;
    if (count >= 9) {
      EXPECT_LE(3 * (bucket - count), bucket) << count;
    }
    if (count >= 129) {
      EXPECT_LE(5 * (bucket - count), bucket) << count;
    }
    sizes += bucket != last ? 1 : 0;
    last = bucket;
  }
  EXPECT_EQ(sizes, 16);
  EXPECT_EQ(BatchBucket(5, 6), 6);  // never more rows than the engine was sized for
  EXPECT_EQ(BatchBucket(257, 400), 320);
  EXPECT_EQ(BatchBucket(390, 400), 400);
}

TEST(IterationKeys, LengthClassesArePowersOfFour) {
  EXPECT_EQ(LengthClass(1, 1024, 40000), 1024);
  EXPECT_EQ(LengthClass(1024, 1024, 40000), 1024);
  EXPECT_EQ(LengthClass(1025, 1024, 40000), 4096);
  EXPECT_EQ(LengthClass(16385, 1024, 40000), 40000);
  EXPECT_EQ(LengthClass(50000, 1024, 40000), 40000);  // an overestimate
  EXPECT_EQ(LengthClass(10, 1024, 264), 264);
  EXPECT_EQ(LengthClass((1 << 30) + 1, 1024, 2147483647), 2147483647);
}

// First kernel by kernel, then captured, then replayed: the work is done each time.
TEST_F(IterationGraphsTest, EachRunDoesTheWork) {
  DeviceArray<uint32_t> counter(std::vector<uint32_t>{0, 0});
  const DeviceArray<uint32_t> words(std::vector<uint32_t>{7, 8});
  const DeviceArray<ScatterWrite> one(std::vector<ScatterWrite>{{counter.data(), 0, 1}}),
      other(std::vector<ScatterWrite>{{counter.data() + 1, 1, 1}});
  for (const bool enabled : {true, false}) {
    IterationGraphs graphs(enabled, &stream());
    int enqueued = 0;
    const auto run = [&](int32_t bucket, const DeviceArray<ScatterWrite>& writes) {
      counter.Upload({0, 0});
      graphs.Run({.bucket = bucket, .num_drafts = 1, .max_positions = 64}, [&] {
        ++enqueued;
        cuda::Scatter({.num_writes = 1, .writes = writes.data(), .words = words.data()}, stream());
      });
      return counter.Download();
    };
    const std::vector<uint32_t> first = {7, 0}, second = {0, 8};
    EXPECT_EQ(run(1, one), first);
    EXPECT_EQ(graphs.num_captured(), 0);
    EXPECT_EQ(run(1, one), first);
    EXPECT_EQ(run(2, other), second);
    EXPECT_EQ(run(1, one), first);
    EXPECT_EQ(run(2, other), second);
    EXPECT_EQ(run(2, other), second);
    EXPECT_EQ(run(1, one), first);
    EXPECT_EQ(graphs.num_captured(), enabled ? 2 : 0);
    EXPECT_EQ(enqueued, enabled ? 4 : 7);
  }
}

// Once addresses have changed, nothing that was captured before runs again: each key starts over, and the old graphs go one by one.
TEST_F(IterationGraphsTest, InvalidatedGraphsNeverRunAgain) {
  DeviceArray<uint32_t> counter(std::vector<uint32_t>{0});
  const DeviceArray<uint32_t> old_words(std::vector<uint32_t>{7}), new_words(std::vector<uint32_t>{9});
  const DeviceArray<ScatterWrite> writes(std::vector<ScatterWrite>{{counter.data(), 0, 1}});
  const uint32_t* words = old_words.data();
  IterationGraphs graphs(true, &stream(), 3);
  int enqueued = 0;
  const auto run = [&](int32_t bucket) {
    counter.Upload({0});
    graphs.Run({.bucket = bucket}, [&] {
      ++enqueued;
      cuda::Scatter({.num_writes = 1, .writes = writes.data(), .words = words}, stream());
    });
    EXPECT_LE(graphs.num_held(), 3);
    return counter.Download().front();
  };
  for (const bool all_at_once : {false, true}) {
    words = old_words.data();
    graphs.Clear();
    for (const int32_t bucket : {1, 1, 2, 2, 3, 3}) EXPECT_EQ(run(bucket), 7u);
    EXPECT_EQ(graphs.num_graphs(), 3);
    words = new_words.data();
    if (all_at_once) graphs.Clear();
    if (!all_at_once) graphs.Invalidate();
    EXPECT_EQ(graphs.num_graphs(), 0);
    EXPECT_EQ(graphs.num_held(), all_at_once ? 0 : 3);
    enqueued = 0;
    EXPECT_EQ(run(1), 9u);  // kernel by kernel
    EXPECT_EQ(graphs.num_held(), all_at_once ? 0 : 2);
    EXPECT_EQ(run(1), 9u);  // captured
    EXPECT_EQ(graphs.num_graphs(), 1);
    EXPECT_EQ(run(1), 9u);
    EXPECT_EQ(enqueued, 2);
    EXPECT_EQ(graphs.num_held(), 1);
  }
}

// A key that had run once starts over, too; and stale graphs with new ones are never more than the cap.
TEST_F(IterationGraphsTest, StaleGraphsGiveWayToNewOnes) {
  DeviceArray<uint32_t> counter(std::vector<uint32_t>{0});
  const DeviceArray<uint32_t> words(std::vector<uint32_t>{7});
  const DeviceArray<ScatterWrite> writes(std::vector<ScatterWrite>{{counter.data(), 0, 1}});
  IterationGraphs graphs(true, &stream(), 2);
  const auto run = [&](int32_t bucket) {
    graphs.Run({.bucket = bucket},
               [&] { cuda::Scatter({.num_writes = 1, .writes = writes.data(), .words = words.data()}, stream()); });
  };
  run(5);  // has run once when the others become stale: still, it starts over
  for (const int32_t bucket : {1, 1, 2, 2}) run(bucket);
  graphs.Invalidate();
  graphs.Invalidate();
  EXPECT_EQ(graphs.num_held(), 2);
  run(5);
  EXPECT_EQ(graphs.num_graphs(), 0);
  for (const int32_t bucket : {5, 1, 1, 2, 2}) {
    run(bucket);
    EXPECT_LE(graphs.num_held(), 2);
  }
  EXPECT_EQ(graphs.num_graphs(), 2);
  EXPECT_EQ(graphs.num_held(), 2);
  EXPECT_TRUE(stream().ok()) << stream().error();
}

// At most so many graphs: the one that ran longest ago gives way, and comes back when its key has come twice again.
TEST_F(IterationGraphsTest, TheOldestGivesWay) {
  DeviceArray<uint32_t> counter(std::vector<uint32_t>{0});
  const DeviceArray<uint32_t> words(std::vector<uint32_t>{7});
  const DeviceArray<ScatterWrite> writes(std::vector<ScatterWrite>{{counter.data(), 0, 1}});
  IterationGraphs graphs(true, &stream(), 2);
  // Whether the iteration was enqueued kernel by kernel or captured anew; a replay does neither.
  const auto enqueues = [&](int32_t bucket) {
    bool enqueued = false;
    counter.Upload({0});
    graphs.Run({.bucket = bucket}, [&] {
      enqueued = true;
      cuda::Scatter({.num_writes = 1, .writes = writes.data(), .words = words.data()}, stream());
    });
    EXPECT_EQ(counter.Download(), std::vector<uint32_t>{7});
    EXPECT_LE(graphs.num_graphs(), 2);
    return enqueued;
  };
  for (const int32_t bucket : {1, 1, 2, 2}) EXPECT_TRUE(enqueues(bucket));
  EXPECT_FALSE(enqueues(1));
  for (const int32_t bucket : {3, 3}) EXPECT_TRUE(enqueues(bucket));  // 2 ran longest ago
  EXPECT_EQ(graphs.num_captured(), 3);
  EXPECT_FALSE(enqueues(1));
  EXPECT_FALSE(enqueues(3));
  EXPECT_TRUE(enqueues(2));
  EXPECT_EQ(graphs.num_captured(), 3) << "once is too little";
  EXPECT_TRUE(enqueues(2));
  EXPECT_EQ(graphs.num_captured(), 4);
  EXPECT_FALSE(enqueues(3));
  EXPECT_FALSE(enqueues(2));
  EXPECT_EQ(graphs.num_graphs(), 2);
}

}  // namespace
}  // namespace bebop::testing
