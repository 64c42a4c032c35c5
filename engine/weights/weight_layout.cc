// SPDX-License-Identifier: Apache-2.0
#include "engine/weights/weight_layout.h"

#include <utility>

#include "engine/base/status_macros.h"
#include "engine/formats/strings.h"
#include "kernels/common/check.h"

namespace bebop {
namespace {

constexpr int64_t kAlignment = 256;  // what kRows asks for, and a multiple of what panels want

// Lays the model out in an arena that begins at address `base`. With base 0 it only measures and lists: the pointers are offsets.
class LayoutBuilder {
 public:
  LayoutBuilder(const ModelConfig& config, DType dtype, MatrixLayout matrix_layout, uintptr_t base)
      : config_(config), dtype_(dtype), matrix_layout_(matrix_layout), base_(base), weights_(std::make_unique<ModelWeights>()) {}

  void Build(bool with_mtp) {
    const int64_t width = config_.hidden_size;
    const auto text = [](std::string_view suffix) { return StrCat(kTextPrefix, suffix); };
    const TensorRole embedding_role = config_.tie_word_embeddings ? TensorRole::kLmHead : TensorRole::kEmbedding;
    weights_->embedding = Matrix(text("embed_tokens.weight"), config_.vocab_size, width, embedding_role);
    const int64_t layers_begin = bytes_;
    weights_->layers.resize(config_.layers.size());
    for (size_t i = 0; i < config_.layers.size(); ++i) {
      weights_->layers[i] = Layer(text(StrCat("layers.", i, ".")), config_.layers[i]);
    }
    weights_->final_norm = Values(text("norm.weight"), {width}, TensorRole::kZeroCentredNorm);
    weights_->layer_bytes = bytes_ - layers_begin;
    weights_->lm_head = weights_->embedding;
    weights_->lm_head_bytes = MatrixBytes(config_.vocab_size, width);
    if (!config_.tie_word_embeddings) {
      weights_->lm_head = Matrix("lm_head.weight", config_.vocab_size, width, TensorRole::kLmHead);
    }
    if (with_mtp) BuildMtp();
    weights_->storage_bytes = bytes_;
  }

  int64_t bytes() const { return bytes_; }
  std::vector<TensorSlot> TakeSlots() { return std::move(slots_); }
  std::unique_ptr<ModelWeights> TakeWeights() { return std::move(weights_); }

 private:
  uintptr_t Take(int64_t bytes) {
    const uintptr_t address = base_ + static_cast<uintptr_t>(bytes_);
    bytes_ += RoundUp(bytes, kAlignment);
    return address;
  }

  int64_t MatrixBytes(int64_t rows, int64_t cols) const {
    return matrix_layout_ == MatrixLayout::kPanels ? PackedBytes(dtype_, rows, cols) : rows * cols * ElementBytes(dtype_);
  }

  PackedMatrix NewMatrix(int64_t rows, int64_t cols) {
    return {reinterpret_cast<const void*>(Take(MatrixBytes(rows, cols))), dtype_, rows, cols, matrix_layout_};
  }

  void AddRows(std::string name, const PackedMatrix& matrix, int64_t first_row, int64_t rows, TensorRole role) {
    slots_.push_back({.name = std::move(name), .shape = {rows, matrix.cols}, .role = role, .mtp = in_mtp_, .matrix = matrix, .first_row = first_row});
  }

  PackedMatrix Matrix(std::string name, int64_t rows, int64_t cols, TensorRole role) {
    const PackedMatrix matrix = NewMatrix(rows, cols);
    AddRows(std::move(name), matrix, 0, rows, role);
    return matrix;
  }

  const float* Values(std::string name, std::vector<int64_t> shape, TensorRole role) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    float* values = reinterpret_cast<float*>(Take(count * static_cast<int64_t>(sizeof(float))));
    slots_.push_back({.name = std::move(name), .shape = std::move(shape), .role = role, .mtp = in_mtp_, .values = values});
    return values;
  }

  LayerWeights Layer(const std::string& prefix, LayerKind kind) {
    LayerWeights layer;
    layer.input_norm = Values(StrCat(prefix, "input_layernorm.weight"), {config_.hidden_size}, TensorRole::kZeroCentredNorm);
    if (kind == LayerKind::kLinearAttention) {
      layer.linear = LinearAttention(StrCat(prefix, "linear_attn."));
    } else {
      layer.full = FullAttention(StrCat(prefix, "self_attn."));
    }
    layer.post_attention_norm =
        Values(StrCat(prefix, "post_attention_layernorm.weight"), {config_.hidden_size}, TensorRole::kZeroCentredNorm);
    const GateUpSegments segments = MlpSegments(config_);
    layer.mlp.gate_up = NewMatrix(segments.total, config_.hidden_size);
    AddRows(StrCat(prefix, "mlp.gate_proj.weight"), layer.mlp.gate_up, segments.gate, config_.intermediate_size, TensorRole::kInProjection);
    AddRows(StrCat(prefix, "mlp.up_proj.weight"), layer.mlp.gate_up, segments.up, config_.intermediate_size, TensorRole::kInProjection);
    layer.mlp.down = Matrix(StrCat(prefix, "mlp.down_proj.weight"), config_.hidden_size, config_.intermediate_size, TensorRole::kOutProjection);
    return layer;
  }

  LinearAttentionWeights LinearAttention(const std::string& prefix) {
    LinearAttentionWeights linear;
    const LinearAttentionSegments segments = LinearSegments(config_);
    const int64_t num_heads = config_.linear_num_value_heads;
    linear.in = NewMatrix(segments.total, config_.hidden_size);
    AddRows(StrCat(prefix, "in_proj_qkv.weight"), linear.in, segments.qkv, config_.conv_channels(), TensorRole::kInProjection);
    AddRows(StrCat(prefix, "in_proj_z.weight"), linear.in, segments.z, config_.linear_value_width(), TensorRole::kInProjection);
    AddRows(StrCat(prefix, "in_proj_b.weight"), linear.in, segments.b, num_heads, TensorRole::kInProjection);
    AddRows(StrCat(prefix, "in_proj_a.weight"), linear.in, segments.a, num_heads, TensorRole::kDecayProjection);
    linear.conv = Values(StrCat(prefix, "conv1d.weight"), {config_.conv_channels(), 1, config_.linear_conv_kernel_dim}, TensorRole::kConv);
    linear.a_log = Values(StrCat(prefix, "A_log"), {num_heads}, TensorRole::kDecayRate);
    linear.dt_bias = Values(StrCat(prefix, "dt_bias"), {num_heads}, TensorRole::kDecayBias);
    linear.norm = Values(StrCat(prefix, "norm.weight"), {config_.linear_value_head_dim}, TensorRole::kPlainNorm);
    linear.out = Matrix(StrCat(prefix, "out_proj.weight"), config_.hidden_size, config_.linear_value_width(), TensorRole::kOutProjection);
    return linear;
  }

  FullAttentionWeights FullAttention(const std::string& prefix) {
    FullAttentionWeights full;
    const FullAttentionSegments segments = FullSegments(config_);
    const int64_t query_width = int64_t{1} * config_.num_attention_heads * config_.head_dim;
    const int64_t key_width = int64_t{1} * config_.num_key_value_heads * config_.head_dim;
    full.qkv = NewMatrix(segments.total, config_.hidden_size);
    AddRows(StrCat(prefix, "q_proj.weight"), full.qkv, segments.q_gate, 2 * query_width, TensorRole::kInProjection);
    AddRows(StrCat(prefix, "k_proj.weight"), full.qkv, segments.k, key_width, TensorRole::kInProjection);
    AddRows(StrCat(prefix, "v_proj.weight"), full.qkv, segments.v, key_width, TensorRole::kInProjection);
    full.q_norm = Values(StrCat(prefix, "q_norm.weight"), {config_.head_dim}, TensorRole::kZeroCentredNorm);
    full.k_norm = Values(StrCat(prefix, "k_norm.weight"), {config_.head_dim}, TensorRole::kZeroCentredNorm);
    full.out = Matrix(StrCat(prefix, "o_proj.weight"), config_.hidden_size, query_width, TensorRole::kOutProjection);
    return full;
  }

  void BuildMtp() {
    const int64_t width = config_.hidden_size;
    const int64_t begin = bytes_;
    in_mtp_ = true;
    MtpWeights& mtp = weights_->mtp.emplace();
    mtp.pre_fc_norm_embedding = Values("mtp.pre_fc_norm_embedding.weight", {width}, TensorRole::kZeroCentredNorm);
    mtp.pre_fc_norm_hidden = Values("mtp.pre_fc_norm_hidden.weight", {width}, TensorRole::kZeroCentredNorm);
    mtp.fc = Matrix("mtp.fc.weight", width, 2 * width, TensorRole::kInProjection);
    mtp.layer = Layer("mtp.layers.0.", LayerKind::kFullAttention);
    mtp.norm = Values("mtp.norm.weight", {width}, TensorRole::kZeroCentredNorm);
    in_mtp_ = false;
    weights_->mtp_bytes = bytes_ - begin;
  }

  const ModelConfig& config_;
  const DType dtype_;
  const MatrixLayout matrix_layout_;
  const uintptr_t base_;
  int64_t bytes_ = 0;
  bool in_mtp_ = false;
  std::vector<TensorSlot> slots_;
  std::unique_ptr<ModelWeights> weights_;
};

}  // namespace

std::string SlotName(std::string_view name) {
  if (name.starts_with("model.mtp.")) return std::string(name.substr(std::string_view("model.").size()));
  for (const std::string_view prefix : {"model.language_model.", "model."}) {
    if (name.starts_with(prefix)) return StrCat(kTextPrefix, name.substr(prefix.size()));
  }
  return std::string(name);
}

std::vector<TensorSlot> ListTensors(const ModelConfig& config, bool with_mtp) {
  LayoutBuilder builder(config, DType::kFloat32, MatrixLayout::kPanels, 0);
  builder.Build(with_mtp);
  std::vector<TensorSlot> slots = builder.TakeSlots();
  for (TensorSlot& slot : slots) {
    slot.matrix.data = nullptr;
    slot.values = nullptr;
  }
  return slots;
}

int64_t WeightBytes(const ModelConfig& config, DType dtype, bool with_mtp, MatrixLayout matrix_layout) {
  LayoutBuilder builder(config, dtype, matrix_layout, 0);
  builder.Build(with_mtp);
  return builder.bytes();
}

absl::StatusOr<WeightLayout> AllocateWeights(const ModelConfig& config, DType dtype, bool with_mtp, DeviceMemory* memory) {
  const MatrixLayout matrix_layout = memory->is_host() ? MatrixLayout::kPanels : MatrixLayout::kRows;
  const int64_t bytes = WeightBytes(config, dtype, with_mtp, matrix_layout);
  BEBOP_ASSIGN_OR_RETURN(std::shared_ptr<void> arena, memory->Allocate(bytes, StrCat(DTypeName(dtype), " weights")));

  LayoutBuilder builder(config, dtype, matrix_layout, reinterpret_cast<uintptr_t>(arena.get()));
  builder.Build(with_mtp);
  BEBOP_CHECK(builder.bytes() == bytes);
  WeightLayout layout;
  layout.slots = builder.TakeSlots();
  layout.weights = builder.TakeWeights();
  layout.weights->storage = std::move(arena);
  return layout;
}

std::vector<TensorSlot> SlotsOf(const ModelConfig& config, const ModelWeights& weights) {
  LayoutBuilder builder(config, weights.embedding.dtype, weights.embedding.layout, reinterpret_cast<uintptr_t>(weights.storage.get()));
  builder.Build(weights.mtp.has_value());
  BEBOP_CHECK(builder.bytes() == weights.storage_bytes);
  return builder.TakeSlots();
}

}  // namespace bebop
