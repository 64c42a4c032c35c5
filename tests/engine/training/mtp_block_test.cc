// SPDX-License-Identifier: Apache-2.0
#include "engine/training/mtp_block.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>
#include <string>

#include "tests/kernels/kernel_test_util.h"

// Gradients are judged by autograd in tests/oracle/gradient_test.py; here is what needs no oracle.
namespace bebop {
namespace {

using testing::Random;
using testing::SameBits;

constexpr int32_t kSteps = 3;

ModelConfig SmallConfig() {
  ModelConfig config;
  config.hidden_size = 40;
  config.intermediate_size = 56;
  config.vocab_size = 64;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 16;
  config.rotary_dim = 8;
  config.rope_theta = 1e4;
  return config;
}

// One set of inputs, and passes over it.
class Fixture {
 public:
  explicit Fixture(std::vector<int64_t> lengths) : config_(SmallConfig()), layout_(config_) {
    for (const int64_t length : lengths) {
      documents_.push_back({num_rows_, length});
      num_rows_ += length;
      for (int32_t row = 0; row < length; ++row) positions_.push_back(row + 1);
    }
    for (int64_t i = 0, rows = num_rows(); i < (kSteps - 1) * rows; ++i) positions_.push_back(positions_[static_cast<size_t>(i)] + 1);
    Random random(11);
    parameters = random.Normals(layout_.total, 0.3f);
    target_hidden = random.Normals(num_rows() * config_.hidden_size);
    dhidden = random.Normals(kSteps * num_rows() * config_.hidden_size);
    for (int64_t i = 0; i < kSteps * num_rows(); ++i) tokens.push_back(static_cast<uint32_t>(random.Below(config_.vocab_size)));
    const std::vector<float> table = random.Normals(int64_t{config_.vocab_size} * config_.hidden_size);
    const int64_t bytes = PackedBytes(DType::kFloat32, config_.vocab_size, config_.hidden_size);
    table_.reset(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(bytes))));
    ThreadPool pool(1);
    embedding_ = cpu::PackFloat(FloatMatrix(const_cast<float*>(table.data()), config_.vocab_size, config_.hidden_size),
                                table_.get(), pool);
  }

  int64_t num_rows() const { return num_rows_; }
  const MtpLayout& layout() const { return layout_; }
  int64_t row_floats() const { return config_.hidden_size; }

  struct Result {
    std::vector<float> hidden;     // [kSteps, R, H]
    std::vector<float> gradients;  // [layout.total]
    std::vector<float> dhidden;
  };
  Result Run(int threads, int64_t spare_rows = 0) {
    ThreadPool pool(threads);
    const std::unique_ptr<DeviceMemory> memory = MakeHostMemory();
    const std::unique_ptr<TrainingOps> ops = MakeCpuTrainingOps(&pool);
    auto block = MtpBlock::Create(config_, num_rows() + spare_rows, kSteps, memory.get(), ops.get());
    EXPECT_TRUE(block.ok()) << block.status();
    const MtpBatch batch = {.documents = documents_.data(),
                            .num_documents = static_cast<int32_t>(documents_.size()),
                            .num_rows = num_rows(),
                            .token_ids = tokens.data(),
                            .row_position = positions_.data(),
                            .target_hidden = FloatMatrix(target_hidden.data(), num_rows(), config_.hidden_size),
                            .embedding = embedding_};
    Result result;
    result.gradients.assign(static_cast<size_t>(layout_.total), 0.0f);
    result.dhidden = dhidden;
    (*block)->SetParameters(parameters.data());
    std::vector<TensorView> gradients;
    const int64_t size = num_rows() * config_.hidden_size;
    for (int32_t step = 1; step <= kSteps; ++step) {
      gradients.push_back(FloatMatrix(result.dhidden.data() + (step - 1) * size, num_rows(), config_.hidden_size));
      (*block)->ForwardStep(batch, step);
      const float* hidden = (*block)->hidden(step).Row<float>(0);
      result.hidden.insert(result.hidden.end(), hidden, hidden + size);
    }
    (*block)->Backward(batch, kSteps, gradients.data(), result.gradients.data());
    return result;
  }

  std::vector<float> parameters, target_hidden, dhidden;
  std::vector<uint32_t> tokens;

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  const ModelConfig config_;
  const MtpLayout layout_;
  std::vector<DocumentRows> documents_;
  int64_t num_rows_ = 0;
  std::vector<int32_t> positions_;  // [kSteps, R]
  std::unique_ptr<float, Free> table_;
  PackedMatrix embedding_;
};

TEST(MtpLayoutTest, HoldsThe15TensorsWithoutOverlap) {
  const MtpLayout layout(SmallConfig());
  std::set<std::string> names;
  int64_t end = 0;
  for (const MtpTensor& tensor : layout.tensors) {
    EXPECT_GE(tensor.offset, end) << tensor.name;
    end = tensor.offset + tensor.size();
    names.insert(tensor.name);
  }
  EXPECT_LE(end, layout.total);
  EXPECT_EQ(names.size(), 15u);
  EXPECT_TRUE(names.count("mtp.layers.0.self_attn.k_proj.weight") == 1 && names.count("mtp.fc.weight") == 1);
  // The fused views are the tensors one after the other.
  EXPECT_EQ(layout.qkv_width(), 2 * 64 + 2 * 32);
  EXPECT_EQ(layout.q_norm - layout.qkv, layout.qkv_width() * 40);
}

TEST(MtpBlockTest, ThreadsAndSpareRowsChangeNoBit) {
  Fixture fixture({70, 5, 130});
  const Fixture::Result one = fixture.Run(1);
  for (const int threads : {2, 5}) {
    const Fixture::Result other = fixture.Run(threads, /*spare_rows=*/threads);
    EXPECT_TRUE(SameBits(one.hidden, other.hidden)) << threads;
    EXPECT_TRUE(SameBits(one.gradients, other.gradients)) << threads;
    EXPECT_TRUE(SameBits(one.dhidden, other.dhidden)) << threads;
  }
}

TEST(MtpBlockTest, DocumentsAreApartAndLaterRowsAreUnseen) {
  Fixture fixture({40, 33});
  const int64_t width = fixture.row_floats(), rows = fixture.num_rows();
  // Gradient at document 0's rows before 20 alone: nothing of later rows or of document 1 may matter.
  for (int64_t step = 0; step < kSteps; ++step) {
    for (int64_t row = 20; row < rows; ++row) {
      std::memset(&fixture.dhidden[static_cast<size_t>((step * rows + row) * width)], 0,
                  static_cast<size_t>(width) * sizeof(float));
    }
  }
  const Fixture::Result before = fixture.Run(1);
  for (int64_t i = 20 * width; i < rows * width; ++i) fixture.target_hidden[static_cast<size_t>(i)] += 1.0f;
  for (int64_t row = 20; row < rows; ++row) fixture.tokens[static_cast<size_t>(row)] ^= 1;
  const Fixture::Result after = fixture.Run(1);
  for (int64_t step = 0; step < kSteps; ++step) {
    const int64_t at = step * rows * width;
    EXPECT_TRUE(SameBits(&before.hidden[static_cast<size_t>(at)], &after.hidden[static_cast<size_t>(at)], 20 * width)) << step;
    EXPECT_FALSE(SameBits(&before.hidden[static_cast<size_t>(at + 20 * width)],
                          &after.hidden[static_cast<size_t>(at + 20 * width)], width));
  }
  double difference = 0, norm = 0;
  for (size_t i = 0; i < before.gradients.size(); ++i) {
    difference += std::pow(double{before.gradients[i]} - after.gradients[i], 2);
    norm += std::pow(double{before.gradients[i]}, 2);
  }
  EXPECT_GT(norm, 0.0);
  EXPECT_LE(std::sqrt(difference / norm), 1e-7);

  // Nor does document 1 see document 0.
  for (int64_t i = 0; i < 40 * width; ++i) fixture.target_hidden[static_cast<size_t>(i)] -= 0.5f;
  const Fixture::Result first_changed = fixture.Run(1);
  for (int64_t step = 0; step < kSteps; ++step) {
    const auto at = static_cast<size_t>((step * rows + 40) * width);
    EXPECT_TRUE(SameBits(&after.hidden[at], &first_changed.hidden[at], 33 * width)) << step;
  }
}

// A step along the gradient changes the loss Σ dhidden·hidden by the square of the gradient's norm times the step.
TEST(MtpBlockTest, FiniteDifferenceAlongTheGradient) {
  Fixture fixture({21, 9});
  const Fixture::Result at = fixture.Run(1);
  double norm = 0;
  for (const float value : at.gradients) norm += double{value} * value;
  const double step = 2e-3 / std::sqrt(norm);
  const std::vector<float> start = fixture.parameters;
  const auto loss = [&](double factor) {
    for (size_t i = 0; i < start.size(); ++i) fixture.parameters[i] = static_cast<float>(start[i] + factor * at.gradients[i]);
    const Fixture::Result moved = fixture.Run(1);
    double sum = 0;
    for (size_t i = 0; i < moved.hidden.size(); ++i) sum += double{moved.hidden[i]} * fixture.dhidden[i];
    return sum;
  };
  EXPECT_NEAR((loss(step) - loss(-step)) / (2 * step) / norm, 1.0, 2e-3);
}

TEST(MtpBlockTest, GradientsAreLinearInTheLoss) {
  Fixture fixture({17});
  const Fixture::Result result = fixture.Run(1);
  Fixture doubled({17});
  for (float& value : doubled.dhidden) value *= 2;  // a power of two: exact
  const Fixture::Result twice = doubled.Run(1);
  for (size_t i = 0; i < result.gradients.size(); ++i) ASSERT_EQ(2 * result.gradients[i], twice.gradients[i]) << i;
}

TEST(MtpBlockTest, RefusesHeadsThatItsTilesCannotTake) {
  ModelConfig config = SmallConfig();
  config.head_dim = 24;
  ThreadPool pool(1);
  const std::unique_ptr<DeviceMemory> memory = MakeHostMemory();
  const std::unique_ptr<TrainingOps> ops = MakeCpuTrainingOps(&pool);
  const auto block = MtpBlock::Create(config, 8, 1, memory.get(), ops.get());
  EXPECT_EQ(block.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_NE(std::string(block.status().message()).find("24"), std::string::npos);
}

TEST(MtpBlockTest, BytesFollowTheFormula) {
  const ModelConfig config = SmallConfig();
  const int64_t hidden = 40, ffn = 56, query = 64, kv = 32, heads = 4, rows = 1024;
  ThreadPool pool(1);
  const std::unique_ptr<TrainingOps> ops = MakeCpuTrainingOps(&pool);
  // The formula of docs/training.md, exact where rows are a multiple of 64.
  for (const int32_t steps : {1, 4}) {
    EXPECT_EQ(MtpBlock::Bytes(config, 2 * rows, steps, *ops) - MtpBlock::Bytes(config, rows, steps, *ops),
              4 * rows * (steps * (4 * hidden + 5 * query + 5 * kv + heads + 2 * ffn) + 4 * hidden + std::max(ffn, query) + 1));
  }
}

}  // namespace
}  // namespace bebop
