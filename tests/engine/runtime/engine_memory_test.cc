// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/engine_memory.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "engine/model/model.h"
#include "engine/runtime/scorer.h"
#include "tests/engine/runtime/test_engine.h"

namespace bebop {
namespace {

constexpr int64_t kExecutorBytes = 5'000'000;

EngineOptions Options() {
  EngineOptions options;
  options.max_num_seqs = 16;
  options.max_draft_tokens = 3;
  options.max_step_tokens = 256;
  return options;
}

DeviceBudget Budget(int64_t free_bytes) {
  DeviceBudget budget;
  budget.free_bytes = free_bytes;
  budget.weight_bytes = 1'000'000;
  budget.workspace_bytes = 2'000'000;
  budget.graph_bytes = 3'000'000;
  budget.lookahead_tokens = 8;
  budget.executor_bytes = [](const EngineSizes&) { return kExecutorBytes; };
  return budget;
}

// What everything but the KV pages takes.
int64_t FixedBytes(const ModelConfig& config, const EngineSizes& sizes, const DeviceBudget& budget) {
  return budget.weight_bytes + budget.workspace_bytes + budget.graph_bytes + kExecutorBytes +
         SlotBytes(config, sizes.state) * sizes.scheduler.num_state_slots +
         Model::ActivationBytes(config, sizes.scheduler.max_step_tokens, DType::kBFloat16) +
         Scorer::DeviceBytes(config, sizes.scheduler.max_step_tokens, sizes.page_table_entries, DType::kBFloat16, DType::kBFloat16);
}

TEST(EngineMemoryTest, DevicePagesTakeWhatTheRestLeaves) {
  const ModelConfig config = test::SmallConfig();
  EngineOptions options = Options();
  options.gpu_memory_utilization = 0.5;
  const DeviceBudget budget = Budget(26'000'000);
  const auto sizes = ResolveDeviceSizes(options, config, budget);
  ASSERT_TRUE(sizes.ok()) << sizes.status();
  EXPECT_EQ(sizes->scheduler.page_tokens, 64);
  EXPECT_EQ(sizes->state.page_tokens, 64);
  EXPECT_EQ(sizes->scheduler.lookahead_tokens, 8);
  EXPECT_EQ(sizes->state.input_dtype, DType::kBFloat16);
  EXPECT_EQ(sizes->scheduler.score_bytes_per_token, 48 * 2);
  const int64_t page_bytes = PageBytes(config, sizes->state);
  const int64_t left = 13'000'000 - FixedBytes(config, *sizes, budget);
  ASSERT_GT(left, 20 * page_bytes);  // so that the next line says something
  ASSERT_LT(left / page_bytes, (512 + 3 + 2 + 63) / 64 * 17);  // nor are they all that sequences could use
  EXPECT_EQ(sizes->scheduler.num_pages, left / page_bytes);
  EXPECT_EQ(sizes->state.num_pages, sizes->scheduler.num_pages);
}

TEST(EngineMemoryTest, DeviceDefaultsAndMostPages) {
  const ModelConfig config = test::SmallConfig();
  const auto sizes = ResolveDeviceSizes(EngineOptions(), config, Budget(int64_t{1} << 36));
  ASSERT_TRUE(sizes.ok()) << sizes.status();
  EXPECT_EQ(sizes->scheduler.max_num_seqs, 256);
  EXPECT_EQ(sizes->scheduler.max_step_tokens, 8192);
  EXPECT_EQ(sizes->scheduler.max_score_step_tokens, 512);
  EXPECT_EQ(sizes->scheduler.num_pages, (512 + 8 + 2 + 63) / 64 * 257);  // no more than all sequences could use
}

TEST(EngineMemoryTest, TooLittleDeviceMemoryNamesEveryBudgetAndWhatToLower) {
  const ModelConfig config = test::SmallConfig();
  const DeviceBudget budget = Budget(10'000'000);
  const absl::Status status = ResolveDeviceSizes(Options(), config, budget).status();
  ASSERT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  const std::string message(status.message());
  const int64_t draft_bytes = 4 * 16 * 3 * 97;
  for (const std::string words :
       {"9000000", "0.9 of 10000000 free", "weights 1000000", "workspace 2000000", "graphs 3000000", "recurrent state ", "activations ", "scores ",
        "max_num_seqs", "max_step_tokens", "max_model_len", "gpu_memory_utilization"}) {
    EXPECT_NE(message.find(words), std::string::npos) << words << " is not in: " << message;
  }
  EXPECT_NE(message.find("draft logits " + std::to_string(draft_bytes)), std::string::npos) << message;
  EXPECT_NE(message.find("logits and arrays " + std::to_string(kExecutorBytes - draft_bytes)), std::string::npos) << message;
}

// A second set of weights has its room before KV pages have theirs, unless no update could use it.
TEST(EngineMemoryTest, RoomForNewWeightsComesBeforePages) {
  EngineOptions options = Options();
  EXPECT_EQ(StagingBytes(options, 1'000'000), 1'000'000);
  options.weight_staging_bytes = 5'000'000;
  EXPECT_EQ(StagingBytes(options, 1'000'000), 1'000'000);
  options.weight_staging_bytes = 1'000'000;
  EXPECT_EQ(StagingBytes(options, 1'000'000), 1'000'000);
  options.weight_staging_bytes = 999'999;
  EXPECT_EQ(StagingBytes(options, 1'000'000), 0);

  const ModelConfig config = test::SmallConfig();
  options.gpu_memory_utilization = 0.5;
  DeviceBudget budget = Budget(26'000'000);
  const auto all = ResolveDeviceSizes(options, config, budget);
  ASSERT_TRUE(all.ok()) << all.status();
  const int64_t page_bytes = PageBytes(config, all->state);
  budget.staging_bytes = 5 * page_bytes;
  const auto fewer = ResolveDeviceSizes(options, config, budget);
  ASSERT_TRUE(fewer.ok()) << fewer.status();
  EXPECT_EQ(fewer->scheduler.num_pages, all->scheduler.num_pages - 5);
  budget.staging_bytes = 20'000'000;
  const absl::Status none = ResolveDeviceSizes(options, config, budget).status();
  EXPECT_EQ(none.code(), absl::StatusCode::kResourceExhausted);
  for (const char* words : {"room for new weights 20000000", "weight_staging_bytes 1"}) {
    EXPECT_NE(none.message().find(words), absl::string_view::npos) << none;
  }
}

TEST(EngineMemoryTest, AskedKvBytesMustFitTheDevice) {
  const ModelConfig config = test::SmallConfig();
  EngineOptions options = Options();
  options.kv_cache_bytes = 20'000'000;
  const absl::Status too_much = ResolveDeviceSizes(options, config, Budget(24'000'000)).status();
  EXPECT_EQ(too_much.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(too_much.message().find("kv_cache_bytes: 20000000 are asked for"), std::string::npos) << too_much;
  EXPECT_NE(too_much.message().find(": lower kv_cache_bytes"), std::string::npos) << too_much;
  EngineOptions stingy = options;
  stingy.kv_cache_bytes = 10;
  const absl::Status too_little = ResolveDeviceSizes(stingy, config, Budget(100'000'000)).status();
  EXPECT_NE(too_little.message().find(": raise kv_cache_bytes"), std::string::npos) << too_little;
  const auto sizes = ResolveDeviceSizes(options, config, Budget(100'000'000));
  ASSERT_TRUE(sizes.ok()) << sizes.status();
  options.kv_cache_bytes = 400'000;
  const auto few = ResolveDeviceSizes(options, config, Budget(100'000'000));
  ASSERT_TRUE(few.ok()) << few.status();
  EXPECT_EQ(few->scheduler.num_pages, 400'000 / PageBytes(config, few->state));
}

TEST(EngineMemoryTest, UtilizationOutOfRangeIsInvalid) {
  const ModelConfig config = test::SmallConfig();
  for (const double share : {0.0, -0.5, 1.01, std::numeric_limits<double>::quiet_NaN()}) {
    EngineOptions options = Options();
    options.gpu_memory_utilization = share;
    const absl::Status status = ResolveDeviceSizes(options, config, Budget(100'000'000)).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << share;
    EXPECT_EQ(status.message().substr(0, 22), "gpu_memory_utilization") << status;
  }
}

TEST(EngineMemoryTest, HostSizesKeepTheirDefaults) {
  const auto sizes = ResolveSizes(EngineOptions(), test::SmallConfig(), int64_t{1} << 33);
  ASSERT_TRUE(sizes.ok()) << sizes.status();
  EXPECT_EQ(sizes->scheduler.page_tokens, 16);
  EXPECT_EQ(sizes->scheduler.max_num_seqs, 32);
  EXPECT_EQ(sizes->scheduler.max_step_tokens, 512);
  EXPECT_EQ(sizes->scheduler.lookahead_tokens, 0);
  EXPECT_EQ(sizes->state.input_dtype, DType::kFloat32);
  EXPECT_EQ(sizes->scheduler.score_bytes_per_token, 48 * 4);
}

}  // namespace
}  // namespace bebop
