// SPDX-License-Identifier: Apache-2.0
#include "engine/model/model.h"

#include <algorithm>
#include <utility>

#include "engine/base/status_macros.h"
#include "engine/model/activations.h"
#include "engine/model/decoder_layer.h"
#include "kernels/common/check.h"

namespace bebop {

absl::StatusOr<std::unique_ptr<Model>> Model::Create(const ModelConfig& config, int32_t max_rows, DType activation_dtype, Ops* ops,
                                                     DeviceMemory* memory) {
  BEBOP_ASSIGN_OR_RETURN(std::unique_ptr<Workspace> workspace, Workspace::Create(config, max_rows, activation_dtype, memory));
  // Inputs of matrix products: normed stream and MTP pair, mixer output, SwiGLU output.
  const int64_t query_width = static_cast<int64_t>(config.num_attention_heads) * config.head_dim;
  ops->ReserveLinear(max_rows, std::max<int64_t>({2 * int64_t{config.hidden_size}, query_width, config.linear_value_width(), config.intermediate_size}));
  return std::unique_ptr<Model>(new Model(config, activation_dtype, ops, std::move(workspace)));
}

int64_t Model::ActivationBytes(const ModelConfig& config, int32_t max_rows, DType activation_dtype) {
  return Workspace::Bytes(config, max_rows, activation_dtype);
}

Model::Model(const ModelConfig& config, DType activation_dtype, Ops* ops, std::unique_ptr<Workspace> workspace)
    : config_(config), activation_dtype_(activation_dtype), ops_(*ops), workspace_(std::move(workspace)) {}

Model::~Model() = default;

void Model::SetWeights(const ModelWeights* weights) {
  BEBOP_CHECK(weights->layers.size() == config_.layers.size());
  weights_ = weights;
}

void Model::ForwardTarget(const uint32_t* token_ids, const RaggedBatch& batch, const ModelState& state, TensorView hidden) {
  const RaggedBatch mapped = workspace_->WithRowMaps(batch);
  const Activations act = workspace_->ForRows(batch.num_rows);
  const Pass pass{config_, mapped, act, ops_};

  ops_.Embedding({.token_ids = token_ids, .table = weights_->embedding, .out = act.stream});
  TensorView update;  // of the last layer; joins the stream in the next norm
  size_t full = 0, linear = 0;
  for (const LayerWeights& layer : weights_->layers) {
    update = layer.full.has_value() ? FullAttentionLayer(pass, layer, {.pages = state.kv[full++]}, update)
                                    : LinearAttentionLayer(pass, layer, state.linear[linear++], update);
  }
  ops_.RmsNorm({.x = act.stream, .residual = update, .weight = weights_->final_norm, .eps = config_.rms_norm_eps, .out = hidden});
}

void Model::ForwardMtp(const uint32_t* next_token_ids, const RaggedBatch& batch, const TensorView& previous_hidden,
                       const ModelState& state, const MtpChain* chain, TensorView hidden_out) {
  BEBOP_CHECK(weights_->mtp.has_value());
  const MtpWeights& mtp = *weights_->mtp;
  const int64_t hidden_size = config_.hidden_size;
  const RaggedBatch mapped = workspace_->WithRowMaps(batch);
  const Activations act = workspace_->ForRows(batch.num_rows);
  const Pass pass{config_, mapped, act, ops_};
  const auto norm = [&](const TensorView& x, const TensorView& residual, const float* weight, const TensorView& out) {
    ops_.RmsNorm({.x = x, .residual = residual, .weight = weight, .eps = config_.rms_norm_eps, .out = out});
  };

  // u = fc([norm_e(embed(x_{t+1})), norm_h(h_t)]): the embedding half first. h_t is taken as it comes, *after* the final norm (or
  // mtp.norm): feeding states from before the norm still drafts fluent text, but far fewer drafts are accepted.
  const TensorView pair = act.Wide(2 * hidden_size);
  ops_.Embedding({.token_ids = next_token_ids, .table = weights_->embedding, .out = act.update});
  norm(act.update, {}, mtp.pre_fc_norm_embedding, pair.Columns(0, hidden_size));
  norm(previous_hidden, {}, mtp.pre_fc_norm_hidden, pair.Columns(hidden_size, hidden_size));
  ops_.Linear({.x = pair, .w = mtp.fc, .y = act.stream});

  const AttentionCache cache{.pages = state.mtp_kv, .first_index = 1, .chain = chain};
  const TensorView update = FullAttentionLayer(pass, mtp.layer, cache, {});
  norm(act.stream, update, mtp.norm, hidden_out);
}

void Model::Logits(const TensorView& hidden, TensorView logits) {
  BEBOP_CHECK(hidden.rows <= workspace_->max_rows());
  ops_.Linear({.x = hidden, .w = weights_->lm_head, .y = logits});
}

}  // namespace bebop
