// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/device_batch.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "tests/support/fake_device_memory.h"

namespace bebop {
namespace {

// Two sequences of 3 and 5 rows, the second with two drafts.
BatchBuilder Builder() {
  BatchBuilder builder;
  const std::vector<int32_t> first_pages = {7, 3}, second_pages = {11, 5, 2};
  builder.AddSequence(30, first_pages);
  for (uint32_t token = 100; token < 103; ++token) builder.AddRow(token);
  builder.last_sequence().state_dst = 4;
  builder.AddSequence(17, second_pages);
  for (uint32_t token = 200; token < 205; ++token) builder.AddRow(token);
  builder.last_sequence().num_known_rows = 3;
  builder.last_sequence().state_src = 1;
  return builder;
}

template <typename Value>
void ExpectArray(const Value* actual, const Value* expected, int64_t count) {
  EXPECT_EQ(std::memcmp(actual, expected, static_cast<size_t>(count) * sizeof(Value)), 0);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(actual) % 16, 0u);
}

TEST(DeviceBatchTest, ADeviceGetsACopyOfEveryArray) {
  test::FakeDeviceMemory memory;
  const auto batch = *DeviceBatch::Create(8, 2, 5, &memory);
  BatchBuilder builder = Builder();
  const BatchBuilder kept = Builder();
  batch->Upload(builder);
  builder.Clear();  // the copy is the batch's own
  const RaggedBatch& view = batch->View();
  const RaggedBatch expected = kept.View();
  EXPECT_EQ(view.num_rows, 8);
  EXPECT_EQ(view.num_sequences, 2);
  EXPECT_EQ(view.max_sequence_rows, 5);
  EXPECT_EQ(view.max_positions, 33);
  EXPECT_NE(view.sequences, expected.sequences);
  ExpectArray(batch->tokens(), kept.tokens(), 8);
  ExpectArray(view.row_sequence, expected.row_sequence, 8);
  ExpectArray(view.row_position, expected.row_position, 8);
  ExpectArray(view.sequences, expected.sequences, 2);
  ExpectArray(view.page_ids, expected.page_ids, 5);
  EXPECT_EQ(memory.num_copies(), 1);  // in one piece
}

TEST(DeviceBatchTest, BoundsAreThoseOfTheLatestUpload) {
  test::FakeDeviceMemory memory;
  const auto batch = *DeviceBatch::Create(8, 2, 5, &memory);
  batch->Upload(Builder());
  BatchBuilder small;
  small.AddSequence(2, {});
  small.AddRow(9);
  batch->Upload(small);
  EXPECT_EQ(batch->View().num_rows, 1);
  EXPECT_EQ(batch->View().max_sequence_rows, 1);
  EXPECT_EQ(batch->View().max_positions, 3);
  EXPECT_EQ(batch->tokens()[0], 9u);
}

TEST(DeviceBatchTest, InHostMemoryNothingIsCopied) {
  const auto memory = MakeHostMemory();
  const auto batch = *DeviceBatch::Create(8, 2, 5, memory.get());
  const BatchBuilder builder = Builder();
  batch->Upload(builder);
  EXPECT_EQ(batch->tokens(), builder.tokens());
  EXPECT_EQ(batch->View().sequences, builder.View().sequences);
  EXPECT_EQ(batch->View().max_sequence_rows, 5);
}

}  // namespace
}  // namespace bebop
