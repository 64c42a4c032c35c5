// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/config/model_config.h"
#include "engine/runtime/backend.h"
#include "engine/training/mtp_trainer.h"
#include "engine/weights/checkpoint.h"
#include "engine/weights/dummy_weights.h"
#include "kernels/common/check.h"

namespace bebop::testing {

// The MTP layer of loaded weights (host memory) in the order of `layout`.
inline std::vector<float> FlatMtp(const ModelConfig& config, const ModelWeights& weights, const MtpLayout& layout) {
  std::vector<float> out(static_cast<size_t>(layout.total));
  const MtpWeights& mtp = *weights.mtp;
  const auto vector = [&](const float* from, int64_t offset, int64_t count) { std::copy_n(from, count, out.begin() + offset); };
  const auto matrix = [&](const PackedMatrix& from, int64_t first_row, int64_t offset, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) cpu::UnpackRow(from, first_row + row, out.data() + offset + row * from.cols);
  };
  const FullAttentionWeights& attention = *mtp.layer.full;
  const FullAttentionSegments full = FullSegments(config);
  const GateUpSegments mlp = MlpSegments(config);
  const int64_t width = layout.hidden;
  vector(mtp.pre_fc_norm_embedding, layout.pre_fc_norm_embedding, width);
  vector(mtp.pre_fc_norm_hidden, layout.pre_fc_norm_hidden, width);
  matrix(mtp.fc, 0, layout.fc, width);
  vector(mtp.layer.input_norm, layout.input_norm, width);
  matrix(attention.qkv, full.q_gate, layout.qkv, 2 * layout.query_width);
  matrix(attention.qkv, full.k, layout.qkv + 2 * layout.query_width * width, layout.kv_width);
  matrix(attention.qkv, full.v, layout.qkv + (2 * layout.query_width + layout.kv_width) * width, layout.kv_width);
  vector(attention.q_norm, layout.q_norm, layout.head_dim);
  vector(attention.k_norm, layout.k_norm, layout.head_dim);
  matrix(attention.out, 0, layout.out, width);
  vector(mtp.layer.post_attention_norm, layout.post_attention_norm, width);
  matrix(mtp.layer.mlp.gate_up, mlp.gate, layout.gate_up, layout.ffn);
  matrix(mtp.layer.mlp.gate_up, mlp.up, layout.gate_up + layout.ffn * width, layout.ffn);
  matrix(mtp.layer.mlp.down, 0, layout.down, width);
  vector(mtp.norm, layout.norm, width);
  return out;
}

// A trainer on the CPU with all that it stands on.
class TrainerHarness {
 public:
  // Random weights.
  TrainerHarness(const ModelConfig& config, DType dtype, int threads)
      : config_(config), pool_(threads), backend_(MakeCpuBackend(&pool_)), ops_(MakeCpuTrainingOps(&pool_)) {
    auto weights = MakeDummyWeights(config_, dtype, /*seed=*/3, pool_, backend_->memory());
    BEBOP_CHECK(weights.ok());
    weights_ = *std::move(weights);
    Unpack();
  }
  // A checkpoint.
  TrainerHarness(const std::string& path, DType dtype, int threads)
      : config_(*LoadModelConfig(path)), pool_(threads), backend_(MakeCpuBackend(&pool_)), ops_(MakeCpuTrainingOps(&pool_)) {
    LoadOptions options;
    options.path = path;
    options.dtype = dtype;
    auto weights = LoadModelWeights(config_, options, pool_, backend_->memory());
    BEBOP_CHECK(weights.ok());
    weights_ = *std::move(weights);
    Unpack();
  }

  absl::StatusOr<std::unique_ptr<MtpTrainer>> Make(const TrainerOptions& options) {
    return MtpTrainer::Create(config_, weights_.get(), backend_.get(), ops_.get(), options, parameters);
  }

  const ModelConfig& config() const { return config_; }
  const ModelWeights& weights() const { return *weights_; }
  Backend& backend() { return *backend_; }
  TrainingOps& ops() { return *ops_; }
  ThreadPool& pool() { return pool_; }
  std::vector<float> parameters;

 private:
  void Unpack() { parameters = FlatMtp(config_, *weights_, MtpLayout(config_)); }

  const ModelConfig config_;
  ThreadPool pool_;
  const std::unique_ptr<Backend> backend_;
  const std::unique_ptr<TrainingOps> ops_;
  std::unique_ptr<ModelWeights> weights_;
};

}  // namespace bebop::testing
