// SPDX-License-Identifier: Apache-2.0
#include "tests/support/checkpoint_writer.h"

#include <stdlib.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <utility>

#include "engine/formats/safetensors.h"
#include "engine/formats/strings.h"
#include "kernels/common/check.h"
#include "kernels/common/dtype.h"

namespace bebop {
namespace {

// An independent half conversion for test values: the definition, not the loader's trick.
float HalfValue(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  const double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return static_cast<float>((bits & 0x8000) != 0 ? -magnitude : magnitude);
}

uint16_t HalfBits(float value) {
  // Magnitudes grow with their bits: the last half not above |value|, or its neighbour.
  uint16_t low = 0, high = 0x7BFF;
  while (low < high) {
    const uint16_t middle = static_cast<uint16_t>((low + high + 1) / 2);
    if (HalfValue(middle) <= std::fabs(value)) {
      low = middle;
    } else {
      high = static_cast<uint16_t>(middle - 1);
    }
  }
  const uint16_t next = static_cast<uint16_t>(low + 1);
  const bool round_up = next < 0x7C00 && HalfValue(next) - std::fabs(value) < std::fabs(value) - HalfValue(low);
  return static_cast<uint16_t>((round_up ? next : low) | (std::signbit(value) ? 0x8000 : 0));
}

template <typename T>
void Append(std::string& bytes, T value) {
  bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

}  // namespace

int64_t TestTensor::num_elements() const {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

float TestTensor::Value(int64_t index) const {
  if (dtype == "F32") {
    float value;
    std::memcpy(&value, bytes.data() + 4 * index, sizeof(value));
    return value;
  }
  uint16_t word;
  std::memcpy(&word, bytes.data() + 2 * index, sizeof(word));
  return dtype == "F16" ? HalfValue(word) : ToFloat(BFloat16{word});
}

TestTensor MakeTensor(std::string name, std::string dtype, std::vector<int64_t> shape, const std::vector<float>& values) {
  TestTensor tensor{std::move(name), std::move(dtype), std::move(shape), {}};
  BEBOP_CHECK(static_cast<int64_t>(values.size()) == tensor.num_elements());
  for (const float value : values) {
    if (tensor.dtype == "F32") {
      Append(tensor.bytes, value);
    } else {
      Append(tensor.bytes, tensor.dtype == "F16" ? HalfBits(value) : ToBFloat16(value).bits);
    }
  }
  return tensor;
}

std::vector<TestTensor> MakeModelTensors(const ModelConfig& config, bool with_mtp, const std::string& dtype, uint32_t seed) {
  std::vector<TestTensor> tensors;
  std::mt19937 random(seed);
  const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = static_cast<float>(static_cast<int32_t>(random() % 4001) - 2000) / 1024.0f;
    tensors.push_back(MakeTensor(name, dtype, std::move(shape), values));
  };
  const int64_t hidden = config.hidden_size, ffn = config.intermediate_size, head_dim = config.head_dim;
  const int64_t key_value = config.num_key_value_heads * head_dim, query = config.num_attention_heads * head_dim;
  const auto add_layer = [&](const std::string& layer, LayerKind kind) {
    add(layer + "input_layernorm.weight", {hidden});
    if (kind == LayerKind::kLinearAttention) {
      const std::string block = layer + "linear_attn.";
      const int64_t heads = config.linear_num_value_heads, width = heads * config.linear_value_head_dim;
      const int64_t channels = 2 * config.linear_num_key_heads * config.linear_key_head_dim + width;
      add(block + "A_log", {heads});
      add(block + "conv1d.weight", {channels, 1, config.linear_conv_kernel_dim});
      add(block + "dt_bias", {heads});
      add(block + "in_proj_a.weight", {heads, hidden});
      add(block + "in_proj_b.weight", {heads, hidden});
      add(block + "in_proj_qkv.weight", {channels, hidden});
      add(block + "in_proj_z.weight", {width, hidden});
      add(block + "norm.weight", {config.linear_value_head_dim});
      add(block + "out_proj.weight", {hidden, width});
    } else {
      const std::string block = layer + "self_attn.";
      add(block + "k_norm.weight", {head_dim});
      add(block + "k_proj.weight", {key_value, hidden});
      add(block + "o_proj.weight", {hidden, query});
      add(block + "q_norm.weight", {head_dim});
      add(block + "q_proj.weight", {2 * query, hidden});
      add(block + "v_proj.weight", {key_value, hidden});
    }
    add(layer + "mlp.down_proj.weight", {hidden, ffn});
    add(layer + "mlp.gate_proj.weight", {ffn, hidden});
    add(layer + "mlp.up_proj.weight", {ffn, hidden});
    add(layer + "post_attention_layernorm.weight", {hidden});
  };
  if (!config.tie_word_embeddings) add("lm_head.weight", {config.vocab_size, hidden});
  add(config.tensor_prefix + "embed_tokens.weight", {config.vocab_size, hidden});
  for (size_t i = 0; i < config.layers.size(); ++i) add_layer(StrCat(config.tensor_prefix, "layers.", i, "."), config.layers[i]);
  add(config.tensor_prefix + "norm.weight", {hidden});
  if (with_mtp) {
    add("mtp.fc.weight", {hidden, 2 * hidden});
    add_layer("mtp.layers.0.", LayerKind::kFullAttention);
    add("mtp.norm.weight", {hidden});
    add("mtp.pre_fc_norm_embedding.weight", {hidden});
    add("mtp.pre_fc_norm_hidden.weight", {hidden});
  }
  return tensors;
}

std::string SafetensorsBytes(const std::vector<TestTensor>& tensors) {
  std::string header = "{\"__metadata__\":{\"format\":\"pt\"}", data;
  for (const TestTensor& tensor : tensors) {
    header += StrCat(",\"", tensor.name, "\":{\"dtype\":\"", tensor.dtype, "\",\"shape\":", ShapeString(tensor.shape), ",\"data_offsets\":[",
                     data.size(), ",", data.size() + tensor.bytes.size(), "]}");
    data += tensor.bytes;
  }
  return SafetensorsBytes(header + "}", data);
}

std::string SafetensorsBytes(std::string_view header_json, std::string_view data) {
  std::string file;
  Append(file, static_cast<uint64_t>(header_json.size()));
  return file.append(header_json).append(data);
}

std::string IndexJson(const std::vector<std::pair<std::string, std::vector<TestTensor>>>& shards) {
  std::string json = "{\"metadata\":{\"total_size\":1},\"weight_map\":{";
  bool first = true;
  for (const auto& [file, tensors] : shards) {
    for (const TestTensor& tensor : tensors) {
      json += StrCat(first ? "" : ",", "\"", tensor.name, "\":\"", file, "\"");
      first = false;
    }
  }
  return json + "}}";
}

void WriteFile(const std::string& path, std::string_view bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  BEBOP_CHECK(file.good());
}

TempDir::TempDir() {
  std::string name = (std::filesystem::temp_directory_path() / "bebop-test-XXXXXX").string();
  BEBOP_CHECK(mkdtemp(name.data()) != nullptr);
  path_ = name;
}

TempDir::~TempDir() {
  std::error_code ignored;  // a destructor has nobody to tell
  std::filesystem::remove_all(path_, ignored);
}

std::string SmallConfigJson(bool tied) {
  return StrCat(
      R"({"model_type": "qwen3_5_text", "hidden_size": 40, "intermediate_size": 24, "vocab_size": 50, "num_hidden_layers": 3,
          "layer_types": ["linear_attention", "linear_attention", "full_attention"], "num_attention_heads": 3, "num_key_value_heads": 1,
          "head_dim": 8, "linear_num_key_heads": 1, "linear_num_value_heads": 3, "linear_key_head_dim": 4, "linear_value_head_dim": 6,
          "linear_conv_kernel_dim": 3, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": false,
          "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
          "mtp_num_hidden_layers": 1, "eos_token_id": 7, "max_position_embeddings": 4096, "tie_word_embeddings": )",
      tied ? "true" : "false", "}");
}

}  // namespace bebop
