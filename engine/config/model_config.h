// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace bebop {

enum class LayerKind : uint8_t { kLinearAttention, kFullAttention };

// The network of a checkpoint (`qwen3_5` dense text model), as read from config.json; shapes only, no run options.
// `ParseModelConfig` fills and validates it: every field the engine does not implement is refused there.
struct ModelConfig {
  int32_t hidden_size = 0;        // H
  int32_t intermediate_size = 0;  // F
  int32_t vocab_size = 0;         // V
  std::vector<LayerKind> layers;  // one a decoder layer
  int32_t num_attention_heads = 0;
  int32_t num_key_value_heads = 0;
  int32_t head_dim = 0;
  int32_t rotary_dim = 0;  // head_dim * partial_rotary_factor, even
  double rope_theta = 1e7;
  float rms_norm_eps = 1e-6f;
  int32_t linear_num_key_heads = 0;    // Hk
  int32_t linear_num_value_heads = 0;  // Hv
  int32_t linear_key_head_dim = 0;     // dk
  int32_t linear_value_head_dim = 0;   // dv
  int32_t linear_conv_kernel_dim = 0;  // K
  bool tie_word_embeddings = false;
  int32_t num_mtp_layers = 0;  // 0 or 1
  int32_t max_position_embeddings = 0;
  std::vector<uint32_t> eos_token_ids;  // union of config.json and generation_config.json
  std::string tensor_prefix;            // "model.language_model." or "model.", as the checkpoint has it

  int32_t num_full_attention_layers() const;
  int32_t num_linear_attention_layers() const;
  int32_t linear_key_width() const { return linear_num_key_heads * linear_key_head_dim; }
  int32_t linear_value_width() const { return linear_num_value_heads * linear_value_head_dim; }
  int32_t conv_channels() const { return 2 * linear_key_width() + linear_value_width(); }
};

// Reads the text of config.json and, unless empty, of generation_config.json (of which only eos_token_id counts). Nested
// (`text_config`) and flat files, model types qwen3_5 and qwen3_5_text. Keys that change the network and have a value that the engine
// does not implement are refused; keys that it does not know are metadata and ignored. Fast: looks at nothing but the text.
// INVALID_ARGUMENT: `config.json: <key>: expected X, got Y`. UNIMPLEMENTED: another model type.
absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view config_json, std::string_view generation_config_json = {});

// The same from the files of the checkpoint folder `directory`; generation_config.json may be missing. NOT_FOUND: no config.json.
absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& directory);

}  // namespace bebop
