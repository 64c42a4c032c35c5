// SPDX-License-Identifier: Apache-2.0
#include "engine/weights/dummy_weights.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "tests/support/checkpoint_writer.h"

namespace bebop {
namespace {

ModelConfig SmallConfig() { return ParseModelConfig(SmallConfigJson(/*tied=*/false)).value(); }

std::unique_ptr<ModelWeights> Make(const ModelConfig& config, DType dtype, uint64_t seed, int num_threads) {
  ThreadPool pool(num_threads);
  return MakeDummyWeights(config, dtype, seed, pool, MakeHostMemory().get()).value();
}

bool SameBytes(const ModelWeights& a, const ModelWeights& b) {
  return a.storage_bytes == b.storage_bytes && std::memcmp(a.storage.get(), b.storage.get(), static_cast<size_t>(a.storage_bytes)) == 0;
}

struct Moments {
  double mean = 0, deviation = 0;
};
Moments MomentsOf(const PackedMatrix& matrix, int64_t first_row, int64_t num_rows) {
  double sum = 0, squares = 0;
  std::vector<float> row(static_cast<size_t>(matrix.cols));
  for (int64_t i = first_row; i < first_row + num_rows; ++i) {
    cpu::UnpackRow(matrix, i, row.data());
    for (const float value : row) {
      sum += value;
      squares += static_cast<double>(value) * value;
    }
  }
  const double count = static_cast<double>(num_rows * matrix.cols);
  return {sum / count, std::sqrt(squares / count)};
}

TEST(DummyWeightsTest, AreAFunctionOfConfigTypeAndSeed) {
  const ModelConfig config = SmallConfig();
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    const auto one = Make(config, dtype, 5, 1);
    EXPECT_TRUE(SameBytes(*one, *Make(config, dtype, 5, 2)));
    EXPECT_TRUE(SameBytes(*one, *Make(config, dtype, 5, 5)));
    EXPECT_FALSE(SameBytes(*one, *Make(config, dtype, 6, 1)));
  }
}

TEST(DummyWeightsTest, BFloat16IsTheRoundedFloat32) {
  const ModelConfig config = SmallConfig();
  const auto wide = Make(config, DType::kFloat32, 3, 2), narrow = Make(config, DType::kBFloat16, 3, 2);
  std::vector<float> exact(40), rounded(40);
  for (int64_t row = 0; row < 50; ++row) {
    cpu::UnpackRow(wide->lm_head, row, exact.data());
    cpu::UnpackRow(narrow->lm_head, row, rounded.data());
    for (size_t i = 0; i < exact.size(); ++i) ASSERT_EQ(rounded[i], ToFloat(ToBFloat16(exact[i])));
  }
}

TEST(DummyWeightsTest, RangesAreThoseOfATrainedNetwork) {
  ModelConfig config = SmallConfig();
  config.hidden_size = 256;
  config.vocab_size = 2000;
  config.linear_num_key_heads = 16;
  config.linear_num_value_heads = 32;
  const auto weights = Make(config, DType::kFloat32, 0, 2);

  // logits = lm_head h with h of order 1 have deviation 3: row entries have 3 / sqrt(256).
  const Moments head = MomentsOf(weights->lm_head, 0, 2000);
  EXPECT_NEAR(head.deviation, 3.0 / 16.0, 0.002);
  EXPECT_NEAR(head.mean, 0.0, 0.002);
  EXPECT_NEAR(MomentsOf(weights->layers[0].mlp.gate_up, 0, 24).deviation, 1.0 / 16.0, 0.004);

  double slowest = 0, fastest = 1;
  for (const LayerWeights& layer : weights->layers) {
    for (int i = 0; i < config.hidden_size; ++i) {
      ASSERT_LT(std::fabs(layer.input_norm[i]), 0.5f);
      ASSERT_LT(std::fabs(layer.post_attention_norm[i]), 0.5f);
    }
    if (!layer.linear) continue;
    for (int head_idx = 0; head_idx < config.linear_num_value_heads; ++head_idx) {
      const double decay = std::exp(-std::exp(double{layer.linear->a_log[head_idx]}) * std::log1p(std::exp(double{layer.linear->dt_bias[head_idx]})));
      ASSERT_GE(decay, 0.8999);
      ASSERT_LE(decay, 0.9991);
      slowest = std::max(slowest, decay);
      fastest = std::min(fastest, decay);
    }
    for (int i = 0; i < config.linear_value_head_dim; ++i) ASSERT_NEAR(layer.linear->norm[i], 1.0f, 0.5f);
  }
  EXPECT_GT(slowest, 0.9980);
  EXPECT_LT(fastest, 0.9150);
}

TEST(DummyWeightsTest, TensorsDiffer) {
  const ModelConfig config = SmallConfig();
  const auto weights = Make(config, DType::kFloat32, 0, 1);
  std::vector<float> first(40), second(40);
  cpu::UnpackRow(weights->layers[0].mlp.gate_up, 0, first.data());
  cpu::UnpackRow(weights->layers[1].mlp.gate_up, 0, second.data());
  EXPECT_NE(first, second);
  cpu::UnpackRow(weights->layers[0].mlp.gate_up, MlpSegments(config).up, second.data());
  EXPECT_NE(first, second);
  ASSERT_TRUE(weights->mtp.has_value());
}

TEST(DummyWeightsTest, MtpFollowsTheConfig) {
  ModelConfig config = SmallConfig();
  config.num_mtp_layers = 0;
  EXPECT_FALSE(Make(config, DType::kBFloat16, 0, 1)->mtp.has_value());
}

TEST(DummyWeightsTest, ImpossibleSizesAreResourceExhausted) {
  ModelConfig config = SmallConfig();
  config.vocab_size = 1 << 24;
  config.hidden_size = 1 << 20;
  ThreadPool pool(1);
  const absl::Status status = MakeDummyWeights(config, DType::kBFloat16, 0, pool, MakeHostMemory().get()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_NE(status.message().find("bytes"), absl::string_view::npos);
}

}  // namespace
}  // namespace bebop
