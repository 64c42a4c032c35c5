// SPDX-License-Identifier: Apache-2.0
//
// What happens when the device fails, which only an emulated one does on demand.
#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "cuda_emulation_control.h"
#include "engine/memory/device_memory.h"
#include "kernels/common/cuda_stream.h"

namespace bebop {
namespace {

TEST(CudaFailureTest, AFailedDeviceStaysFailedAndSaysWhere) {
  cuda::Stream stream({.workspace_bytes = 0});
  ASSERT_TRUE(stream.ok()) << stream.error();
  const auto memory = MakeCudaMemory(&stream);
  const std::shared_ptr<void> data = *memory->Allocate(16, "test");
  emulation::InjectStickyError(cudaErrorIllegalAddress);
  std::vector<char> host(16, 'a');
  memory->CopyOut(host.data(), data.get(), 16);
  const absl::Status status = memory->status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_NE(status.message().find("cuda"), absl::string_view::npos) << status;                // the call
  EXPECT_NE(status.message().find("cuda_memory.cc:"), absl::string_view::npos) << status;     // its place
  EXPECT_EQ(memory->Allocate(16, "test").status().code(), absl::StatusCode::kInternal);
  emulation::InjectStickyError(cudaSuccess);
  EXPECT_EQ(memory->status(), status);  // the first error stays
}

}  // namespace
}  // namespace bebop
