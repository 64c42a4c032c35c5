// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "engine/config/model_config.h"
#include "engine/memory/device_memory.h"
#include "engine/memory/model_state.h"
#include "engine/model/model.h"
#include "engine/runtime/batch_builder.h"
#include "engine/runtime/device_batch.h"
#include "engine/runtime/distribution_rows.h"
#include "engine/schedule/step_plan.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

// Teacher-forced scoring: turns the target's hidden states of a scoring sequence into log-probabilities, and runs the MTP chains that a
// draft_depth asks for (cli.md section 3). Keeps the hidden states of sequences between steps, by handle, in host memory, whose budget
// the scheduler keeps. Allocates per scored sequence there.
//
// On a device the passes and lm_head run there, and rows of logits (4 V bytes each) are copied to the host, whose threads summarise them:
// simple, but a device with fast links waits for the host. Scores are no part of a steady step.
// Not thread safe: the engine thread.
class Scorer {
 public:
  // Bases of one pass over the draft chain: few, because each holds its target and draft distributions.
  static constexpr int32_t kBlockBases = 32;
  static constexpr int32_t kBlockRows = kBlockBases + kMaxDraftTokens;
  // Rows of V floats in its working buffers: logits, target and draft distributions.
  static constexpr int32_t kVocabRows = 2 * kBlockRows + kBlockBases;

  // All pointers must outlive the scorer. `max_rows`: most rows of a model pass. `max_page_entries`: longest page table of a sequence.
  Scorer(const ModelConfig& config, int32_t max_rows, int64_t max_page_entries, Model* model, const ModelState* state, DeviceMemory* memory,
         ThreadPool* pool);

  // Takes the working memory, which else is taken at the first score: in host memory a server that never scores pays nothing for it, on a
  // device, where nobody can get memory later, it is taken at start. RESOURCE_EXHAUSTED when it cannot be had.
  absl::Status Reserve();
  // Bytes of `memory` that Reserve takes.
  static int64_t DeviceBytes(const ModelConfig& config, int32_t max_rows, int64_t max_page_entries, DType activation_dtype, DType kv_dtype);

  // Work of one target chunk: `hidden` holds the post-norm rows of positions [score.begin, score.end), without gaps.
  void AddTargetRows(const ScorePlan& score, const TensorView& hidden);
  // Work of one draft chunk: depths 1..draft_depth for bases [score.begin, score.end). Its target rows are complete.
  void AddDraftBases(const ScorePlan& score);
  // The result of a handle whose work is done; forgets it.
  ScoreResult Take(uint64_t handle);
  void Drop(uint64_t handle);

 private:
  struct Sequence {
    std::vector<char> hidden;  // [T, H] in the activation dtype, kept only when draft_depth > 0
    ScoreResult result;
  };
  Sequence& SequenceOf(const ScorePlan& score);
  // logits_[i] = lm_head of hidden row i.
  void Logits(const TensorView& hidden);
  // rows[i] = the distribution of hidden row i at the request's temperature.
  void Distributions(const TensorView& hidden, float temperature, DistributionRows* rows);
  // Rows [begin, begin + count) of the sequence's hidden states where the model reads them.
  TensorView BringBack(Sequence* sequence, int64_t begin, int64_t count);
  void AddDraftBlock(const ScorePlan& score, Sequence* sequence, int32_t begin, int32_t end);
  // summary[i] of logits_ row i at the request's temperature.
  void Summarize(int32_t rows, const ScoreRequest& request, LogitSummary* summary);
  void AppendTarget(const ScoreRequest& request, int32_t begin, int32_t end, ScoreResult* result);
  const float* LogitRow(int64_t row) const { return logits_ + row * config_.vocab_size; }
  // Row `row` of a sequence's hidden states, and rows of a working buffer, as the model has them.
  char* HiddenRow(Sequence* sequence, int64_t row) const { return sequence->hidden.data() + row * hidden_row_bytes_; }
  TensorView Rows(const std::shared_ptr<void>& buffer, int64_t rows) const {
    return {buffer.get(), model_->activation_dtype(), rows, config_.hidden_size, config_.hidden_size};
  }
  void AppendDraft(const ScoreRequest& request, int32_t depth, int32_t begin, int32_t num_bases, ScoreResult* result);

  const ModelConfig config_;
  const int32_t max_rows_;
  const int64_t max_page_entries_;
  const int64_t hidden_row_bytes_;
  Model* const model_;
  const ModelState* const state_;
  DeviceMemory* const memory_;
  ThreadPool* const pool_;
  BatchBuilder batch_;
  std::unordered_map<uint64_t, Sequence> sequences_;
  // Working memory, where the model computes. Null until Reserve.
  std::unique_ptr<DeviceBatch> device_batch_;
  std::shared_ptr<void> device_logits_;           // [kBlockRows, V] float32
  std::shared_ptr<void> hidden_rows_;             // [kBlockRows, H] of a sequence, brought back for a block of bases
  std::shared_ptr<void> chain_hidden_[2];         // [kBlockBases, H] each
  std::vector<std::shared_ptr<void>> chain_storage_;  // k and v entries of each depth: [kBlockBases, nkv*head_dim]
  // On the host.
  const float* logits_ = nullptr;                 // [kBlockRows, V]: device_logits_, or, on a device, host_logits_
  std::vector<float> host_logits_;
  DistributionRows target_rows_{0, 1}, draft_rows_{0, 1};
};

}  // namespace bebop
