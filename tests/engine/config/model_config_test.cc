// SPDX-License-Identifier: Apache-2.0
#include "engine/config/model_config.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/support/checkpoint_writer.h"

namespace bebop {
namespace {

std::string Nested(const std::string& text_config, const std::string& outer = "") {
  return R"({"model_type":"qwen3_5","architectures":["Qwen3_5ForConditionalGeneration"],"vision_config":{"depth":27})" + outer + R"(,"text_config":)" +
         text_config + "}";
}

TEST(ModelConfigTest, ReadsTheFlatForm) {
  const auto config = ParseModelConfig(SmallConfigJson(true));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->hidden_size, 40);
  EXPECT_EQ(config->intermediate_size, 24);
  EXPECT_EQ(config->vocab_size, 50);
  EXPECT_EQ(config->layers, (std::vector<LayerKind>{LayerKind::kLinearAttention, LayerKind::kLinearAttention, LayerKind::kFullAttention}));
  EXPECT_EQ(config->num_linear_attention_layers(), 2);
  EXPECT_EQ(config->num_full_attention_layers(), 1);
  EXPECT_EQ(config->num_attention_heads, 3);
  EXPECT_EQ(config->num_key_value_heads, 1);
  EXPECT_EQ(config->head_dim, 8);
  EXPECT_EQ(config->rotary_dim, 2);
  EXPECT_EQ(config->rope_theta, 1e7);
  EXPECT_EQ(config->rms_norm_eps, 1e-6f);
  EXPECT_EQ(config->conv_channels(), 26);
  EXPECT_EQ(config->linear_conv_kernel_dim, 3);
  EXPECT_TRUE(config->tie_word_embeddings);
  EXPECT_EQ(config->num_mtp_layers, 1);
  EXPECT_EQ(config->max_position_embeddings, 4096);
  EXPECT_EQ(config->eos_token_ids, std::vector<uint32_t>{7});
  EXPECT_EQ(config->tensor_prefix, "model.");
}

TEST(ModelConfigTest, ReadsTheNestedForm) {
  const auto config = ParseModelConfig(Nested(SmallConfigJson(false), R"(,"eos_token_id":[7,9])"), R"({"eos_token_id":[9,11],"temperature":0.6})");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->hidden_size, 40);
  EXPECT_EQ(config->tensor_prefix, "model.language_model.");
  EXPECT_EQ(config->eos_token_ids, (std::vector<uint32_t>{7, 9, 11}));
}

TEST(ModelConfigTest, OuterTyingCountsInTheNestedForm) {
  std::string text = SmallConfigJson(true);
  EXPECT_TRUE(ParseModelConfig(Nested(text, R"(,"tie_word_embeddings":true)")).value().tie_word_embeddings);
  text.replace(text.find("\"tie_word_embeddings\""), 21, "\"other\"");
  EXPECT_TRUE(ParseModelConfig(Nested(text, R"(,"tie_word_embeddings":true)")).value().tie_word_embeddings);
  EXPECT_FALSE(ParseModelConfig(Nested(text)).value().tie_word_embeddings);
}

struct Edit {
  const char* name;
  const char* from;
  const char* to;
  const char* message;  // parts separated by '|'
  absl::StatusCode code = absl::StatusCode::kInvalidArgument;
};

std::string Apply(const Edit& edit) {
  std::string json = SmallConfigJson(false);
  const size_t place = json.find(edit.from);
  EXPECT_NE(place, std::string::npos) << edit.name;
  return json.replace(place, std::string_view(edit.from).size(), edit.to);
}

TEST(ModelConfigTest, AcceptsHarmlessVariants) {
  const Edit edits[] = {
      {"UnknownMetadata", "\"model_type\"", R"("torch_dtype":"bfloat16","mamba_ssm_dtype":"float32","output_gate_type":"swish","model_type")", ""},
      {"Defaults", R"("hidden_act": "silu", "attention_bias": false,)", "", ""},
      {"NullsAreAbsent", "\"eos_token_id\": 7", R"("eos_token_id": null, "sliding_window": null, "quantization_config": null)", ""},
      {"OldRope", R"("rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25})",
       R"("rope_theta": 1e7, "partial_rotary_factor": 0.5, "rope_scaling": null)", ""},
      {"Mrope", R"("rope_type": "default")", R"("rope_type": "default", "mrope_section": [11, 11, 10], "mrope_interleaved": true)", ""},
      {"IntegerTheta", "10000000.0", "10000000", ""},
      {"NoMtp", R"("mtp_num_hidden_layers": 1)", R"("mtp_num_hidden_layers": 0)", ""},
  };
  for (const Edit& edit : edits) EXPECT_TRUE(ParseModelConfig(Apply(edit)).ok()) << edit.name << ParseModelConfig(Apply(edit)).status();
}

TEST(ModelConfigTest, LayerPatternFollowsTheInterval) {
  const Edit edit = {"Interval", R"("layer_types": ["linear_attention", "linear_attention", "full_attention"],)", R"("full_attention_interval": 2,)", ""};
  EXPECT_EQ(ParseModelConfig(Apply(edit)).value().layers,
            (std::vector<LayerKind>{LayerKind::kLinearAttention, LayerKind::kFullAttention, LayerKind::kLinearAttention}));
}

TEST(ModelConfigTest, RefusesWhatItDoesNotImplement) {
  constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;
  const Edit edits[] = {
      {"NotJson", "{", "{,", "not valid JSON"},
      {"KeyTwice", "\"vocab_size\": 50", R"("vocab_size": 50, "vocab_size": 51)", "duplicate key \"vocab_size\""},
      {"Moe", "qwen3_5_text", "qwen3_5_moe", "model_type|\"qwen3_5_text\"|\"qwen3_5_moe\"", kUnimplemented},
      {"MoeText", "qwen3_5_text", "qwen3_5_moe_text", "model_type|\"qwen3_5_moe_text\"", kUnimplemented},
      {"OtherModel", "qwen3_5_text", "llama", "model_type|\"llama\"", kUnimplemented},
      {"NoModelType", "\"model_type\"", "\"x\"", "model_type|nothing"},
      {"HiddenAct", "\"silu\"", "\"gelu\"", "hidden_act|\"silu\"|\"gelu\""},
      {"AttentionBias", "\"attention_bias\": false", "\"attention_bias\": true", "attention_bias|false|true"},
      {"AttentionBiasType", "\"attention_bias\": false", "\"attention_bias\": 0", "attention_bias|true or false|got 0"},
      {"RopeType", "\"default\"", "\"yarn\"", "rope_parameters.rope_type|\"default\"|\"yarn\""},
      {"RopeOldType", "\"rope_type\": \"default\"", "\"type\": \"linear\"", "rope_parameters.type|\"linear\""},
      {"RopeNoTheta", "\"rope_theta\"", "\"theta\"", "rope_theta|nothing"},
      {"RopeZeroTheta", "10000000.0", "0", "rope_theta|got 0"},
      {"RopeText", "10000000.0", "\"big\"", "rope_theta|\"big\""},
      {"RopeBoth", "\"hidden_act\"", R"("rope_scaling": {"type": "yarn"}, "hidden_act")", "rope_scaling"},
      {"RotaryOdd", "0.25", "0.125", "partial_rotary_factor|head_dim 8|0.125"},
      {"RotaryTooWide", "0.25", "1.5", "partial_rotary_factor|1.5"},
      {"RotaryZero", "0.25", "0.0", "partial_rotary_factor|got 0"},
      {"OutputGate", "\"hidden_act\"", "\"attn_output_gate\": false, \"hidden_act\"", "attn_output_gate|true|false"},
      {"SlidingWindow", "\"hidden_act\"", "\"use_sliding_window\": true, \"hidden_act\"", "use_sliding_window|false|true"},
      {"MlpBias", "\"hidden_act\"", "\"mlp_bias\": true, \"hidden_act\"", "mlp_bias|false|true"},
      {"Quantised", "\"hidden_act\"", R"("quantization_config": {"bits": 4}, "hidden_act")", "quantization_config"},
      {"Softcap", "\"hidden_act\"", "\"final_logit_softcapping\": 30.0, \"hidden_act\"", "final_logit_softcapping|30"},
      {"Experts", "\"hidden_act\"", "\"num_experts\": 8, \"hidden_act\"", "num_experts|got 8"},
      {"MtpLayers", "\"mtp_num_hidden_layers\": 1", "\"mtp_num_hidden_layers\": 2", "mtp_num_hidden_layers|[0, 1]|got 2"},
      {"MtpEmbeddings", "\"hidden_act\"", "\"mtp_use_dedicated_embeddings\": true, \"hidden_act\"", "mtp_use_dedicated_embeddings|false|true"},
      {"LayerType", "\"full_attention\"", "\"sliding_attention\"", "layer_types[2]|\"sliding_attention\""},
      {"LayerTypeNumber", "\"full_attention\"", "3", "layer_types[2]|got 3"},
      {"LayerCount", "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4", "layer_types|4|got 3"},
      {"LayersZero", "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 0", "num_hidden_layers|got 0"},
      {"LayerTypesNoArray", R"(["linear_attention", "linear_attention", "full_attention"])", "7", "layer_types|an array|got 7"},
      {"NoHidden", "\"hidden_size\"", "\"hidden\"", "hidden_size|nothing"},
      {"HiddenText", "\"hidden_size\": 40", "\"hidden_size\": \"40\"", "hidden_size|an integer|\"40\""},
      {"HiddenReal", "\"hidden_size\": 40", "\"hidden_size\": 40.0", "hidden_size|an integer|got 40"},
      {"HiddenNegative", "\"hidden_size\": 40", "\"hidden_size\": -40", "hidden_size|got -40"},
      {"HiddenHuge", "\"hidden_size\": 40", "\"hidden_size\": 99999999999999999999", "hidden_size"},
      {"VocabHuge", "\"vocab_size\": 50", "\"vocab_size\": 16777217", "vocab_size|16777216|16777217"},
      {"HeadsNotDivisible", "\"num_key_value_heads\": 1", "\"num_key_value_heads\": 2", "num_attention_heads|num_key_value_heads 2|got 3"},
      {"LinearHeadsNotDivisible", "\"linear_num_key_heads\": 1", "\"linear_num_key_heads\": 2", "linear_num_value_heads|linear_num_key_heads 2|got 3"},
      {"LinearHeadsMissing", "\"linear_num_value_heads\": 3,", "", "linear_num_value_heads|nothing"},
      {"ConvZero", "\"linear_conv_kernel_dim\": 3", "\"linear_conv_kernel_dim\": 0", "linear_conv_kernel_dim|got 0"},
      {"Eps", "1e-6", "-1", "rms_norm_eps|got -1"},
      {"EosOutside", "\"eos_token_id\": 7", "\"eos_token_id\": 50", "eos_token_id|vocab_size 50|got 50"},
      {"EosListOutside", "\"eos_token_id\": 7", "\"eos_token_id\": [7, 51]", "eos_token_id|entry 1 is 51"},
      {"EosText", "\"eos_token_id\": 7", "\"eos_token_id\": \"</s>\"", "eos_token_id|\"</s>\""},
      {"TieText", "\"tie_word_embeddings\": false", "\"tie_word_embeddings\": \"no\"", "tie_word_embeddings|\"no\""},
  };
  EXPECT_GE(std::size(edits), 45u);
  for (const Edit& edit : edits) {
    for (const bool nested : {false, true}) {
      SCOPED_TRACE(std::string(edit.name) + (nested ? " nested" : ""));
      if (nested && std::string_view(edit.name) == "NoModelType") continue;  // the outer one is there
      const absl::Status status = ParseModelConfig(nested ? Nested(Apply(edit)) : Apply(edit)).status();
      EXPECT_EQ(status.code(), edit.code) << status;
      const std::string message(status.message());
      EXPECT_TRUE(message.starts_with("config.json: ")) << message;
      EXPECT_EQ(message.find('\n'), std::string::npos);
      std::string parts = edit.message;
      for (size_t begin = 0; begin <= parts.size();) {
        const size_t end = std::min(parts.find('|', begin), parts.size());
        const std::string part = parts.substr(begin, end - begin);
        begin = end + 1;
        if (nested && part == "\"qwen3_5_text\"") continue;
        EXPECT_NE(message.find(part), std::string::npos) << part << " in: " << message;
      }
    }
  }
}

TEST(ModelConfigTest, RefusesBadOuterParts) {
  EXPECT_EQ(ParseModelConfig(R"({"model_type":"qwen3_5","text_config":3})").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ParseModelConfig(R"({"model_type":"qwen3_5_moe","text_config":{}})").status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(ParseModelConfig("[]").status().code(), absl::StatusCode::kInvalidArgument);
  const absl::Status tie = ParseModelConfig(Nested(SmallConfigJson(false), R"(,"tie_word_embeddings":true)")).status();
  EXPECT_NE(tie.message().find("tie_word_embeddings"), absl::string_view::npos) << tie;
  const absl::Status eos = ParseModelConfig(SmallConfigJson(false), R"({"eos_token_id":-1})").status();
  EXPECT_EQ(eos.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(std::string(eos.message()).starts_with("generation_config.json: eos_token_id")) << eos;
}

TEST(ModelConfigTest, ReadsAFolder) {
  const TempDir directory;
  EXPECT_EQ(LoadModelConfig(directory.path()).status().code(), absl::StatusCode::kNotFound);
  WriteFile(directory.path() + "/config.json", SmallConfigJson(false));
  ASSERT_TRUE(LoadModelConfig(directory.path()).ok());
  WriteFile(directory.path() + "/generation_config.json", R"({"eos_token_id": 3})");
  EXPECT_EQ(LoadModelConfig(directory.path()).value().eos_token_ids, (std::vector<uint32_t>{7, 3}));
  WriteFile(directory.path() + "/generation_config.json", "");
  EXPECT_FALSE(LoadModelConfig(directory.path()).ok());
  WriteFile(directory.path() + "/generation_config.json", "[");
  const absl::Status status = LoadModelConfig(directory.path()).status();
  EXPECT_NE(std::string(status.message()).find(directory.path() + "/generation_config.json"), std::string::npos) << status;
}

}  // namespace
}  // namespace bebop
