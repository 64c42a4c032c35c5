// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "engine/config/model_config.h"
#include "engine/memory/model_state.h"
#include "engine/model/model.h"
#include "engine/runtime/batch_builder.h"
#include "engine/runtime/distribution_rows.h"
#include "engine/schedule/step_plan.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

// Teacher-forced scoring: turns the target's hidden states of a scoring sequence into log-probabilities, and runs the MTP chains that a
// draft_depth asks for (cli.md section 3). Keeps the hidden states of sequences between steps, by handle. Allocates per
// scored sequence, and its working rows at first use: a server that never scores pays nothing.
// Not thread safe: the engine thread.
class Scorer {
 public:
  // Bases of one pass over the draft chain: few, because each holds its target and draft distributions.
  static constexpr int32_t kBlockBases = 32;
  static constexpr int32_t kBlockRows = kBlockBases + kMaxDraftTokens;
  // Rows of V floats in its working buffers: logits, target and draft distributions.
  static constexpr int32_t kVocabRows = 2 * kBlockRows + kBlockBases;

  // All pointers must outlive the scorer. `max_rows`: most rows of a model pass.
  Scorer(const ModelConfig& config, int32_t max_rows, Model* model, const ModelState* state, ThreadPool* pool);

  // Work of one target chunk: `hidden` holds the post-norm rows of positions [score.begin, score.end).
  void AddTargetRows(const ScorePlan& score, const TensorView& hidden);
  // Work of one draft chunk: depths 1..draft_depth for bases [score.begin, score.end). Its target rows are complete.
  void AddDraftBases(const ScorePlan& score);
  // The result of a handle whose work is done; forgets it.
  ScoreResult Take(uint64_t handle);
  void Drop(uint64_t handle);

 private:
  struct Sequence {
    std::vector<float> hidden;  // [T, H], kept only when draft_depth > 0
    ScoreResult result;
  };
  Sequence& SequenceOf(const ScorePlan& score);
  void EnsureRows();
  // rows[i] = the distribution of hidden row i at the request's temperature.
  void Distributions(const TensorView& hidden, float temperature, DistributionRows* rows);
  void AddDraftBlock(const ScorePlan& score, Sequence* sequence, int32_t begin, int32_t end);
  // summary[i] of logits_ row i at the request's temperature.
  void Summarize(int32_t rows, const ScoreRequest& request, LogitSummary* summary);
  void AppendTarget(const ScoreRequest& request, int32_t begin, int32_t end, ScoreResult* result);
  const float* LogitRow(int64_t row) const { return logits_.data() + row * config_.vocab_size; }
  void AppendDraft(const ScoreRequest& request, int32_t depth, int32_t begin, int32_t num_bases, ScoreResult* result);

  const ModelConfig config_;
  const int32_t max_rows_;
  Model* const model_;
  const ModelState* const state_;
  ThreadPool* const pool_;
  BatchBuilder batch_;
  std::unordered_map<uint64_t, Sequence> sequences_;
  std::vector<float> logits_;                    // [kBlockRows, V]
  std::vector<float> chain_hidden_[2];           // [kBlockBases, H] each
  std::vector<std::vector<char>> chain_storage_; // k and v entries of each depth: [kBlockBases, nkv*head_dim]
  DistributionRows target_rows_{0, 1}, draft_rows_{0, 1};
};

}  // namespace bebop
