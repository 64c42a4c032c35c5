// SPDX-License-Identifier: Apache-2.0
#include "tests/engine/model/model_harness.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "kernels/common/check.h"

namespace bebop {
namespace {

// 0xff bytes are a NaN both as float32 and as bfloat16.
void Poison(void* data, int64_t bytes, DeviceMemory& memory) {
  const std::vector<char> nans(static_cast<size_t>(bytes), '\xff');
  memory.CopyIn(data, nans.data(), bytes);
}

void PoisonPages(const KvPagesView& pages, DeviceMemory& memory) {
  const int64_t bytes = static_cast<int64_t>(pages.num_pages) * pages.num_kv_heads * pages.page_tokens * pages.head_dim *
                        ElementBytes(pages.dtype);
  Poison(pages.k, bytes, memory);
  Poison(pages.v, bytes, memory);
}

void PoisonState(const ModelState& state, DeviceMemory& memory) {
  for (const KvPagesView& pages : state.kv) PoisonPages(pages, memory);
  PoisonPages(state.mtp_kv, memory);
  for (const LinearStateView& view : state.linear) {
    const int64_t slots = view.num_slots, rows = slots * view.window;
    const int64_t wide = ElementBytes(DType::kFloat32), input = ElementBytes(view.input_dtype);
    Poison(view.matrix, slots * view.num_value_heads * view.key_head_dim * view.value_head_dim * wide, memory);
    Poison(view.conv_inputs, slots * (view.conv_width - 1 + view.window) * view.conv_channels() * input, memory);
    Poison(view.window_k, rows * view.num_key_heads * view.key_head_dim * input, memory);
    Poison(view.window_v, rows * view.num_value_heads * view.value_head_dim * input, memory);
    Poison(view.window_gate, rows * view.num_value_heads * 2 * wide, memory);
  }
}

template <typename Value>
void Take(std::vector<Value>& values, Value* out) {
  BEBOP_CHECK(!values.empty());
  *out = values.back();
  values.pop_back();
}

}  // namespace

Matrix Matrix::Rows(int64_t begin, int64_t count) const {
  Matrix part(count, cols);
  std::copy_n(values.begin() + begin * cols, count * cols, part.values.begin());
  return part;
}

void Matrix::Append(const Matrix& other) {
  if (rows == 0) cols = other.cols;
  BEBOP_CHECK(cols == other.cols);
  values.insert(values.end(), other.values.begin(), other.values.end());
  rows += other.rows;
}

ModelHarness::ModelHarness(const ModelConfig& config, const ModelWeights* weights, const HarnessOptions& options)
    : ModelHarness(config, weights, options, DType::kFloat32, nullptr, nullptr) {}

ModelHarness::ModelHarness(const ModelConfig& config, const ModelWeights* weights, const HarnessOptions& options, DType activation_dtype,
                           DeviceMemory* memory, Ops* ops)
    : config_(config),
      options_(options),
      pool_(options.num_threads),
      own_memory_(memory == nullptr ? MakeHostMemory() : nullptr),
      own_ops_(ops == nullptr ? MakeCpuOps(&pool_) : nullptr),
      memory_(memory == nullptr ? *own_memory_ : *memory),
      model_(*Model::Create(config, options.max_rows, activation_dtype, ops == nullptr ? own_ops_.get() : ops, &memory_)),
      storage_(*ModelStateStorage::Create(config, {.kv_dtype = options.kv_dtype,
                                                   .num_pages = options.num_pages,
                                                   .page_tokens = options.page_tokens,
                                                   .num_slots = options.num_slots,
                                                   .window = options.window,
                                                   .input_dtype = activation_dtype}, &memory_)),
      free_pages_(options.num_pages),
      page_uses_(options.num_pages),
      free_slots_(options.num_slots),
      slot_uses_(options.num_slots) {
  model_->SetWeights(weights);
  PoisonState(storage_->state(), memory_);
  std::mt19937 random(options.seed);
  std::iota(free_pages_.begin(), free_pages_.end(), 0);
  std::iota(free_slots_.begin(), free_slots_.end(), 0);
  std::shuffle(free_pages_.begin(), free_pages_.end(), random);
  std::shuffle(free_slots_.begin(), free_slots_.end(), random);
}

void ModelHarness::Upload(Arrays& arrays) {
  const int32_t num_rows = static_cast<int32_t>(arrays.tokens.size());
  RaggedBatch& batch = arrays.batch;
  for (size_t s = 0; s < arrays.sequences.size(); ++s) {
    const SequenceRows& sequence = arrays.sequences[s];
    batch.max_sequence_rows = std::max(batch.max_sequence_rows, sequence.num_rows);
    batch.max_positions = std::max(batch.max_positions, sequence.first_position + sequence.num_rows);
    for (int32_t i = 0; i < sequence.num_rows; ++i) {
      arrays.row_sequence.push_back(static_cast<int32_t>(s));
      arrays.row_position.push_back(sequence.first_position + i);
    }
  }
  const bool is_host = memory_.is_host();
  if (!is_host) {
    arrays.tokens.resize(arrays.tokens.size() + options_.num_padding_rows, 0);
    arrays.row_sequence.resize(arrays.tokens.size(), -1);
    arrays.row_position.resize(arrays.tokens.size(), 0);
    for (int32_t i = 0; i < options_.num_padding_sequences; ++i) {
      arrays.sequences.push_back({.first_row = num_rows});
    }
  }
  const auto upload = [&]<typename Value>(const std::vector<Value>& values) -> const Value* {
    const int64_t bytes = static_cast<int64_t>(values.size() * sizeof(Value));
    arrays.memory.push_back(*memory_.Allocate(bytes, "test"));
    if (bytes > 0) memory_.CopyIn(arrays.memory.back().get(), values.data(), bytes);
    return static_cast<const Value*>(arrays.memory.back().get());
  };
  batch.num_sequences = static_cast<int32_t>(arrays.sequences.size());
  batch.num_rows = static_cast<int32_t>(arrays.tokens.size());
  batch.sequences = upload(arrays.sequences);
  batch.page_ids = upload(arrays.page_ids);
  arrays.device_tokens = upload(arrays.tokens);
  if (is_host) return;  // the model makes its own row maps
  batch.row_sequence = upload(arrays.row_sequence);
  batch.row_position = upload(arrays.row_position);
}

TensorView ModelHarness::NewRows(int64_t rows, int64_t cols, DType dtype, std::shared_ptr<void>* owner) {
  const int64_t bytes = rows * cols * ElementBytes(dtype);
  *owner = *memory_.Allocate(bytes, "test");
  Poison(owner->get(), bytes, memory_);
  return {owner->get(), dtype, rows, cols, cols};
}

TensorView ModelHarness::ToDevice(const Matrix& matrix, std::shared_ptr<void>* owner) {
  const int64_t padding = memory_.is_host() ? 0 : options_.num_padding_rows;
  const TensorView view = NewRows(matrix.rows + padding, matrix.cols, model_->activation_dtype(), owner);
  if (view.dtype == DType::kFloat32) {
    memory_.CopyIn(view.data, matrix.values.data(), static_cast<int64_t>(matrix.values.size() * sizeof(float)));
  } else {
    std::vector<BFloat16> narrow(matrix.values.size());
    std::transform(matrix.values.begin(), matrix.values.end(), narrow.begin(), ToBFloat16);
    memory_.CopyIn(view.data, narrow.data(), static_cast<int64_t>(narrow.size() * sizeof(BFloat16)));
  }
  return view;
}

Matrix ModelHarness::FromDevice(const TensorView& view, int64_t rows) {
  Matrix matrix(rows, view.cols);
  if (view.dtype == DType::kFloat32) {
    memory_.CopyOut(matrix.values.data(), view.data, static_cast<int64_t>(matrix.values.size() * sizeof(float)));
  } else {
    std::vector<BFloat16> narrow(matrix.values.size());
    memory_.CopyOut(narrow.data(), view.data, static_cast<int64_t>(narrow.size() * sizeof(BFloat16)));
    std::transform(narrow.begin(), narrow.end(), matrix.values.begin(), [](BFloat16 value) { return ToFloat(value); });
  }
  BEBOP_CHECK(memory_.status().ok());
  return matrix;
}

void ModelHarness::GrowPages(Sequence& sequence, int32_t num_tokens) {
  while (static_cast<int32_t>(sequence.pages.size()) * options_.page_tokens < num_tokens) {
    int32_t page;
    Take(free_pages_, &page);
    page_uses_[page] = 1;
    sequence.pages.push_back(page);
  }
}

int32_t ModelHarness::TakeSlot() {
  int32_t slot;
  Take(free_slots_, &slot);
  slot_uses_[slot] = 1;
  return slot;
}

Matrix ModelHarness::Target(const std::vector<TargetRows>& rows) {
  Arrays arrays;
  std::vector<int32_t> old_slots;
  for (const TargetRows& part : rows) {
    Sequence& sequence = *part.sequence;
    SequenceRows& out = arrays.sequences.emplace_back();
    out.first_row = static_cast<int32_t>(arrays.tokens.size());
    out.num_known_rows = static_cast<int32_t>(part.known.size());
    out.num_rows = static_cast<int32_t>(part.known.size() + part.drafts.size());
    out.num_replay_rows = sequence.num_replay;
    out.first_position = sequence.num_computed;
    out.state_src = sequence.slot;
    out.state_dst = TakeSlot();
    out.first_page = static_cast<int32_t>(arrays.page_ids.size());
    arrays.tokens.insert(arrays.tokens.end(), part.known.begin(), part.known.end());
    arrays.tokens.insert(arrays.tokens.end(), part.drafts.begin(), part.drafts.end());
    GrowPages(sequence, sequence.num_computed + out.num_rows);
    arrays.page_ids.insert(arrays.page_ids.end(), sequence.pages.begin(), sequence.pages.end());
    old_slots.push_back(sequence.slot);
    sequence.slot = out.state_dst;
    sequence.num_computed += out.num_known_rows;
    sequence.num_replay = 0;
  }
  const int64_t num_rows = static_cast<int64_t>(arrays.tokens.size());
  Upload(arrays);
  std::shared_ptr<void> owner;
  const TensorView hidden = NewRows(arrays.batch.num_rows, config_.hidden_size, model_->activation_dtype(), &owner);
  model_->ForwardTarget(arrays.device_tokens, arrays.batch, storage_->state(), hidden);
  for (int32_t slot : old_slots) {
    if (slot >= 0 && --slot_uses_[slot] == 0) free_slots_.push_back(slot);
  }
  return FromDevice(hidden, num_rows);
}

void ModelHarness::Accept(Sequence& sequence, int32_t count) {
  sequence.num_replay = count;
  sequence.num_computed += count;
}

Matrix ModelHarness::Mtp(const std::vector<MtpRows>& rows, Matrix previous) { return RunMtp(rows, std::move(previous), nullptr); }

Matrix ModelHarness::RunMtp(const std::vector<MtpRows>& rows, Matrix previous, const MtpChain* chain) {
  Arrays arrays;
  for (const MtpRows& part : rows) {
    SequenceRows& out = arrays.sequences.emplace_back();
    out.first_row = static_cast<int32_t>(arrays.tokens.size());
    out.num_rows = out.num_known_rows = static_cast<int32_t>(part.next_tokens.size());
    out.first_position = part.first_position;
    out.first_page = static_cast<int32_t>(arrays.page_ids.size());
    arrays.tokens.insert(arrays.tokens.end(), part.next_tokens.begin(), part.next_tokens.end());
    if (chain == nullptr) GrowPages(*part.sequence, part.first_position + out.num_rows);
    arrays.page_ids.insert(arrays.page_ids.end(), part.sequence->pages.begin(), part.sequence->pages.end());
  }
  const int64_t num_rows = static_cast<int64_t>(arrays.tokens.size());
  BEBOP_CHECK(previous.rows == num_rows);
  Upload(arrays);
  std::shared_ptr<void> owner, previous_owner;
  const TensorView hidden = NewRows(arrays.batch.num_rows, config_.hidden_size, model_->activation_dtype(), &owner);
  model_->ForwardMtp(arrays.device_tokens, arrays.batch, ToDevice(previous, &previous_owner), storage_->state(), chain, hidden);
  return FromDevice(hidden, num_rows);
}

Matrix ModelHarness::Chain::Step(std::span<const uint32_t> tokens) {
  const int64_t rows = static_cast<int64_t>(tokens.size());
  const int64_t kv_width = static_cast<int64_t>(harness_.config_.num_key_value_heads) * harness_.config_.head_dim;
  const DType dtype = harness_.options_.kv_dtype;
  const int64_t padded_rows = rows + (harness_.memory_.is_host() ? 0 : harness_.options_.num_padding_rows);
  ++depth_;
  harness_.NewRows(padded_rows, kv_width, dtype, &k_.emplace_back());
  harness_.NewRows(padded_rows, kv_width, dtype, &v_.emplace_back());
  std::vector<TensorView> k, v;
  for (size_t d = 0; d < k_.size(); ++d) {
    k.push_back({k_[d].get(), dtype, padded_rows, kv_width, kv_width});
    v.push_back({v_[d].get(), dtype, padded_rows, kv_width, kv_width});
  }
  const MtpChain chain{.num_entries = depth_ - 1, .k = k.data(), .v = v.data()};
  last_ = harness_.RunMtp({{&sequence_, {tokens.begin(), tokens.end()}, depth_}}, last_.Rows(0, rows), &chain);
  return last_;
}

ModelHarness::Sequence ModelHarness::Fork(const Sequence& parent) {
  Sequence child = parent;
  child.pages.clear();
  GrowPages(child, parent.num_computed + 1);
  for (size_t j = 0; j < child.pages.size() && j < parent.pages.size(); ++j) {
    if (static_cast<int32_t>(j + 1) * options_.page_tokens <= parent.num_computed) {
      free_pages_.push_back(child.pages[j]);  // full: share the parent's
      child.pages[j] = parent.pages[j];
      ++page_uses_[parent.pages[j]];
    } else {
      storage_->CopyPage(parent.pages[j], child.pages[j]);
    }
  }
  if (child.slot >= 0) ++slot_uses_[child.slot];
  return child;
}

void ModelHarness::Release(Sequence& sequence) {
  for (int32_t page : sequence.pages) {
    if (--page_uses_[page] == 0) free_pages_.push_back(page);
  }
  if (sequence.slot >= 0 && --slot_uses_[sequence.slot] == 0) free_slots_.push_back(sequence.slot);
  sequence = {};
}

Matrix ModelHarness::Logits(Matrix hidden) {
  Matrix logits;
  for (int64_t row = 0; row < hidden.rows; row += options_.max_rows) {
    const int64_t count = std::min<int64_t>(options_.max_rows, hidden.rows - row);
    std::shared_ptr<void> owner, logits_owner;
    const TensorView view = NewRows(count, config_.vocab_size, DType::kFloat32, &logits_owner);
    model_->Logits(ToDevice(hidden.Rows(row, count), &owner).Rows(0, count), view);
    logits.Append(FromDevice(view, count));
  }
  return logits;
}

ModelConfig TinyConfig(std::string_view layers) {
  ModelConfig config;
  config.hidden_size = 40;
  config.intermediate_size = 56;
  config.vocab_size = 131;
  for (char letter : layers) {
    config.layers.push_back(letter == 'F' ? LayerKind::kFullAttention : LayerKind::kLinearAttention);
  }
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 24;
  config.rotary_dim = 12;
  config.linear_num_key_heads = 2;
  config.linear_num_value_heads = 6;
  config.linear_key_head_dim = 20;
  config.linear_value_head_dim = 36;
  config.linear_conv_kernel_dim = 4;
  config.num_mtp_layers = 1;
  config.max_position_embeddings = 4096;
  config.tensor_prefix = "model.";
  return config;
}

}  // namespace bebop
