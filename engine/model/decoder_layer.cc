// SPDX-License-Identifier: Apache-2.0
#include "engine/model/decoder_layer.h"

#include "kernels/common/check.h"

namespace bebop {
namespace {

void MatMul(const Pass& pass, const TensorView& x, const PackedMatrix& w, const TensorView& y) {
  pass.ops.Linear({.x = x, .w = w, .y = y});
}

// h += update; act.normed = norm(h).
void AddAndNorm(const Pass& pass, const TensorView& update, const float* weight) {
  pass.ops.RmsNorm({.x = pass.act.stream, .residual = update, .weight = weight, .eps = pass.config.rms_norm_eps, .out = pass.act.normed});
}

// act.update = o_proj(attention(q, k, v) · sigmoid(gate)) of act.normed.
void GatedAttention(const Pass& pass, const FullAttentionWeights& weights, const AttentionCache& cache) {
  const ModelConfig& config = pass.config;
  const FullAttentionSegments segments = FullSegments(config);
  const int64_t query_width = static_cast<int64_t>(config.num_attention_heads) * config.head_dim;
  const int64_t kv_width = static_cast<int64_t>(config.num_key_value_heads) * config.head_dim;
  const TensorView projected = pass.act.Wide(segments.total);
  const TensorView q_gate = projected.Columns(segments.q_gate, 2 * query_width);
  const TensorView out = pass.act.mixed.Columns(0, query_width);
  const MtpChain* const chain = cache.chain;

  MatMul(pass, pass.act.normed, weights.qkv, projected);
  pass.ops.QkNormRope({.batch = pass.batch,
                       .q_gate = q_gate,
                       .k = projected.Columns(segments.k, kv_width),
                       .v = projected.Columns(segments.v, kv_width),
                       .q_norm = weights.q_norm,
                       .k_norm = weights.k_norm,
                       .eps = config.rms_norm_eps,
                       .num_q_heads = config.num_attention_heads,
                       .num_kv_heads = config.num_key_value_heads,
                       .head_dim = config.head_dim,
                       .rotary_dim = config.rotary_dim,
                       .rope_theta = config.rope_theta,
                       .q_out = pass.act.query,
                       .pages = cache.pages,
                       .dense_k = chain != nullptr ? chain->k[chain->num_entries - 1] : TensorView{},
                       .dense_v = chain != nullptr ? chain->v[chain->num_entries - 1] : TensorView{}});
  pass.ops.Attention({.batch = pass.batch,
                      .q = pass.act.query,
                      .q_gate = q_gate,
                      .pages = cache.pages,
                      .num_q_heads = config.num_attention_heads,
                      .first_index = cache.first_index,
                      .num_chain = chain != nullptr ? chain->num_entries : 0,
                      .chain_k = chain != nullptr ? chain->k : nullptr,
                      .chain_v = chain != nullptr ? chain->v : nullptr,
                      .out = out});
  MatMul(pass, out, weights.out, pass.act.update);
}

// act.update = out_proj(norm(delta_rule(conv(qkv), a, b)) · SiLU(z)) of act.normed.
void GatedDeltaNet(const Pass& pass, const LinearAttentionWeights& weights, const LinearStateView& state) {
  const ModelConfig& config = pass.config;
  const LinearAttentionSegments segments = LinearSegments(config);
  const TensorView projected = pass.act.Wide(segments.total);
  const TensorView out = pass.act.mixed.Columns(0, config.linear_value_width());

  MatMul(pass, pass.act.normed, weights.in, projected);
  pass.ops.CausalConv({.batch = pass.batch,
                       .x = projected.Columns(segments.qkv, config.conv_channels()),
                       .weight = weights.conv,
                       .state = state,
                       .y = pass.act.conv});
  pass.ops.DeltaRule({.batch = pass.batch,
                      .qkv = pass.act.conv,
                      .a = projected.Columns(segments.a, config.linear_num_value_heads),
                      .b = projected.Columns(segments.b, config.linear_num_value_heads),
                      .a_log = weights.a_log,
                      .dt_bias = weights.dt_bias,
                      .state = state,
                      .out = out});
  pass.ops.GatedRmsNorm({.x = out,
                         .gate = projected.Columns(segments.z, config.linear_value_width()),
                         .weight = weights.norm,
                         .head_dim = config.linear_value_head_dim,
                         .eps = config.rms_norm_eps,
                         .out = out});
  MatMul(pass, out, weights.out, pass.act.update);
}

// act.update = down(SiLU(gate x) · up x) of act.normed.
void Mlp(const Pass& pass, const MlpWeights& weights) {
  const GateUpSegments segments = MlpSegments(pass.config);
  const TensorView projected = pass.act.Wide(segments.total);
  const TensorView gate = projected.Columns(segments.gate, pass.config.intermediate_size);
  const TensorView up = projected.Columns(segments.up, pass.config.intermediate_size);

  MatMul(pass, pass.act.normed, weights.gate_up, projected);
  pass.ops.SwiGlu({.gate = gate, .up = up, .out = gate});
  MatMul(pass, gate, weights.down, pass.act.update);
}

}  // namespace

TensorView FullAttentionLayer(const Pass& pass, const LayerWeights& weights, const AttentionCache& cache, TensorView update) {
  BEBOP_CHECK(weights.full.has_value());
  AddAndNorm(pass, update, weights.input_norm);
  GatedAttention(pass, *weights.full, cache);
  AddAndNorm(pass, pass.act.update, weights.post_attention_norm);
  Mlp(pass, weights.mlp);
  return pass.act.update;
}

TensorView LinearAttentionLayer(const Pass& pass, const LayerWeights& weights, const LinearStateView& state, TensorView update) {
  BEBOP_CHECK(weights.linear.has_value());
  AddAndNorm(pass, update, weights.input_norm);
  GatedDeltaNet(pass, *weights.linear, state);
  AddAndNorm(pass, pass.act.update, weights.post_attention_norm);
  Mlp(pass, weights.mlp);
  return pass.act.update;
}

}  // namespace bebop
