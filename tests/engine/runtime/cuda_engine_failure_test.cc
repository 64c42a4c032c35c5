// SPDX-License-Identifier: Apache-2.0
//
// A device that fails while the engine runs, which only an emulated one does on demand.
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "cuda_emulation_control.h"
#include "tests/engine/runtime/device_engine.h"

namespace bebop::test {
namespace {

TEST(CudaEngineFailureTest, WithoutADeviceItSaysSo) {
  emulation::SetDeviceCount(0);
  const absl::Status status = Engine::Create(SmallEngineOptions(DeviceName())).status();
  emulation::SetDeviceCount(1);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_EQ(status.message().find("device: " + DeviceName()), 0u) << status;
}

TEST(CudaEngineFailureTest, RunningOutOfMemoryNamesTheBudgets) {
  emulation::SetDeviceMemoryBytes(int64_t{300} << 20);  // of which the stream's workspace takes 256 MiB
  const absl::Status status = Engine::Create(SmallEngineOptions(DeviceName())).status();
  emulation::SetDeviceMemoryBytes(int64_t{16} << 30);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  for (const char* words : {"weights ", "workspace 268435456", "graphs 268435456", "lower max_num_seqs"}) {
    EXPECT_NE(status.message().find(words), absl::string_view::npos) << words << " is not in " << status;
  }
}

TEST(CudaEngineFailureTest, AFullDeviceIsResourceExhausted) {
  emulation::SetDeviceMemoryBytes(int64_t{10} << 20);
  const absl::Status status = Engine::Create(SmallEngineOptions(DeviceName())).status();
  emulation::SetDeviceMemoryBytes(int64_t{16} << 30);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_NE(status.message().find("268435456"), absl::string_view::npos) << status;
}

// The last one: what a failed device held is lost to this process.
TEST(CudaEngineFailureTest, AStickyErrorFailsWhatIsInFlightAndStays) {
  auto engine = Engine::Create(SmallEngineOptions(DeviceName()));
  ASSERT_TRUE(engine.ok()) << engine.status();
  const auto generate = std::make_shared<WaitingGenerate>();
  emulation::InjectStickyErrorAfter(60, cudaErrorIllegalAddress);  // some way into the first passes
  ASSERT_TRUE((*engine)->Submit(Request("long", {1, 2, 3}, 100), generate).ok());
  ScoreRequest request;
  request.token_ids = {1, 2, 3, 4, 5, 6};
  const auto score = std::make_shared<WaitingScore>();
  uint64_t handle = 0;
  const absl::Status submitted = (*engine)->SubmitScore(request, score, &handle);  // refused if the engine has failed already
  ASSERT_TRUE(generate->Wait());
  EXPECT_EQ(generate->status.code(), absl::StatusCode::kInternal) << generate->status;
  EXPECT_NE(generate->status.message().find("cuda"), absl::string_view::npos) << generate->status;  // the call that failed
  if (submitted.ok()) {
    ASSERT_TRUE(score->Wait());
    EXPECT_EQ(score->status.code(), absl::StatusCode::kInternal) << score->status;
  }
  EXPECT_EQ((*engine)->health().code(), absl::StatusCode::kInternal);
  // New work is refused: nothing comes back in this process.
  EXPECT_EQ((*engine)->Submit(Request("late", {1, 2, 3}, 5), std::make_shared<WaitingGenerate>()).code(), absl::StatusCode::kInternal);
  engine->reset();  // a failed device can be taken down
  emulation::InjectStickyError(cudaSuccess);
}

}  // namespace
}  // namespace bebop::test
