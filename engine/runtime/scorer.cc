// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/scorer.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "engine/base/status_macros.h"
#include "kernels/common/check.h"

namespace bebop {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

}  // namespace

Scorer::Scorer(const ModelConfig& config, int32_t max_rows, int64_t max_page_entries, Model* model, const ModelState* state, DeviceMemory* memory,
               ThreadPool* pool)
    : config_(config),
      max_rows_(max_rows),
      max_page_entries_(max_page_entries),
      hidden_row_bytes_(config.hidden_size * ElementBytes(model->activation_dtype())),
      model_(model),
      state_(state),
      memory_(memory),
      pool_(pool) {}

Scorer::Sequence& Scorer::SequenceOf(const ScorePlan& score) {
  const auto [entry, created] = sequences_.try_emplace(score.handle);
  if (created && score.request->draft_depth > 0) {
    entry->second.hidden.resize(score.request->token_ids.size() * static_cast<size_t>(hidden_row_bytes_));
    for (int32_t depth = 1; depth <= score.request->draft_depth; ++depth) {
      DraftScore& draft = entry->second.result.draft.emplace_back();
      draft.depth = depth;
      draft.start = std::max(score.request->score_start, depth + 1);
    }
  }
  return entry->second;
}

int64_t Scorer::DeviceBytes(const ModelConfig& config, int32_t max_rows, int64_t max_page_entries, DType activation_dtype, DType kv_dtype) {
  const int64_t logits = int64_t{kBlockRows} * config.vocab_size * ElementBytes(DType::kFloat32);
  if (config.num_mtp_layers == 0) return logits;
  const int64_t hidden = int64_t{kBlockRows + 2 * kBlockBases} * config.hidden_size * ElementBytes(activation_dtype);
  const int64_t chain = int64_t{2} * kMaxDraftTokens * kBlockBases * config.num_key_value_heads * config.head_dim * ElementBytes(kv_dtype);
  return logits + hidden + chain + DeviceBatch::Bytes(std::min(kBlockBases, max_rows), 1, max_page_entries);
}

absl::Status Scorer::Reserve() {
  if (logits_ != nullptr) return absl::OkStatus();
  const int64_t logits_bytes = int64_t{kBlockRows} * config_.vocab_size * ElementBytes(DType::kFloat32);
  if (config_.num_mtp_layers > 0) {
    BEBOP_ASSIGN_OR_RETURN(device_batch_, DeviceBatch::Create(std::min(kBlockBases, max_rows_), 1, max_page_entries_, memory_));
    BEBOP_ASSIGN_OR_RETURN(hidden_rows_, memory_->Allocate(kBlockRows * hidden_row_bytes_, "scorer"));
    for (auto& hidden : chain_hidden_) {
      BEBOP_ASSIGN_OR_RETURN(hidden, memory_->Allocate(kBlockBases * hidden_row_bytes_, "scorer"));
    }
    const int64_t entry_bytes =
        int64_t{kBlockBases} * config_.num_key_value_heads * config_.head_dim * ElementBytes(state_->mtp_kv.dtype);
    chain_storage_.resize(2 * kMaxDraftTokens);
    for (auto& entry : chain_storage_) {
      BEBOP_ASSIGN_OR_RETURN(entry, memory_->Allocate(entry_bytes, "scorer"));
    }
    draft_rows_ = DistributionRows(kBlockBases, config_.vocab_size);
  }
  target_rows_ = DistributionRows(kBlockRows, config_.vocab_size);
  BEBOP_ASSIGN_OR_RETURN(device_logits_, memory_->Allocate(logits_bytes, "scorer"));
  if (memory_->is_host()) {
    logits_ = static_cast<const float*>(device_logits_.get());
  } else {
    host_logits_.resize(static_cast<size_t>(kBlockRows) * config_.vocab_size);
    logits_ = host_logits_.data();
  }
  return absl::OkStatus();
}

void Scorer::Logits(const TensorView& hidden) {
  BEBOP_CHECK(hidden.rows <= kBlockRows);
  const TensorView logits = FloatMatrix(static_cast<float*>(device_logits_.get()), hidden.rows, config_.vocab_size);
  model_->Logits(hidden, logits);
  if (!memory_->is_host()) memory_->CopyOut(host_logits_.data(), logits.data, logits.rows * logits.cols * ElementBytes(logits.dtype));
}

void Scorer::Distributions(const TensorView& hidden, float temperature, DistributionRows* rows) {
  BEBOP_CHECK(hidden.rows <= rows->size());
  Logits(hidden);
  pool_->ParallelFor(hidden.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      TransformArgs args;
      args.logits = LogitRow(row);
      args.vocab_size = config_.vocab_size;
      args.temperature = temperature;
      cpu::Transform(args, &(*rows)[row]);
    }
  });
}

void Scorer::AddTargetRows(const ScorePlan& score, const TensorView& hidden) {
  BEBOP_CHECK(Reserve().ok());  // a device has reserved at start; host memory is overcommitted
  const ScoreRequest& request = *score.request;
  Sequence& sequence = SequenceOf(score);
  if (request.draft_depth > 0) {
    BEBOP_CHECK(hidden.row_stride == hidden.cols);
    memory_->CopyOut(HiddenRow(&sequence, score.begin), hidden.data, hidden.rows * hidden_row_bytes_);
  }
  // Row t gives the distribution of token t + 1; only places from score_start on are asked for.
  const int32_t num_tokens = static_cast<int32_t>(request.token_ids.size());
  const int32_t first = std::max(score.begin, std::max(request.score_start, 1) - 1);
  const int32_t last = std::min(score.end, num_tokens - 1);
  for (int32_t begin = first; begin < last; begin += kBlockRows) {
    const int32_t end = std::min(last, begin + kBlockRows);
    Logits(hidden.Rows(begin - score.begin, end - begin));
    AppendTarget(request, begin, end, &sequence.result);
  }
}

// logits_ holds rows begin .. end-1 of the target.
void Scorer::AppendTarget(const ScoreRequest& request, int32_t begin, int32_t end, ScoreResult* result) {
  LogitSummary summary[kBlockRows];
  Summarize(end - begin, request, summary);
  for (int32_t t = begin; t < end; ++t) {
    const float* logits = LogitRow(t - begin);
    const LogitSummary& target = summary[t - begin];
    // A row that is not finite has no log-probabilities: NaN everywhere, for this sequence alone.
    const auto logprob = [&](uint32_t id) { return target.finite ? static_cast<float>(target.LogProb(logits[id])) : kNaN; };
    result->logprobs.push_back(logprob(request.token_ids[t + 1]));
    if (request.entropy) result->entropy.push_back(target.finite ? static_cast<float>(target.entropy) : kNaN);
    if (request.top_logprobs == 0 && request.token_ids_logprob.empty()) continue;
    ScoredPosition& position = result->positions.emplace_back();
    if (request.top_logprobs > 0) {
      position.top_ids.resize(request.top_logprobs);
      position.top_ids.resize(cpu::TopLogits(logits, config_.vocab_size, request.top_logprobs, position.top_ids.data()));
      for (const uint32_t id : position.top_ids) position.top_logprobs.push_back(logprob(id));
    }
    for (const uint32_t id : request.token_ids_logprob) {
      position.asked_logprobs.push_back(logprob(id));
    }
  }
}

void Scorer::Summarize(int32_t rows, const ScoreRequest& request, LogitSummary* summary) {
  pool_->ParallelFor(rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      summary[row] = cpu::Summarize(LogitRow(row), config_.vocab_size, request.temperature, request.entropy);
    }
  });
}

void Scorer::AddDraftBases(const ScorePlan& score) {
  BEBOP_CHECK(Reserve().ok());
  Sequence& sequence = SequenceOf(score);
  const int32_t block = std::min(kBlockBases, max_rows_);
  for (int32_t begin = score.begin; begin < score.end; begin += block) {
    AddDraftBlock(score, &sequence, begin, std::min(score.end, begin + block));
  }
}

TensorView Scorer::BringBack(Sequence* sequence, int64_t begin, int64_t count) {
  const TensorView rows = Rows(hidden_rows_, count);
  memory_->CopyIn(rows.data, HiddenRow(sequence, begin), count * hidden_row_bytes_);
  return rows;
}

// Base t, depth k: the chain is fed x_{t+1} .. x_{t+k} and predicts x_j, j = t + k + 1. Depth 1 is the ordinary extend, which also leaves
// the true entry at position t + 1 in the MTP cache; deeper steps see true entries up to t + 1 and their own private ones after.
void Scorer::AddDraftBlock(const ScorePlan& score, Sequence* sequence, int32_t begin, int32_t end) {
  const ScoreRequest& request = *score.request;
  const int32_t num_tokens = static_cast<int32_t>(request.token_ids.size());
  // Target rows begin+1 .. : p_j for j = t + k + 1 is the distribution of row t + k.
  const int32_t target_begin = begin + 1;
  const int32_t target_end = std::min(num_tokens - 1, end + request.draft_depth);
  if (target_begin < target_end) {
    Distributions(BringBack(sequence, target_begin, target_end - target_begin), request.temperature, &target_rows_);
  }
  const int64_t kv_width = static_cast<int64_t>(config_.num_key_value_heads) * config_.head_dim;
  TensorView chain_k[kMaxDraftTokens], chain_v[kMaxDraftTokens];
  int current = 0;
  for (int32_t depth = 1; depth <= request.draft_depth; ++depth) {
    // The last base of this depth still needs its fed token x_{t+depth}; depth 1 also runs for the base whose prediction lies
    // beyond the end, because its entry is part of later bases' cache.
    const int32_t last = std::min(end, num_tokens - depth);
    if (last <= begin) break;
    batch_.Clear();
    batch_.AddSequence(begin + depth, score.pages);
    for (int32_t t = begin; t < last; ++t) batch_.AddRow(request.token_ids[t + depth]);
    device_batch_->Upload(batch_);
    const TensorView out = Rows(chain_hidden_[current], last - begin);
    if (depth == 1) {
      model_->ForwardMtp(device_batch_->tokens(), device_batch_->View(), BringBack(sequence, begin, last - begin), *state_, nullptr, out);
    } else {
      const int32_t entry = depth - 2;
      const DType dtype = state_->mtp_kv.dtype;
      for (int32_t i = 0; i <= entry; ++i) {
        chain_k[i] = {chain_storage_[2 * i].get(), dtype, last - begin, kv_width, kv_width};
        chain_v[i] = {chain_storage_[2 * i + 1].get(), dtype, last - begin, kv_width, kv_width};
      }
      const MtpChain chain{depth - 1, chain_k, chain_v};
      model_->ForwardMtp(device_batch_->tokens(), device_batch_->View(), Rows(chain_hidden_[1 - current], last - begin), *state_, &chain, out);
    }
    // Predictions inside the sequence: j = t + depth + 1 <= T - 1.
    const int32_t num_bases = std::min(last, num_tokens - 1 - depth) - begin;
    if (num_bases > 0) {
      Distributions(out.Rows(0, num_bases), request.temperature, &draft_rows_);
      AppendDraft(request, depth, begin, num_bases, &sequence->result);
    }
    current = 1 - current;
  }
}

void Scorer::AppendDraft(const ScoreRequest& request, int32_t depth, int32_t begin, int32_t num_bases, ScoreResult* result) {
  DraftScore& draft = result->draft[depth - 1];
  LogitSummary summary[kBlockRows];  // logits_ still holds the draft rows
  Summarize(num_bases, request, summary);
  for (int32_t i = 0; i < num_bases; ++i) {
    const int32_t place = begin + i + depth + 1;
    if (place < draft.start) continue;
    const TokenDistribution& draft_prob = draft_rows_[i];
    const TokenDistribution& target_prob = target_rows_[i + depth - 1];
    const bool finite = summary[i].finite, both = target_prob.finite && draft_prob.finite;
    draft.logprobs.push_back(finite ? static_cast<float>(summary[i].LogProb(LogitRow(i)[request.token_ids[place]])) : kNaN);
    draft.overlap.push_back(both ? static_cast<float>(cpu::Overlap(target_prob, draft_prob)) : kNaN);
    draft.argmax_prob.push_back(both ? static_cast<float>(target_prob.prob(draft_prob.argmax)) : kNaN);
    if (request.entropy) draft.entropy.push_back(finite ? static_cast<float>(summary[i].entropy) : kNaN);
  }
}

ScoreResult Scorer::Take(uint64_t handle) {
  const auto entry = sequences_.find(handle);
  BEBOP_CHECK(entry != sequences_.end());
  ScoreResult result = std::move(entry->second.result);
  sequences_.erase(entry);
  return result;
}

void Scorer::Drop(uint64_t handle) { sequences_.erase(handle); }

}  // namespace bebop
