// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/staging.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/memory/device_memory.h"
#include "engine/runtime/pinned_memory.h"
#include "engine/runtime/record_ring.h"
#include "tests/kernels/cuda_test_util.h"

namespace bebop::testing {
namespace {

class StagingTest : public CudaTest {
 protected:
  std::unique_ptr<Staging> Make(int64_t bytes, int32_t max_writes) {
    memory_ = MakeCudaMemory(&stream());
    auto staging = Staging::Create(bytes, max_writes, memory_.get(), &stream());
    EXPECT_TRUE(staging.ok()) << staging.status();
    return *std::move(staging);
  }
  std::unique_ptr<DeviceMemory> memory_;
};

// Many steps are enqueued before any has run: what a step brought is what its copies see, though the host fills two buffers in turns.
TEST_F(StagingTest, EveryStepBringsItsOwnValues) {
  constexpr int32_t kSteps = 7;
  const auto staging = Make(256, 4);
  DeviceArray<uint32_t> written(std::vector<uint32_t>(kSteps * 3, 99)), copied(std::vector<uint32_t>(kSteps, 99)),
      added(std::vector<uint32_t>(kSteps * 2, 99));
  for (uint32_t step = 0; step < kSteps; ++step) {
    staging->Begin();
    uint32_t* on_device = nullptr;
    uint32_t* const values = staging->Add<uint32_t>(2, &on_device);
    values[0] = 100 + step;
    values[1] = 200 + step;
    const uint32_t words[2] = {300 + step, 400 + step};
    staging->Write(written.data() + 3 * step, words, sizeof(words));
    staging->Write(written.data() + 3 * step + 2, &step, sizeof(step));
    staging->Write(written.data(), words, 0);  // nothing
    staging->Upload();
    BEBOP_CUDA_TRY(stream(), cudaMemcpyAsync(added.data() + 2 * step, on_device, 8, cudaMemcpyDeviceToDevice, stream().handle()));
    const uint32_t late = 500 + step;
    staging->CopyNow(copied.data() + step, &late, sizeof(late));
    staging->End();
  }
  const std::vector<uint32_t> in = written.Download(), late = copied.Download(), arrays = added.Download();
  for (uint32_t step = 0; step < kSteps; ++step) {
    EXPECT_EQ(in[3 * step], 300 + step);
    EXPECT_EQ(in[3 * step + 1], 400 + step);
    EXPECT_EQ(in[3 * step + 2], step);
    EXPECT_EQ(arrays[2 * step], 100 + step);
    EXPECT_EQ(arrays[2 * step + 1], 200 + step);
    EXPECT_EQ(late[step], 500 + step);
  }
  EXPECT_TRUE(written.GuardsUntouched() && copied.GuardsUntouched());
  EXPECT_TRUE(stream().ok()) << stream().error();
}

TEST_F(StagingTest, HoldsAllThatItWasMadeFor) {
  const auto staging = Make(64, 1);
  DeviceArray<uint32_t> target(std::vector<uint32_t>(64, 0));
  const std::vector<uint32_t> values(64, 1);
  staging->Begin();
  staging->Write(target.data(), values.data(), 64);  // exactly full
  staging->Upload();
  staging->End();
  EXPECT_EQ(target.Download()[15], 1u);
  EXPECT_EQ(target.Download()[16], 0u);
}

using RecordRingTest = StagingTest;

// More passes than the ring has entries: each finds its own records, and a number that has arrived stays arrived.
TEST_F(RecordRingTest, PassesFollowOneAnotherThroughTheRing) {
  memory_ = MakeCudaMemory(&stream());
  auto made = RecordRing::Create(3, memory_.get(), &stream());
  ASSERT_TRUE(made.ok()) << made.status();
  RecordRing& ring = **made;
  DeviceArray<StepRecord> records(std::vector<StepRecord>(3));
  DeviceArray<PassSequence> sequences(std::vector<PassSequence>(3));
  DeviceArray<SlotState> states(std::vector<SlotState>(3));
  SlotArrays slots;
  slots.states = states.data();
  PassArrays pass;
  pass.records = records.data();
  pass.sequences = sequences.data();
  for (uint64_t number = 1; number <= 2 * RecordRing::kEntries + 1; ++number) {
    pass.num_sequences = 1 + static_cast<int32_t>(number % 3);
    std::vector<StepRecord> values(3);
    for (int32_t b = 0; b < 3; ++b) values[static_cast<size_t>(b)].num_computed = static_cast<int32_t>(10 * number) + b;
    records.Upload(values);
    ASSERT_EQ(ring.Publish(slots, pass), number);
    EXPECT_EQ(ring.last_published(), number);
    ASSERT_TRUE(ring.Wait(number).ok());
    ASSERT_TRUE(ring.Wait(number).ok());
    ASSERT_EQ(ring.num_records(number), pass.num_sequences);
    for (int32_t b = 0; b < pass.num_sequences; ++b) {
      EXPECT_EQ(ring.Records(number)[b].num_computed, static_cast<int32_t>(10 * number) + b) << number;
    }
    if (number == 1) continue;
    EXPECT_EQ(ring.Records(number - 1)->num_computed, static_cast<int32_t>(10 * (number - 1))) << "kept";
  }
}

using PinnedMemoryTest = StagingTest;

TEST_F(PinnedMemoryTest, IsZeroedAndTheDeviceReachesIt) {
  const auto pinned = AllocatePinned(64, "test", &stream());
  ASSERT_TRUE(pinned.ok()) << pinned.status();
  for (int i = 0; i < 64; ++i) ASSERT_EQ(pinned->get()[i], 0) << i;
  const DeviceArray<uint32_t> values(std::vector<uint32_t>(16, 7));
  BEBOP_CUDA_TRY(stream(), cudaMemcpyAsync(pinned->get(), values.data(), 64, cudaMemcpyDeviceToHost, stream().handle()));
  ASSERT_EQ(cudaStreamSynchronize(stream().handle()), cudaSuccess);
  EXPECT_EQ(reinterpret_cast<const uint32_t*>(pinned->get())[15], 7u);
  EXPECT_TRUE(AllocatePinned(0, "nothing", &stream()).ok());
}

TEST_F(PinnedMemoryTest, ABrokenStreamSaysSo) {
  cuda::Stream broken({.workspace_bytes = 1 << 20});
  broken.Fail("lost");
  const auto pinned = AllocatePinned(64, "test", &broken);
  EXPECT_EQ(pinned.status().code(), absl::StatusCode::kInternal) << pinned.status();
  EXPECT_NE(pinned.status().message().find("lost"), absl::string_view::npos) << pinned.status();
}

}  // namespace
}  // namespace bebop::testing
