// SPDX-License-Identifier: Apache-2.0
#include "tests/integration/self_identifying.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "kernels/common/check.h"

namespace bebop::test {
namespace {

constexpr int64_t kConstant = kNumIds;  // the dimension behind those of the versions

// A tensor as a matrix [rows, columns] to write into.
class Entries {
 public:
  explicit Entries(TestTensor* tensor) : tensor_(tensor) {
    BEBOP_CHECK(tensor->dtype == "F32");
    std::fill(tensor->bytes.begin(), tensor->bytes.end(), '\0');
  }
  void Set(int64_t row, int64_t column, float value) {
    const int64_t columns = tensor_->num_elements() / tensor_->shape[0];
    std::memcpy(tensor_->bytes.data() + 4 * (row * columns + column), &value, sizeof(value));
  }
  void Fill(float value) {
    for (int64_t i = 0; i < tensor_->num_elements(); ++i) std::memcpy(tensor_->bytes.data() + 4 * i, &value, sizeof(value));
  }

 private:
  TestTensor* const tensor_;
};

bool EndsWith(std::string_view text, std::string_view end) { return text.size() >= end.size() && text.substr(text.size() - end.size()) == end; }

}  // namespace

std::string SelfIdentifyingConfigJson() {
  return R"({"model_type": "qwen3_5_text", "hidden_size": 40, "intermediate_size": 24, "vocab_size": 50, "num_hidden_layers": 2,
      "layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
      "linear_num_key_heads": 1, "linear_num_value_heads": 1, "linear_key_head_dim": 4, "linear_value_head_dim": 16,
      "linear_conv_kernel_dim": 3, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": false,
      "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
      "mtp_num_hidden_layers": 1, "eos_token_id": 49, "max_position_embeddings": 1024, "tie_word_embeddings": false})";
}

std::vector<TestTensor> SelfIdentifyingTensors(const ModelConfig& config, int64_t version, Caches caches) {
  const int64_t id = TokenOf(version);
  const int64_t in = 5 * id % kNumIds;  // where a block's first matrix puts the version
  const auto out = [id](int64_t j) { return (j - 4 * id % kNumIds + kNumIds) % kNumIds; };
  // Small values that differ between versions, for all that is not overwritten.
  std::vector<TestTensor> tensors = MakeModelTensors(config, /*with_mtp=*/true, "F32", static_cast<uint32_t>(version) + 1);
  for (TestTensor& tensor : tensors) {
    const std::string& name = tensor.name;
    const bool mtp = name.rfind("mtp.", 0) == 0;
    const auto is = [&](std::string_view end) { return EndsWith(name, end); };
    if (!is("linear_attn.norm.weight") && is("norm.weight")) {
      Entries(&tensor).Fill(static_cast<float>(version % 997) / 8192);  // a scale of nearly 1, in bytes that tell the version
    } else if (mtp && (is("o_proj.weight") || is("down_proj.weight"))) {
      Entries(&tensor).Fill(0);  // the MTP layer hands the target's state through, so that drafts are right
    } else if (name == "mtp.fc.weight") {
      Entries entries(&tensor);
      for (int64_t i = 0; i < config.hidden_size; ++i) entries.Set(i, config.hidden_size + i, 1);
      entries.Set(config.hidden_size - 1, 0, static_cast<float>(version % 997) + 1);  // of a dimension that nobody reads
    } else if (mtp) {
      continue;
    } else if (is("embed_tokens.weight")) {
      Entries entries(&tensor);
      for (int64_t token = 0; token < config.vocab_size; ++token) {
        entries.Set(token, kConstant, 4);
        entries.Set(token, id, 1);
      }
    } else if (name == "lm_head.weight") {
      Entries entries(&tensor);
      entries.Set(id, id, 100);
      for (int64_t other = 0; other < kNumIds; ++other) {
        if (other != id) entries.Set(kTorn, other, 1e4f);
      }
    } else if (is("mlp.gate_proj.weight")) {
      Entries entries(&tensor);
      for (int64_t j = 0; j < config.intermediate_size; ++j) entries.Set(j, kConstant, 1);
    } else if (is("mlp.up_proj.weight")) {
      Entries(&tensor).Set(in, kConstant, 1);
    } else if (is("mlp.down_proj.weight")) {
      Entries entries(&tensor);
      for (int64_t j = 0; j < kNumIds; ++j) entries.Set(out(j), j, 0.5f);
    } else if (is("self_attn.v_proj.weight")) {
      Entries(&tensor).Set(in, kConstant, 1);
    } else if (is("self_attn.o_proj.weight")) {
      Entries entries(&tensor);
      for (int64_t j = 0; j < config.num_attention_heads * kNumIds && caches == Caches::kShow; ++j) entries.Set(out(j % kNumIds), j, 0.5f);
    } else if (is("linear_attn.in_proj_qkv.weight")) {
      Entries entries(&tensor);
      const int64_t keys = config.linear_num_key_heads * config.linear_key_head_dim;
      entries.Set(0, kConstant, 1);
      entries.Set(keys, kConstant, 1);
      entries.Set(2 * keys + in, kConstant, 1);
    } else if (is("linear_attn.conv1d.weight")) {
      Entries(&tensor).Fill(1);  // the window's inputs count, too
    } else if (is("linear_attn.in_proj_z.weight")) {
      Entries entries(&tensor);
      for (int64_t j = 0; j < kNumIds; ++j) entries.Set(j, kConstant, 1);
    } else if (is("linear_attn.in_proj_a.weight") || is("linear_attn.in_proj_b.weight")) {
      Entries(&tensor).Fill(0);
    } else if (is("linear_attn.A_log")) {
      Entries(&tensor).Fill(-2);  // forgets slowly
    } else if (is("linear_attn.norm.weight")) {
      Entries(&tensor).Fill(1);
    } else if (is("linear_attn.out_proj.weight")) {
      Entries entries(&tensor);
      for (int64_t j = 0; j < kNumIds && caches == Caches::kShow; ++j) entries.Set(out(j), j, 0.5f);
    }
  }
  return tensors;
}

Digests DigestsOf(const std::vector<TestTensor>& tensors) {
  std::vector<TensorInfo> infos;
  for (const TestTensor& tensor : tensors) {
    TensorInfo info;
    info.name = tensor.name;
    info.form = DType::kFloat32;
    info.shape = tensor.shape;
    info.mtp = tensor.name.rfind("mtp.", 0) == 0;
    info.digest = Sha256Of(tensor.bytes);
    infos.push_back(std::move(info));
  }
  return {ComponentDigest(infos, false), ComponentDigest(infos, true)};
}

}  // namespace bebop::test
