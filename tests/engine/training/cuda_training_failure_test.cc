// SPDX-License-Identifier: Apache-2.0
//
// A device that fails, or is too small, while the MTP layer trains: which only an emulated one does on demand.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>

#include "cuda_emulation_control.h"
#include "tests/engine/training/training_test_util.h"

namespace bebop {
namespace {

using testing::TrainerHarness;

ModelConfig SmallConfig() {
  ModelConfig config;
  config.hidden_size = 32;
  config.intermediate_size = 64;
  config.vocab_size = 64;
  config.layers = {LayerKind::kFullAttention};
  config.num_attention_heads = 2;
  config.num_key_value_heads = 1;
  config.head_dim = 16;
  config.rotary_dim = 8;
  config.num_mtp_layers = 1;
  config.max_position_embeddings = 256;
  return config;
}

TrainerOptions SmallOptions() {
  TrainerOptions options;
  options.num_steps_ahead = 2;
  options.batch_tokens = 16;
  return options;
}

// All that a trainer on the device stands on.
struct Device {
  explicit Device(const ModelConfig& config) : pool(1) {
    EngineOptions engine;
    engine.device = "emulated";
    backend = *MakeBackend(engine, &pool);
    ops = *MakeTrainingOps(backend.get(), &pool);
    weights = *MakeDummyWeights(config, DType::kBFloat16, /*seed=*/3, pool, backend->memory());
  }
  ThreadPool pool;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<TrainingOps> ops;
  std::unique_ptr<ModelWeights> weights;
};

TEST(CudaTrainingFailureTest, AFailedDeviceIsAnErrorOfTheStep) {
  const TrainerHarness host(SmallConfig(), DType::kBFloat16, 1);
  TrainingDocument document;
  for (uint32_t i = 0; i < 12; ++i) document.token_ids.push_back(i * 7 % 64);
  document.line = 1;
  const TrainingDocument* const batch[] = {&document};
  int64_t failed = 0;
  // In the target's pass, in the chain, in the losses, in the backward, in the optimizer: wherever so many operations lead.
  for (int64_t operations = 1;; operations += 1 + operations / 3) {
    Device device(SmallConfig());
    auto trainer = MtpTrainer::Create(SmallConfig(), device.weights.get(), device.backend.get(), device.ops.get(), SmallOptions(),
                                      host.parameters);
    ASSERT_TRUE(trainer.ok()) << trainer.status();
    emulation::InjectStickyErrorAfter(operations, cudaErrorIllegalAddress);
    const auto report = (*trainer)->Step(batch);
    const bool done = report.ok();
    if (!done) {
      ++failed;
      EXPECT_EQ(report.status().code(), absl::StatusCode::kInternal) << operations << ": " << report.status();
      EXPECT_EQ((*trainer)->Step(batch).status().code(), absl::StatusCode::kInternal) << "a failed device stays failed";
    }
    emulation::InjectStickyErrorAfter(int64_t{1} << 40, cudaErrorIllegalAddress);
    emulation::InjectStickyError(cudaSuccess);
    if (done) break;
  }
  EXPECT_GE(failed, 8);
}

TEST(CudaTrainingFailureTest, TooSmallADeviceSaysWhatTrainingTakes) {
  const TrainerHarness host(SmallConfig(), DType::kBFloat16, 1);
  {
    Device device(SmallConfig());
    const int64_t all = device.backend->memory()->available_bytes();
    // Enough for what is there already and half of the rest.
    const int64_t needed = MtpTrainer::Bytes(SmallConfig(), SmallOptions(), DType::kBFloat16, *device.backend, *device.ops);
    emulation::SetDeviceMemoryBytes(static_cast<size_t>((int64_t{16} << 30) - all + needed / 2));
    const auto trainer = MtpTrainer::Create(SmallConfig(), device.weights.get(), device.backend.get(), device.ops.get(),
                                            SmallOptions(), host.parameters);
    EXPECT_EQ(trainer.status().code(), absl::StatusCode::kResourceExhausted) << trainer.status();
    EXPECT_NE(trainer.status().message().find("copies of operands"), std::string::npos) << trainer.status();
  }
  emulation::SetDeviceMemoryBytes(size_t{16} << 30);
}

TEST(CudaTrainingFailureTest, BatchesThatAttentionCannotTakeAreRefused) {
  const TrainerHarness host(SmallConfig(), DType::kBFloat16, 1);
  ModelConfig config = SmallConfig();
  config.num_attention_heads = 16;
  Device device(SmallConfig());
  const int64_t most = device.ops->MaxRows(config);
  EXPECT_EQ(most, (int64_t{256} << 20) / (8 + 16 * 4));  // of the stream's workspace
  TrainerOptions options = SmallOptions();
  options.batch_tokens = most + 1;
  const absl::Status status =
      MtpTrainer::Create(config, device.weights.get(), device.backend.get(), device.ops.get(), options, host.parameters).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("(--batch-tokens): 3728271, but attention on this device takes at most 3728270"),
            std::string::npos)
      << status;
}

}  // namespace
}  // namespace bebop
