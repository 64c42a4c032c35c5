// SPDX-License-Identifier: Apache-2.0
// Any bytes as config.json and generation_config.json (split at the first NUL): a status, or a config whose numbers fit together.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "engine/config/model_config.h"
#include "kernels/common/check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const size_t cut = bytes.find('\0');
  const auto config = bebop::ParseModelConfig(bytes.substr(0, cut), cut == std::string_view::npos ? std::string_view() : bytes.substr(cut + 1));
  if (!config.ok()) {
    BEBOP_CHECK(config.status().message().find('\n') == absl::string_view::npos);
    return 0;
  }
  BEBOP_CHECK(!config->layers.empty() && config->hidden_size > 0 && config->vocab_size > 0);
  BEBOP_CHECK(config->num_attention_heads % config->num_key_value_heads == 0);
  BEBOP_CHECK(config->rotary_dim % 2 == 0 && config->rotary_dim >= 2 && config->rotary_dim <= config->head_dim);
  BEBOP_CHECK(config->num_linear_attention_layers() == 0 || config->conv_channels() > 0);
  for (const uint32_t id : config->eos_token_ids) BEBOP_CHECK(id < static_cast<uint32_t>(config->vocab_size));
  return 0;
}
