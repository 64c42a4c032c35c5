// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "engine/memory/device_memory.h"
#include "engine/memory/model_state.h"
#include "kernels/common/cuda_stream.h"

namespace bebop {
namespace {

class CudaMemoryTest : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "this machine has no CUDA device";
    stream_ = std::make_unique<cuda::Stream>(cuda::StreamOptions{.workspace_bytes = 0});
    ASSERT_TRUE(stream_->ok()) << stream_->error();
    memory_ = MakeCudaMemory(stream_.get());
  }

  std::vector<char> Read(const void* data, int64_t bytes) {
    std::vector<char> host(static_cast<size_t>(bytes), 'x');
    memory_->CopyOut(host.data(), data, bytes);
    return host;
  }

  std::unique_ptr<cuda::Stream> stream_;
  std::unique_ptr<DeviceMemory> memory_;
};

TEST_F(CudaMemoryTest, MemoryIsZeroedAlignedAndGivenBack) {
  EXPECT_FALSE(memory_->is_host());
  constexpr int64_t kBytes = 64 << 20;
  const int64_t before = memory_->available_bytes();
  {
    const std::shared_ptr<void> memory = *memory_->Allocate(kBytes, "test");
    EXPECT_EQ(reinterpret_cast<uintptr_t>(memory.get()) % 256, 0u);
    EXPECT_LE(memory_->available_bytes(), before - kBytes);
    EXPECT_EQ(Read(memory.get(), 1000), std::vector<char>(1000, 0));
  }
  EXPECT_GT(memory_->available_bytes(), before - kBytes);  // others may use the device, too
}

TEST_F(CudaMemoryTest, CopiesAreInOrder) {
  const std::shared_ptr<void> first = *memory_->Allocate(5000, "test"), second = *memory_->Allocate(5000, "test");
  std::vector<char> host(5000);
  for (size_t i = 0; i < host.size(); ++i) host[i] = static_cast<char>(i * 7);
  const std::vector<char> original = host;
  memory_->CopyIn(first.get(), host.data(), 5000);
  std::fill(host.begin(), host.end(), 'y');  // the source may be reused at once
  memory_->Copy(second.get(), first.get(), 5000);
  memory_->CopyIn(first.get(), host.data(), 5000);
  EXPECT_EQ(Read(second.get(), 5000), original);
  EXPECT_EQ(Read(first.get(), 5000), host);
  EXPECT_TRUE(memory_->status().ok());
}

// Staging of weights: another thread fills memory on a stream of its own, and what it filled stays when that stream has gone.
TEST_F(CudaMemoryTest, AMemoryWithItsOwnStreamLeavesWhatItFilled) {
  const std::vector<char> host(5000, 'w');
  std::shared_ptr<void> filled;
  std::thread([&] {
    const auto own = MakeCudaMemory(std::make_unique<cuda::Stream>(cuda::StreamOptions{.workspace_bytes = 0}));
    std::shared_ptr<void> first;
    std::thread([&] { first = *own->Allocate(5000, "test"); }).join();
    std::thread([&] { own->CopyIn(first.get(), host.data(), 5000); }).join();
    filled = *own->Allocate(5000, "test");
    own->Copy(filled.get(), first.get(), 5000);
    char last = 0;
    own->CopyOut(&last, filled.get(), 1);
    EXPECT_EQ(last, 'w');
    EXPECT_TRUE(own->status().ok()) << own->status();
  }).join();
  EXPECT_EQ(Read(filled.get(), 5000), host);
  // The streams' errors are their own, too.
  cuda::Stream failed({.workspace_bytes = 0});
  failed.Fail("gone");
  EXPECT_TRUE(memory_->status().ok());
  filled.reset();
  EXPECT_TRUE(memory_->Allocate(100, "test").ok());
}

TEST_F(CudaMemoryTest, TooMuchIsResourceExhaustedAndHarmsNothing) {
  const auto memory = memory_->Allocate(int64_t{1} << 50, "KV pages of giants");
  ASSERT_EQ(memory.status().code(), absl::StatusCode::kResourceExhausted);
  const std::string message(memory.status().message());
  EXPECT_NE(message.find("KV pages of giants"), std::string::npos) << message;
  EXPECT_NE(message.find(std::to_string(int64_t{1} << 50)), std::string::npos) << message;
  EXPECT_TRUE(memory_->status().ok());
  EXPECT_TRUE(memory_->Allocate(100, "test").ok());
}

TEST_F(CudaMemoryTest, OtherThreadsMayCopyAndFree) {
  std::shared_ptr<void> memory = *memory_->Allocate(100, "test");
  const std::vector<char> host(100, 'a');
  std::thread([&] { memory_->CopyIn(memory.get(), host.data(), 100); }).join();
  EXPECT_EQ(Read(memory.get(), 100), host);
  std::thread([&] { memory.reset(); }).join();
  EXPECT_TRUE(memory_->status().ok());
}

TEST_F(CudaMemoryTest, CopyPageCopiesThatPageAlone) {
  ModelConfig config;
  config.layers = {LayerKind::kFullAttention, LayerKind::kLinearAttention};
  config.num_key_value_heads = 2;
  config.head_dim = 16;
  config.linear_num_key_heads = config.linear_num_value_heads = 1;
  config.linear_key_head_dim = config.linear_value_head_dim = 8;
  config.linear_conv_kernel_dim = 4;
  config.num_mtp_layers = 1;
  const ModelStateOptions options{.num_pages = 3, .page_tokens = 16, .num_slots = 2, .window = 2, .input_dtype = DType::kBFloat16};
  const auto storage = *ModelStateStorage::Create(config, options, memory_.get());
  EXPECT_EQ(storage->state().linear[0].input_dtype, DType::kBFloat16);
  constexpr int64_t kPageBytes = 2 * 16 * 16 * 2;
  for (const KvPagesView& pages : {storage->state().kv[0], storage->state().mtp_kv}) {
    for (void* array : {pages.k, pages.v}) {
      for (int page = 0; page < 3; ++page) {
        const std::vector<char> fill(kPageBytes, static_cast<char>('a' + page));
        memory_->CopyIn(static_cast<char*>(array) + page * kPageBytes, fill.data(), kPageBytes);
      }
    }
  }
  storage->CopyPage(2, 0);
  for (const KvPagesView& pages : {storage->state().kv[0], storage->state().mtp_kv}) {
    for (void* array : {pages.k, pages.v}) {
      const std::vector<char> all = Read(array, 3 * kPageBytes);
      for (int64_t i = 0; i < 3 * kPageBytes; ++i) ASSERT_EQ(all[static_cast<size_t>(i)], "cbc"[i / kPageBytes]) << i;
    }
  }
}

}  // namespace
}  // namespace bebop
