// SPDX-License-Identifier: Apache-2.0
// Weights that went to host memory and came back are what they were (I6): every byte, every digest, every view.
#include "engine/weights/offloaded_weights.h"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "engine/weights/dummy_weights.h"
#include "engine/weights/resident_tensor.h"
#include "engine/weights/weight_layout.h"
#include "kernels/common/thread_pool.h"
#include "tests/engine/weights/weight_test_util.h"
#include "tests/support/fake_device_memory.h"

namespace bebop {
namespace {

class OffloadedWeightsTest : public ::testing::TestWithParam<bool> {
 protected:
  OffloadedWeightsTest() {
    if (GetParam()) {
      memory_ = std::make_unique<test::FakeDeviceMemory>();
    } else {
      memory_ = MakeHostMemory();
    }
  }
  std::unique_ptr<ModelWeights> Load(DType dtype) {
    auto weights = MakeDummyWeights(config_, dtype, 5, pool_, memory_.get());
    EXPECT_TRUE(weights.ok()) << weights.status();
    (*weights)->version.target_step = 40;
    (*weights)->version.draft_step = 30;
    (*weights)->version.label = "run 7";
    return *std::move(weights);
  }

  const ModelConfig config_ = test::SmallConfig(/*tied=*/false);
  ThreadPool pool_{1};
  std::unique_ptr<DeviceMemory> memory_;
};

TEST_P(OffloadedWeightsTest, TheyComeBackAsTheyWere) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    std::unique_ptr<ModelWeights> weights = Load(dtype);
    const std::string bytes(static_cast<const char*>(weights->storage.get()), static_cast<size_t>(weights->storage_bytes));
    const WeightVersion version = weights->version;
    const int64_t layer_bytes = weights->layer_bytes, lm_head_bytes = weights->lm_head_bytes, mtp_bytes = weights->mtp_bytes;
    const std::weak_ptr<const void> arena = weights->storage;
    auto asleep = OffloadedWeights::Create(config_, *weights, memory_.get());
    ASSERT_TRUE(asleep.ok()) << asleep.status();
    EXPECT_EQ((*asleep)->version().target_digest, version.target_digest);
    // Whatever is written where they were: they are elsewhere.
    std::memset(const_cast<void*>(weights->storage.get()), 0x11, bytes.size());
    weights.reset();
    EXPECT_TRUE(arena.expired()) << "the copy must not keep the device's memory";

    for (int time = 0; time < 2; ++time) {  // each wake-up can be followed by another sleep
      auto back = (*asleep)->Restore(memory_.get());
      ASSERT_TRUE(back.ok()) << back.status();
      ASSERT_EQ((*back)->storage_bytes, static_cast<int64_t>(bytes.size()));
      EXPECT_EQ(std::memcmp((*back)->storage.get(), bytes.data(), bytes.size()), 0);
      EXPECT_EQ((*back)->layer_bytes, layer_bytes);
      EXPECT_EQ((*back)->lm_head_bytes, lm_head_bytes);
      EXPECT_EQ((*back)->mtp_bytes, mtp_bytes);
      EXPECT_EQ((*back)->mtp.has_value(), config_.num_mtp_layers > 0);
      EXPECT_EQ((*back)->layers.size(), config_.layers.size());
      EXPECT_EQ((*back)->version.target_step, 40);
      EXPECT_EQ((*back)->version.draft_step, 30);
      EXPECT_EQ((*back)->version.label, "run 7");
      const auto hashed = RecomputeVersion(config_, **back, memory_.get());
      ASSERT_TRUE(hashed.ok()) << hashed.status();
      EXPECT_EQ(hashed->target_digest, version.target_digest);
      EXPECT_EQ(hashed->draft_digest, version.draft_digest);
      ASSERT_EQ(hashed->tensors.size(), version.tensors.size());
      for (size_t i = 0; i < version.tensors.size(); ++i) EXPECT_EQ(hashed->tensors[i].digest, version.tensors[i].digest);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Memories, OffloadedWeightsTest, ::testing::Bool(),
                         [](const auto& info) { return info.param ? "Device" : "Host"; });

TEST(OffloadedWeightsFailureTest, ADeviceThatFailsSaysSo) {
  const ModelConfig config = test::SmallConfig(/*tied=*/false);
  ThreadPool pool(1);
  test::FakeDeviceMemory memory;
  auto weights = MakeDummyWeights(config, DType::kFloat32, 5, pool, &memory);
  ASSERT_TRUE(weights.ok());
  auto asleep = OffloadedWeights::Create(config, **weights, &memory);
  ASSERT_TRUE(asleep.ok());
  memory.Fail(absl::InternalError("device error: gone"));
  EXPECT_EQ((*asleep)->Restore(&memory).status(), absl::InternalError("device error: gone"));
  EXPECT_EQ(OffloadedWeights::Create(config, **weights, &memory).status(), absl::InternalError("device error: gone"));
}

}  // namespace
}  // namespace bebop
