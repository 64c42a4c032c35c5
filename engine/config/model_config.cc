// SPDX-License-Identifier: Apache-2.0
#include "engine/config/model_config.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "absl/status/status.h"
#include "engine/base/status_macros.h"
#include "engine/formats/file.h"
#include "engine/formats/json.h"
#include "engine/formats/strings.h"

namespace bebop {
namespace {

constexpr char kConfigFile[] = "config.json";
constexpr char kGenerationFile[] = "generation_config.json";

// Bounds keep heads x head width, and the channels of the convolution, below 2^31, and a weight's byte count far below 2^63.
constexpr int64_t kMaxWidth = 1 << 20;
constexpr int64_t kMaxVocab = 1 << 24;
constexpr int64_t kMaxLayers = 1 << 12;
constexpr int64_t kMaxHeads = 1 << 12;
constexpr int64_t kMaxHeadDim = 1 << 12;
constexpr int64_t kMaxConvWidth = 16;

absl::Status Invalid(std::string message) { return absl::InvalidArgumentError(message); }

// A switch of the family that the engine implements in one position only.
absl::Status ExpectBoolean(const JsonObject& text, std::string_view key, bool expected) {
  BEBOP_ASSIGN_OR_RETURN(const bool value, text.Boolean(key, expected));
  return value == expected ? absl::OkStatus() : text.Unexpected(key, expected ? "true" : "false");
}

absl::Status ExpectString(const JsonObject& text, std::string_view key, std::string_view expected) {
  BEBOP_ASSIGN_OR_RETURN(const std::string value, text.String(key, std::string(expected)));
  return value == expected ? absl::OkStatus() : text.Unexpected(key, Quoted(expected));
}

absl::Status ExpectMultiple(std::string_view prefix, std::string_view key, int64_t value, std::string_view of_key, int64_t of) {
  if (value % of == 0) return absl::OkStatus();
  return Invalid(StrCat(kConfigFile, ": ", prefix, key, ": expected a multiple of ", of_key, " ", of, ", got ", value));
}

// Refuses what would change the network silently.
absl::Status CheckVariants(const JsonObject& text) {
  BEBOP_RETURN_IF_ERROR(ExpectString(text, "hidden_act", "silu"));
  BEBOP_RETURN_IF_ERROR(ExpectBoolean(text, "attention_bias", false));
  BEBOP_RETURN_IF_ERROR(ExpectBoolean(text, "mlp_bias", false));
  BEBOP_RETURN_IF_ERROR(ExpectBoolean(text, "attn_output_gate", true));
  BEBOP_RETURN_IF_ERROR(ExpectBoolean(text, "use_sliding_window", false));
  BEBOP_RETURN_IF_ERROR(ExpectBoolean(text, "mtp_use_dedicated_embeddings", false));
  for (const std::string_view key : {"quantization_config", "final_logit_softcapping", "attn_logit_softcapping"}) {
    if (text.Has(key)) return text.Unexpected(key, "none (not implemented)");
  }
  BEBOP_ASSIGN_OR_RETURN(const int64_t num_experts, text.Integer("num_experts", 0, kMaxWidth, 0));
  if (num_experts > 0) return text.Unexpected("num_experts", "0 (mixture of experts is not implemented)");
  return absl::OkStatus();
}

absl::Status ReadLayers(const JsonObject& text, std::string_view prefix, ModelConfig& config) {
  BEBOP_ASSIGN_OR_RETURN(const int64_t num_layers, text.Integer("num_hidden_layers", 1, kMaxLayers));
  BEBOP_ASSIGN_OR_RETURN(const int64_t interval, text.Integer("full_attention_interval", 1, kMaxLayers, 4));
  if (!text.Has("layer_types")) {
    for (int64_t layer = 0; layer < num_layers; ++layer) {
      config.layers.push_back((layer + 1) % interval == 0 ? LayerKind::kFullAttention : LayerKind::kLinearAttention);
    }
    return absl::OkStatus();
  }
  BEBOP_ASSIGN_OR_RETURN(const JsonValue::Array* types, text.Array("layer_types"));
  for (size_t i = 0; i < types->size(); ++i) {
    const std::string* type = (*types)[i].string();
    if (type != nullptr && *type == "linear_attention") {
      config.layers.push_back(LayerKind::kLinearAttention);
    } else if (type != nullptr && *type == "full_attention") {
      config.layers.push_back(LayerKind::kFullAttention);
    } else {
      return Invalid(StrCat(kConfigFile, ": ", prefix, "layer_types[", i, "]: expected \"linear_attention\" or \"full_attention\", got ",
                            JsonValue::Describe(&(*types)[i])));
    }
  }
  if (static_cast<int64_t>(types->size()) != num_layers) {
    return Invalid(StrCat(kConfigFile, ": ", prefix, "layer_types: expected num_hidden_layers ", num_layers, " entries, got ", types->size()));
  }
  return absl::OkStatus();
}

// Rotary embedding: `rope_parameters`, or the older spelling with `rope_theta` and `rope_scaling` beside the sizes.
absl::Status ReadRope(const JsonObject& text, ModelConfig& config) {
  if (text.Has("rope_parameters") && text.Has("rope_scaling")) {
    return text.Unexpected("rope_scaling", "nothing beside rope_parameters");
  }
  JsonObject rope = text;
  for (const std::string_view key : {"rope_parameters", "rope_scaling"}) {
    if (!text.Has(key)) continue;
    BEBOP_ASSIGN_OR_RETURN(rope, text.Object(key));
    BEBOP_RETURN_IF_ERROR(ExpectString(rope, "rope_type", "default"));
    BEBOP_RETURN_IF_ERROR(ExpectString(rope, "type", "default"));  // older spelling
  }
  constexpr double kMaxTheta = 1e12;
  const JsonObject& theta_owner = rope.Has("rope_theta") ? rope : text;
  BEBOP_ASSIGN_OR_RETURN(config.rope_theta, theta_owner.Number("rope_theta", 1.0, kMaxTheta));
  const JsonObject& factor_owner = rope.Has("partial_rotary_factor") ? rope : text;
  BEBOP_ASSIGN_OR_RETURN(const double factor, factor_owner.Number("partial_rotary_factor", 0.0, 1.0, 0.25));
  config.rotary_dim = static_cast<int32_t>(config.head_dim * factor);
  if (config.rotary_dim < 2 || config.rotary_dim % 2 != 0) {
    return factor_owner.Unexpected("partial_rotary_factor",
                                   StrCat("a factor that makes an even rotary width >= 2 of head_dim ", config.head_dim));
  }
  return absl::OkStatus();
}

// `eos_token_id`: absent, an integer or a list of them.
absl::Status ReadEos(const JsonObject& object, ModelConfig& config) {
  const JsonValue* value = object.Get("eos_token_id");
  if (value == nullptr) return absl::OkStatus();
  const auto add = [&](const JsonValue& id) {
    const int64_t* integer = id.integer();
    if (integer == nullptr || *integer < 0 || *integer >= config.vocab_size) return false;
    const uint32_t token_id = static_cast<uint32_t>(*integer);
    if (std::find(config.eos_token_ids.begin(), config.eos_token_ids.end(), token_id) == config.eos_token_ids.end()) {
      config.eos_token_ids.push_back(token_id);
    }
    return true;
  };
  const std::string expected = StrCat("a token id or a list of them, each below vocab_size ", config.vocab_size);
  constexpr size_t kMaxEos = 1024;
  if (const JsonValue::Array* list = value->array()) {
    if (list->size() > kMaxEos) return object.Unexpected("eos_token_id", StrCat("at most ", kMaxEos, " ids"));
    for (size_t i = 0; i < list->size(); ++i) {
      if (!add((*list)[i])) {
        return object.Unexpected("eos_token_id", StrCat(expected, " (entry ", i, " is ", JsonValue::Describe(&(*list)[i]), ")"));
      }
    }
    return absl::OkStatus();
  }
  return add(*value) ? absl::OkStatus() : object.Unexpected("eos_token_id", expected);
}

absl::StatusOr<std::string> ReadText(const std::string& path) {
  BEBOP_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  if (file.bytes().size() > JsonLimits().max_bytes) {
    return Invalid(StrCat(path, ": expected at most ", JsonLimits().max_bytes, " bytes, got ", file.bytes().size()));
  }
  return std::string(file.bytes());
}

}  // namespace

int32_t ModelConfig::num_full_attention_layers() const {
  return static_cast<int32_t>(std::count(layers.begin(), layers.end(), LayerKind::kFullAttention));
}

int32_t ModelConfig::num_linear_attention_layers() const {
  return static_cast<int32_t>(std::count(layers.begin(), layers.end(), LayerKind::kLinearAttention));
}

absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view config_json, std::string_view generation_config_json) {
  BEBOP_ASSIGN_OR_RETURN(const JsonValue root_value, ParseJson(config_json, kConfigFile));
  BEBOP_ASSIGN_OR_RETURN(const JsonObject root, JsonObject::Open(root_value, kConfigFile));

  constexpr char kTypes[] = "\"qwen3_5\" (with text_config) or \"qwen3_5_text\"";
  BEBOP_ASSIGN_OR_RETURN(const std::string model_type, root.String("model_type"));
  const bool nested = root.Has("text_config");
  if (model_type != (nested ? "qwen3_5" : "qwen3_5_text") && !(model_type == "qwen3_5" && !nested && root.Has("hidden_size"))) {
    return absl::UnimplementedError(root.Unexpected("model_type", kTypes).message());
  }
  JsonObject text = root;
  const std::string_view prefix = nested ? "text_config." : "";
  if (nested) {
    BEBOP_ASSIGN_OR_RETURN(text, root.Object("text_config"));
    BEBOP_ASSIGN_OR_RETURN(const std::string text_type, text.String("model_type", "qwen3_5_text"));
    if (text_type != "qwen3_5_text") {
      return absl::UnimplementedError(text.Unexpected("model_type", "\"qwen3_5_text\"").message());
    }
    if (root.Has("quantization_config")) return root.Unexpected("quantization_config", "none (not implemented)");
  }
  BEBOP_RETURN_IF_ERROR(CheckVariants(text));

  ModelConfig config;
  const auto read = [&](std::string_view key, int64_t max, int32_t& field, std::optional<int64_t> fallback = {}) -> absl::Status {
    BEBOP_ASSIGN_OR_RETURN(const int64_t value, text.Integer(key, 1, max, fallback));
    field = static_cast<int32_t>(value);
    return absl::OkStatus();
  };
  BEBOP_RETURN_IF_ERROR(read("hidden_size", kMaxWidth, config.hidden_size));
  BEBOP_RETURN_IF_ERROR(read("intermediate_size", kMaxWidth, config.intermediate_size));
  BEBOP_RETURN_IF_ERROR(read("vocab_size", kMaxVocab, config.vocab_size));
  BEBOP_RETURN_IF_ERROR(read("max_position_embeddings", std::numeric_limits<int32_t>::max(), config.max_position_embeddings, 32768));
  BEBOP_RETURN_IF_ERROR(ReadLayers(text, prefix, config));

  BEBOP_RETURN_IF_ERROR(read("num_attention_heads", kMaxHeads, config.num_attention_heads));
  BEBOP_RETURN_IF_ERROR(read("num_key_value_heads", kMaxHeads, config.num_key_value_heads));
  BEBOP_RETURN_IF_ERROR(read("head_dim", kMaxHeadDim, config.head_dim, 256));
  BEBOP_RETURN_IF_ERROR(
      ExpectMultiple(prefix, "num_attention_heads", config.num_attention_heads, "num_key_value_heads", config.num_key_value_heads));
  BEBOP_RETURN_IF_ERROR(ReadRope(text, config));
  constexpr double kMaxEps = 1e-1;
  BEBOP_ASSIGN_OR_RETURN(const double eps, text.Number("rms_norm_eps", 0.0, kMaxEps, 1e-6));
  config.rms_norm_eps = static_cast<float>(eps);

  if (config.num_linear_attention_layers() > 0) {
    BEBOP_RETURN_IF_ERROR(read("linear_num_key_heads", kMaxHeads, config.linear_num_key_heads));
    BEBOP_RETURN_IF_ERROR(read("linear_num_value_heads", kMaxHeads, config.linear_num_value_heads));
    BEBOP_RETURN_IF_ERROR(read("linear_key_head_dim", kMaxHeadDim, config.linear_key_head_dim, 128));
    BEBOP_RETURN_IF_ERROR(read("linear_value_head_dim", kMaxHeadDim, config.linear_value_head_dim, 128));
    BEBOP_RETURN_IF_ERROR(read("linear_conv_kernel_dim", kMaxConvWidth, config.linear_conv_kernel_dim, 4));
    BEBOP_RETURN_IF_ERROR(ExpectMultiple(prefix, "linear_num_value_heads", config.linear_num_value_heads, "linear_num_key_heads",
                                         config.linear_num_key_heads));
  }

  // transformers reads the outer value of a nested file; a contradiction inside one file is an error, not a choice.
  BEBOP_ASSIGN_OR_RETURN(const bool text_tie, text.Boolean("tie_word_embeddings", false));
  config.tie_word_embeddings = text_tie;
  if (nested && root.Has("tie_word_embeddings")) {
    BEBOP_ASSIGN_OR_RETURN(config.tie_word_embeddings, root.Boolean("tie_word_embeddings"));
    if (text.Has("tie_word_embeddings") && text_tie != config.tie_word_embeddings) {
      return root.Unexpected("tie_word_embeddings", StrCat("text_config.tie_word_embeddings ", text_tie ? "true" : "false"));
    }
  }

  BEBOP_ASSIGN_OR_RETURN(const int64_t num_mtp_layers, text.Integer("mtp_num_hidden_layers", 0, 1, 1));
  config.num_mtp_layers = static_cast<int32_t>(num_mtp_layers);
  config.tensor_prefix = nested ? "model.language_model." : "model.";

  BEBOP_RETURN_IF_ERROR(ReadEos(text, config));
  if (nested) BEBOP_RETURN_IF_ERROR(ReadEos(root, config));
  if (!generation_config_json.empty()) {
    BEBOP_ASSIGN_OR_RETURN(const JsonValue generation_value, ParseJson(generation_config_json, kGenerationFile));
    BEBOP_ASSIGN_OR_RETURN(const JsonObject generation, JsonObject::Open(generation_value, kGenerationFile));
    BEBOP_RETURN_IF_ERROR(ReadEos(generation, config));
  }
  return config;
}

absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& directory) {
  const std::string generation_path = StrCat(directory, "/", kGenerationFile);
  BEBOP_ASSIGN_OR_RETURN(const std::string config_json, ReadText(StrCat(directory, "/", kConfigFile)));
  std::string generation_json;
  if (FileExists(generation_path)) {
    BEBOP_ASSIGN_OR_RETURN(generation_json, ReadText(generation_path));
    if (generation_json.empty()) return Invalid(StrCat(generation_path, ": expected an object, got an empty file"));
  }
  absl::StatusOr<ModelConfig> config = ParseModelConfig(config_json, generation_json);
  if (!config.ok()) return absl::Status(config.status().code(), StrCat(directory, "/", config.status().message()));
  return config;
}

}  // namespace bebop
