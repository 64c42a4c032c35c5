// SPDX-License-Identifier: Apache-2.0
#include "engine/model/model.h"

#include "engine/model/activations.h"
#include "engine/model/decoder_layer.h"
#include "kernels/common/check.h"
#include "kernels/embedding/embedding.h"
#include "kernels/linear/linear.h"
#include "kernels/rms_norm/rms_norm.h"

namespace bebop {

Model::Model(const ModelConfig& config, int32_t max_rows, ThreadPool* pool)
    : config_(config), pool_(pool), workspace_(std::make_unique<Workspace>(config, max_rows)) {}

Model::~Model() = default;

void Model::SetWeights(const ModelWeights* weights) {
  BEBOP_CHECK(weights->layers.size() == config_.layers.size());
  weights_ = weights;
}

void Model::ForwardTarget(const uint32_t* token_ids, const RaggedBatch& batch, const ModelState& state, TensorView hidden) {
  const RaggedBatch mapped = workspace_->WithRowMaps(batch);
  const Activations act = workspace_->ForRows(batch.num_rows);
  const Pass pass{config_, mapped, act, workspace_->linear_scratch(), *pool_};

  cpu::Embedding({.token_ids = token_ids, .table = weights_->embedding, .out = act.stream}, *pool_);
  TensorView update;  // of the last layer; joins the stream in the next norm
  size_t full = 0, linear = 0;
  for (const LayerWeights& layer : weights_->layers) {
    update = layer.full.has_value() ? FullAttentionLayer(pass, layer, {.pages = state.kv[full++]}, update)
                                    : LinearAttentionLayer(pass, layer, state.linear[linear++], update);
  }
  cpu::RmsNorm({.x = act.stream, .residual = update, .weight = weights_->final_norm, .eps = config_.rms_norm_eps, .out = hidden},
               *pool_);
}

void Model::ForwardMtp(const uint32_t* next_token_ids, const RaggedBatch& batch, const TensorView& previous_hidden,
                       const ModelState& state, const MtpChain* chain, TensorView hidden_out) {
  BEBOP_CHECK(weights_->mtp.has_value());
  const MtpWeights& mtp = *weights_->mtp;
  const int64_t hidden_size = config_.hidden_size;
  const RaggedBatch mapped = workspace_->WithRowMaps(batch);
  const Activations act = workspace_->ForRows(batch.num_rows);
  const Pass pass{config_, mapped, act, workspace_->linear_scratch(), *pool_};
  const auto norm = [&](const TensorView& x, const TensorView& residual, const float* weight, const TensorView& out) {
    cpu::RmsNorm({.x = x, .residual = residual, .weight = weight, .eps = config_.rms_norm_eps, .out = out}, *pool_);
  };

  // u = fc([norm_e(embed(x_{t+1})), norm_h(h_t)]): the embedding half first. h_t is taken as it comes, *after* the final norm (or
  // mtp.norm): feeding states from before the norm still drafts fluent text, but far fewer drafts are accepted.
  const TensorView pair = act.Wide(2 * hidden_size);
  cpu::Embedding({.token_ids = next_token_ids, .table = weights_->embedding, .out = act.update}, *pool_);
  norm(act.update, {}, mtp.pre_fc_norm_embedding, pair.Columns(0, hidden_size));
  norm(previous_hidden, {}, mtp.pre_fc_norm_hidden, pair.Columns(hidden_size, hidden_size));
  cpu::Linear({.x = pair, .w = mtp.fc, .y = act.stream}, workspace_->linear_scratch(), *pool_);

  const AttentionCache cache{.pages = state.mtp_kv, .first_index = 1, .chain = chain};
  const TensorView update = FullAttentionLayer(pass, mtp.layer, cache, {});
  norm(act.stream, update, mtp.norm, hidden_out);
}

void Model::Logits(const TensorView& hidden, TensorView logits) {
  BEBOP_CHECK(hidden.rows <= workspace_->max_rows());
  cpu::Linear({.x = hidden, .w = weights_->lm_head, .y = logits}, workspace_->linear_scratch(), *pool_);
}

}  // namespace bebop
