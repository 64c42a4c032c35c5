// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/memory/device_memory.h"
#include "engine/training/mtp_block.h"
#include "engine/training/mtp_trainer.h"
#include "tests/engine/training/training_test_util.h"
#include "tests/kernels/cuda_test_util.h"

// The MTP layer and the trainer on a device against the CPU, which autograd judges. Operators are tested by themselves, to the
// rounding; here are their wiring, and what they point to.
//
// Tolerances. A product rounds its operands to bf16: at most 2^-8 of the power of two below a value, evenly spread, which is
// 2^-8/√3 over 1.53 of it, rms 0.0015 of the values' own; a sum of independent terms keeps that, so a product has √2·0.0015 of
// the norm of its result. A step of the chain has seven products in a row (fc, qkv, scores, values, out, gate and up, down), its
// backward twice as many, and errors of different products add as squares. So hidden states of step k have √(7k)·0.0021,
// gradients of K steps √(21K)·0.0021 (0.017 for K = 3). Norms and the softmax amplify or damp, so bounds are twice that; wiring
// errors are of order 1.
namespace bebop {
namespace {

using testing::CudaTest;
using testing::Random;
using testing::SameBits;
using testing::TrainerHarness;

constexpr int32_t kSteps = 3;
constexpr double kProduct = 0.0021;
constexpr double kSlack = 2;

ModelConfig SmallConfig() {
  ModelConfig config;
  config.hidden_size = 40;
  config.intermediate_size = 56;
  config.vocab_size = 136;
  config.layers = {LayerKind::kLinearAttention, LayerKind::kFullAttention};
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 16;
  config.rotary_dim = 8;
  config.linear_num_key_heads = 2;
  config.linear_num_value_heads = 6;
  config.linear_key_head_dim = 24;
  config.linear_value_head_dim = 40;
  config.linear_conv_kernel_dim = 4;
  config.num_mtp_layers = 1;
  config.max_position_embeddings = 4096;
  return config;
}

// ‖a - b‖ / ‖b‖.
double RelativeError(const float* a, const float* b, int64_t count) {
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < count; ++i) {
    difference += std::pow(double{a[i]} - b[i], 2);
    norm += std::pow(double{b[i]}, 2);
  }
  return std::sqrt(difference / norm);
}

// Inputs of the MTP layer, and a run of it on any operators.
class BlockInputs {
 public:
  explicit BlockInputs(const std::vector<int64_t>& lengths) : config_(SmallConfig()), layout_(config_) {
    for (const int64_t length : lengths) {
      documents_.push_back({num_rows_, length});
      num_rows_ += length;
    }
    Random random(11);
    for (int32_t step = 1; step <= kSteps; ++step) {
      for (const DocumentRows& document : documents_) {
        for (int32_t row = 0; row < document.num_rows; ++row) positions_.push_back(row + step);
      }
    }
    for (size_t i = 0; i < positions_.size(); ++i) tokens_.push_back(static_cast<uint32_t>(random.Below(config_.vocab_size)));
    parameters_ = random.Normals(layout_.total, 0.2f);
    target_hidden_ = random.Normals(num_rows_ * config_.hidden_size);
    dhidden_ = random.Normals(kSteps * num_rows_ * config_.hidden_size);
    table_ = random.Normals(int64_t{config_.vocab_size} * config_.hidden_size);
  }

  const MtpLayout& layout() const { return layout_; }
  int64_t step_values() const { return num_rows_ * config_.hidden_size; }

  struct Result {
    std::vector<float> hidden, dhidden;  // [kSteps, R, H]
    std::vector<float> gradients;        // [layout.total]
  };
  Result Run(DeviceMemory& memory, TrainingOps& ops) const {
    std::vector<std::shared_ptr<void>> storage;
    const auto place = [&](int64_t bytes) {
      auto allocated = memory.Allocate(bytes, "test");
      BEBOP_CHECK(allocated.ok());
      storage.push_back(*allocated);
      return storage.back().get();
    };
    const auto upload = [&](const auto& values) {
      const auto bytes = static_cast<int64_t>(values.size() * sizeof(values[0]));
      void* const to = place(bytes);
      memory.CopyIn(to, values.data(), bytes);
      return to;
    };
    auto block = MtpBlock::Create(config_, num_rows_, kSteps, &memory, &ops);
    BEBOP_CHECK(block.ok());
    const TensorView table = FloatMatrix(static_cast<float*>(upload(table_)), config_.vocab_size, config_.hidden_size);
    const MtpBatch batch = {
        .documents = static_cast<const DocumentRows*>(upload(documents_)),
        .num_documents = static_cast<int32_t>(documents_.size()),
        .num_rows = num_rows_,
        .token_ids = static_cast<const uint32_t*>(upload(tokens_)),
        .row_position = static_cast<const int32_t*>(upload(positions_)),
        .target_hidden = FloatMatrix(static_cast<float*>(upload(target_hidden_)), num_rows_, config_.hidden_size),
        .embedding = ops.Pack(table, place(ops.PackedMatrixBytes(config_.vocab_size, config_.hidden_size)))};
    const auto* const parameters = static_cast<const float*>(upload(parameters_));
    auto* const dhidden = static_cast<float*>(upload(dhidden_));
    auto* const gradients = static_cast<float*>(place(layout_.total * static_cast<int64_t>(sizeof(float))));  // zeros
    (*block)->SetParameters(parameters);
    Result result = {std::vector<float>(dhidden_.size()), std::vector<float>(dhidden_.size()),
                     std::vector<float>(static_cast<size_t>(layout_.total))};
    std::vector<TensorView> views;
    for (int32_t step = 1; step <= kSteps; ++step) {
      (*block)->ForwardStep(batch, step);
      views.push_back(FloatMatrix(dhidden + (step - 1) * step_values(), num_rows_, config_.hidden_size));
      memory.CopyOut(result.hidden.data() + (step - 1) * step_values(), (*block)->hidden(step).data,
                     step_values() * static_cast<int64_t>(sizeof(float)));
    }
    (*block)->Backward(batch, kSteps, views.data(), gradients);
    memory.CopyOut(result.dhidden.data(), dhidden, static_cast<int64_t>(result.dhidden.size() * sizeof(float)));
    memory.CopyOut(result.gradients.data(), gradients, layout_.total * static_cast<int64_t>(sizeof(float)));
    EXPECT_TRUE(memory.status().ok()) << memory.status();
    return result;
  }

 private:
  const ModelConfig config_;
  const MtpLayout layout_;
  int64_t num_rows_ = 0;
  std::vector<DocumentRows> documents_;
  std::vector<int32_t> positions_;
  std::vector<uint32_t> tokens_;
  std::vector<float> parameters_, target_hidden_, dhidden_, table_;
};

class CudaTrainingTest : public CudaTest {};

TEST_F(CudaTrainingTest, TheBlockAgreesWithTheCpu) {
  const BlockInputs inputs({70, 5, 22});
  ThreadPool pool(1);
  const std::unique_ptr<DeviceMemory> host = MakeHostMemory(), device = MakeCudaMemory(&stream());
  const auto host_ops = MakeCpuTrainingOps(&pool);
  auto device_ops = MakeCudaTrainingOps(&stream());
  ASSERT_TRUE(device_ops.ok()) << device_ops.status();
  const BlockInputs::Result expected = inputs.Run(*host, *host_ops), actual = inputs.Run(*device, **device_ops);
  for (int32_t step = 1; step <= kSteps; ++step) {
    const int64_t at = (step - 1) * inputs.step_values();
    EXPECT_LE(RelativeError(actual.hidden.data() + at, expected.hidden.data() + at, inputs.step_values()),
              kSlack * kProduct * std::sqrt(7.0 * step))
        << "hidden states of step " << step;
    EXPECT_LE(RelativeError(actual.dhidden.data() + at, expected.dhidden.data() + at, inputs.step_values()),
              kSlack * kProduct * std::sqrt(21.0 * kSteps))
        << "gradients of the hidden states of step " << step;
  }
  for (const MtpTensor& tensor : inputs.layout().tensors) {
    EXPECT_LE(RelativeError(actual.gradients.data() + tensor.offset, expected.gradients.data() + tensor.offset, tensor.size()),
              kSlack * kProduct * std::sqrt(21.0 * kSteps))
        << tensor.name;
  }
  const BlockInputs::Result again = inputs.Run(*device, **device_ops);
  EXPECT_TRUE(SameBits(again.gradients, actual.gradients) && SameBits(again.hidden, actual.hidden));
}

struct Batch {
  std::vector<std::unique_ptr<TrainingDocument>> documents;
  std::vector<const TrainingDocument*> pointers;
};
Batch MakeBatch(const std::vector<std::pair<int32_t, int32_t>>& shapes) {
  Random random(17);
  Batch batch;
  for (const auto& [length, loss_start] : shapes) {
    auto document = std::make_unique<TrainingDocument>();
    for (int32_t i = 0; i < length; ++i)
      document->token_ids.push_back(static_cast<uint32_t>(random.Below(SmallConfig().vocab_size)));
    document->loss_start = loss_start;
    document->line = static_cast<int64_t>(batch.documents.size()) + 1;
    batch.pointers.push_back(document.get());
    batch.documents.push_back(std::move(document));
  }
  return batch;
}

// A trainer on the build's device, with the weights and the first parameters of `host`.
class DeviceTrainer {
 public:
  DeviceTrainer(TrainerHarness& host, DType dtype, const TrainerOptions& options) : pool_(1) {
    EngineOptions engine;
    engine.device = CheckDeviceName("emulated").ok() ? "emulated" : "cuda";
    auto backend = MakeBackend(engine, &pool_);
    BEBOP_CHECK(backend.ok());
    backend_ = *std::move(backend);
    backend_->EnterThread();
    auto ops = MakeTrainingOps(backend_.get(), &pool_);
    BEBOP_CHECK(ops.ok());
    ops_ = *std::move(ops);
    auto weights = MakeDummyWeights(host.config(), dtype, /*seed=*/3, pool_, backend_->memory());
    BEBOP_CHECK(weights.ok());
    weights_ = *std::move(weights);
    trainer = MtpTrainer::Create(host.config(), weights_.get(), backend_.get(), ops_.get(), options, host.parameters);
  }

 private:
  ThreadPool pool_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<TrainingOps> ops_;
  std::unique_ptr<ModelWeights> weights_;

 public:
  absl::StatusOr<std::unique_ptr<MtpTrainer>> trainer = absl::UnknownError("not made yet");
};

TEST_F(CudaTrainingTest, AStepAgreesWithTheCpu) {
  const Batch batch = MakeBatch({{40, 10}, {3, 0}, {25, 2}});
  for (const DraftLoss loss : {DraftLoss::kKl, DraftLoss::kEndToEndTotalVariation}) {
    TrainerOptions options;
    options.loss = loss;
    options.num_steps_ahead = kSteps;
    options.batch_tokens = 80;
    options.chunk_rows = 4 * 40;    // two chunks
    options.optimizer.beta1 = 0.0;  // so that the first moment is the gradient
    options.optimizer.clip_norm = 0.0;
    options.optimizer.learning_rate = 1e-3;
    TrainerHarness host(SmallConfig(), DType::kBFloat16, 1);
    DeviceTrainer device(host, DType::kBFloat16, options), again(host, DType::kBFloat16, options);
    auto expected = host.Make(options);
    ASSERT_TRUE(expected.ok() && device.trainer.ok() && again.trainer.ok()) << device.trainer.status();

    const auto expected_report = (*expected)->Step(batch.pointers), report = (*device.trainer)->Step(batch.pointers);
    ASSERT_TRUE(expected_report.ok() && report.ok()) << report.status();
    EXPECT_EQ(report->step, 1);
    EXPECT_EQ(report->tokens, 68);
    EXPECT_EQ(report->terms, expected_report->terms);
    EXPECT_EQ(report->rows, expected_report->rows);
    // Logits have a standard deviation of about 3 and are rounded to bf16, after a pass of the target in bf16: off by some 0.02
    // each, whose mean over terms and tokens is far smaller.
    EXPECT_NEAR(report->loss, expected_report->loss, 0.01 * std::fabs(expected_report->loss));
    EXPECT_NEAR(report->target_entropy, expected_report->target_entropy, 0.01);
    EXPECT_NEAR(report->draft_entropy, expected_report->draft_entropy, 0.01);
    EXPECT_NEAR(report->kl, expected_report->kl, 0.02 * expected_report->kl);
    for (size_t step = 0; step < kSteps; ++step) EXPECT_NEAR(report->acceptance[step], expected_report->acceptance[step], 0.005);

    // The gradient of the total variation jumps by q where q = p. With log-ratios spread over some units, errors of 0.02 move
    // about 0.02·√2·2/(4·√(2π)), 0.6 %, of the mass across, whose root is the share of the gradient's norm: 0.08 a row, before
    // the products.
    const double bound = loss == DraftLoss::kKl ? 0.06 : 0.25;
    EXPECT_NEAR(report->gradient_norm, expected_report->gradient_norm, bound * expected_report->gradient_norm);
    const MtpTrainer::State expected_state = (*expected)->state(), state = (*device.trainer)->state();
    EXPECT_LE(RelativeError(state.first_moment.data(), expected_state.first_moment.data(), (*expected)->layout().total), bound);
    for (const MtpTensor& tensor : (*expected)->layout().tensors) {
      EXPECT_LE(RelativeError(state.first_moment.data() + tensor.offset, expected_state.first_moment.data() + tensor.offset,
                              tensor.size()),
                2 * bound)
          << tensor.name;
    }
    // AdamW's first step without momentum is rate·g / (|g| + ε).
    for (size_t i = 0; i < state.parameters.size(); ++i) {
      const double gradient = state.first_moment[i];
      ASSERT_NEAR(state.parameters[i], host.parameters[i] - 1e-3 * gradient / (std::fabs(gradient) + 1e-8), 1e-6) << i;
    }
    // The second step, on what the first one left behind. Parameters whose gradient is nearly 0 went the other way by now.
    const auto second = (*device.trainer)->Step(batch.pointers), expected_second = (*expected)->Step(batch.pointers);
    ASSERT_TRUE(second.ok() && expected_second.ok());
    EXPECT_NEAR(second->loss, expected_second->loss, 0.02 * std::fabs(expected_second->loss));
    EXPECT_NEAR(second->gradient_norm, expected_second->gradient_norm, 2 * bound * expected_second->gradient_norm);
    EXPECT_LE(RelativeError((*device.trainer)->state().first_moment.data(), (*expected)->state().first_moment.data(),
                            (*expected)->layout().total),
              3 * bound);
    // Bits repeat, whatever the order of blocks and threads.
    ASSERT_TRUE((*again.trainer)->Step(batch.pointers).ok());
    const auto second_again = (*again.trainer)->Step(batch.pointers);
    ASSERT_TRUE(second.ok() && second_again.ok());
    EXPECT_EQ(second->loss, second_again->loss);
    EXPECT_LT(second->loss, report->loss);
    EXPECT_TRUE(SameBits((*device.trainer)->state().parameters, (*again.trainer)->state().parameters));
    // An evaluation moves nothing.
    const auto evaluation = (*again.trainer)->Evaluate(batch.pointers);
    ASSERT_TRUE(evaluation.ok());
    EXPECT_LT(evaluation->loss, second->loss);
    EXPECT_TRUE(SameBits((*device.trainer)->state().parameters, (*again.trainer)->state().parameters));
  }
}

TEST_F(CudaTrainingTest, WhatKernelsCannotTakeIsNamed) {
  const auto refused = [](const ModelConfig& config, DType dtype, const char* words) {
    TrainerHarness host(config, dtype, 1);
    TrainerOptions options;
    options.num_steps_ahead = 2;
    options.batch_tokens = 16;
    const DeviceTrainer device(host, dtype, options);
    EXPECT_EQ(device.trainer.status().code(), absl::StatusCode::kUnimplemented) << words;
    EXPECT_NE(device.trainer.status().message().find(words), std::string::npos) << device.trainer.status();
  };
  refused(SmallConfig(), DType::kFloat32, "dtype: float32");
  ModelConfig config = SmallConfig();
  config.vocab_size = 131;
  refused(config, DType::kBFloat16, "vocab_size: 131");
  config = SmallConfig();
  config.head_dim = 24;
  refused(config, DType::kBFloat16, "head_dim: 24");
}

}  // namespace
}  // namespace bebop
