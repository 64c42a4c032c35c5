// SPDX-License-Identifier: Apache-2.0
#include "tests/engine/model/model_harness.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "kernels/common/check.h"

namespace bebop {
namespace {

void FillWithNan(float* values, int64_t count) { std::fill_n(values, count, std::numeric_limits<float>::quiet_NaN()); }

// 0xff bytes are a NaN both as float32 and as bfloat16.
void PoisonPages(const KvPagesView& pages) {
  const int64_t bytes = static_cast<int64_t>(pages.num_pages) * pages.num_kv_heads * pages.page_tokens * pages.head_dim *
                        ElementBytes(pages.dtype);
  if (bytes == 0) return;
  std::memset(pages.k, 0xff, bytes);
  std::memset(pages.v, 0xff, bytes);
}

void PoisonState(const ModelState& state) {
  for (const KvPagesView& pages : state.kv) PoisonPages(pages);
  PoisonPages(state.mtp_kv);
  for (const LinearStateView& view : state.linear) {
    const int64_t slots = view.num_slots, rows = slots * view.window;
    FillWithNan(view.matrix, slots * view.num_value_heads * view.key_head_dim * view.value_head_dim);
    FillWithNan(static_cast<float*>(view.conv_inputs), slots * (view.conv_width - 1 + view.window) * view.conv_channels());
    FillWithNan(static_cast<float*>(view.window_k), rows * view.num_key_heads * view.key_head_dim);
    FillWithNan(static_cast<float*>(view.window_v), rows * view.num_value_heads * view.value_head_dim);
    FillWithNan(view.window_gate, rows * view.num_value_heads * 2);
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
    : config_(config),
      options_(options),
      pool_(options.num_threads),
      memory_(MakeHostMemory()),
      ops_(MakeCpuOps(&pool_)),
      model_(*Model::Create(config, options.max_rows, DType::kFloat32, ops_.get(), memory_.get())),
      storage_(*ModelStateStorage::Create(config, {.kv_dtype = options.kv_dtype,
                                                   .num_pages = options.num_pages,
                                                   .page_tokens = options.page_tokens,
                                                   .num_slots = options.num_slots,
                                                   .window = options.window}, memory_.get())),
      free_pages_(options.num_pages),
      page_uses_(options.num_pages),
      free_slots_(options.num_slots),
      slot_uses_(options.num_slots) {
  model_->SetWeights(weights);
  PoisonState(storage_->state());
  std::mt19937 random(options.seed);
  std::iota(free_pages_.begin(), free_pages_.end(), 0);
  std::iota(free_slots_.begin(), free_slots_.end(), 0);
  std::shuffle(free_pages_.begin(), free_pages_.end(), random);
  std::shuffle(free_slots_.begin(), free_slots_.end(), random);
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
  std::vector<uint32_t> tokens;
  std::vector<SequenceRows> sequences;
  std::vector<int32_t> page_ids, old_slots;
  for (const TargetRows& part : rows) {
    Sequence& sequence = *part.sequence;
    SequenceRows& out = sequences.emplace_back();
    out.first_row = static_cast<int32_t>(tokens.size());
    out.num_known_rows = static_cast<int32_t>(part.known.size());
    out.num_rows = static_cast<int32_t>(part.known.size() + part.drafts.size());
    out.num_replay_rows = sequence.num_replay;
    out.first_position = sequence.num_computed;
    out.state_src = sequence.slot;
    out.state_dst = TakeSlot();
    out.first_page = static_cast<int32_t>(page_ids.size());
    tokens.insert(tokens.end(), part.known.begin(), part.known.end());
    tokens.insert(tokens.end(), part.drafts.begin(), part.drafts.end());
    GrowPages(sequence, sequence.num_computed + out.num_rows);
    page_ids.insert(page_ids.end(), sequence.pages.begin(), sequence.pages.end());
    old_slots.push_back(sequence.slot);
    sequence.slot = out.state_dst;
    sequence.num_computed += out.num_known_rows;
    sequence.num_replay = 0;
  }
  const RaggedBatch batch{.num_sequences = static_cast<int32_t>(sequences.size()),
                          .num_rows = static_cast<int32_t>(tokens.size()),
                          .sequences = sequences.data(),
                          .page_ids = page_ids.data()};
  Matrix hidden(batch.num_rows, config_.hidden_size);
  model_->ForwardTarget(tokens.data(), batch, storage_->state(), hidden.view());
  for (int32_t slot : old_slots) {
    if (slot >= 0 && --slot_uses_[slot] == 0) free_slots_.push_back(slot);
  }
  return hidden;
}

void ModelHarness::Accept(Sequence& sequence, int32_t count) {
  sequence.num_replay = count;
  sequence.num_computed += count;
}

Matrix ModelHarness::Mtp(const std::vector<MtpRows>& rows, Matrix previous) { return RunMtp(rows, std::move(previous), nullptr); }

Matrix ModelHarness::RunMtp(const std::vector<MtpRows>& rows, Matrix previous, const MtpChain* chain) {
  std::vector<uint32_t> tokens;
  std::vector<SequenceRows> sequences;
  std::vector<int32_t> page_ids;
  for (const MtpRows& part : rows) {
    SequenceRows& out = sequences.emplace_back();
    out.first_row = static_cast<int32_t>(tokens.size());
    out.num_rows = out.num_known_rows = static_cast<int32_t>(part.next_tokens.size());
    out.first_position = part.first_position;
    out.first_page = static_cast<int32_t>(page_ids.size());
    tokens.insert(tokens.end(), part.next_tokens.begin(), part.next_tokens.end());
    if (chain == nullptr) GrowPages(*part.sequence, part.first_position + out.num_rows);
    page_ids.insert(page_ids.end(), part.sequence->pages.begin(), part.sequence->pages.end());
  }
  const RaggedBatch batch{.num_sequences = static_cast<int32_t>(sequences.size()),
                          .num_rows = static_cast<int32_t>(tokens.size()),
                          .sequences = sequences.data(),
                          .page_ids = page_ids.data()};
  BEBOP_CHECK(previous.rows == batch.num_rows);
  Matrix hidden(batch.num_rows, config_.hidden_size);
  model_->ForwardMtp(tokens.data(), batch, previous.view(), storage_->state(), chain, hidden.view());
  return hidden;
}

Matrix ModelHarness::Chain::Step(std::span<const uint32_t> tokens) {
  const int64_t rows = static_cast<int64_t>(tokens.size());
  const int64_t kv_width = static_cast<int64_t>(harness_.config_.num_key_value_heads) * harness_.config_.head_dim;
  const DType dtype = harness_.options_.kv_dtype;
  ++depth_;
  k_.emplace_back(rows * kv_width * ElementBytes(dtype), '\xff');
  v_.emplace_back(rows * kv_width * ElementBytes(dtype), '\xff');
  std::vector<TensorView> k, v;
  for (size_t d = 0; d < k_.size(); ++d) {
    k.push_back({k_[d].data(), dtype, rows, kv_width, kv_width});
    v.push_back({v_[d].data(), dtype, rows, kv_width, kv_width});
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
  Matrix logits(hidden.rows, config_.vocab_size);
  for (int64_t row = 0; row < hidden.rows; row += options_.max_rows) {
    const int64_t count = std::min<int64_t>(options_.max_rows, hidden.rows - row);
    model_->Logits(hidden.view().Rows(row, count), logits.view().Rows(row, count));
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
