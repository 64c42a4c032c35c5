// SPDX-License-Identifier: Apache-2.0
#include "engine/training/mtp_parameters.h"

#include "kernels/linear/packed_matrix.h"

namespace bebop {

MtpLayout::MtpLayout(const ModelConfig& config)
    : hidden(config.hidden_size),
      ffn(config.intermediate_size),
      query_width(int64_t{config.num_attention_heads} * config.head_dim),
      kv_width(int64_t{config.num_key_value_heads} * config.head_dim),
      head_dim(config.head_dim) {
  const auto add = [this](const char* name, int64_t rows, int64_t cols, bool is_vector = false) {
    const int64_t offset = total;
    tensors.push_back({std::string("mtp.") + name + ".weight", rows, cols, offset, is_vector});
    total += rows * cols;
    return offset;
  };
  const auto align = [this] { total = RoundUp(total, 16); };
  const auto vector = [&](const char* name, int64_t size) {
    align();
    return add(name, 1, size, /*is_vector=*/true);
  };
  const auto matrix = [&](const char* name, int64_t rows, int64_t cols) {
    align();
    return add(name, rows, cols);
  };
  pre_fc_norm_embedding = vector("pre_fc_norm_embedding", hidden);
  pre_fc_norm_hidden = vector("pre_fc_norm_hidden", hidden);
  fc = matrix("fc", hidden, 2 * hidden);
  input_norm = vector("layers.0.input_layernorm", hidden);
  qkv = matrix("layers.0.self_attn.q_proj", 2 * query_width, hidden);
  add("layers.0.self_attn.k_proj", kv_width, hidden);
  add("layers.0.self_attn.v_proj", kv_width, hidden);
  q_norm = vector("layers.0.self_attn.q_norm", head_dim);
  k_norm = vector("layers.0.self_attn.k_norm", head_dim);
  out = matrix("layers.0.self_attn.o_proj", hidden, query_width);
  post_attention_norm = vector("layers.0.post_attention_layernorm", hidden);
  gate_up = matrix("layers.0.mlp.gate_proj", ffn, hidden);
  add("layers.0.mlp.up_proj", ffn, hidden);
  down = matrix("layers.0.mlp.down_proj", hidden, ffn);
  norm = vector("norm", hidden);
  align();
}

}  // namespace bebop
