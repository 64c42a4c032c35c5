// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "engine/config/model_config.h"
#include "engine/memory/model_state.h"
#include "engine/model/model.h"
#include "engine/runtime/batch_builder.h"
#include "engine/runtime/distribution_rows.h"
#include "engine/runtime/scorer.h"
#include "engine/schedule/step_plan.h"
#include "engine/speculative/verify.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

// Rows of one lm_head product: beyond this the product is compute bound on a CPU and streaming the weights again costs little, while
// every row costs V floats twice.
inline constexpr int32_t kMaxLogitRows = 64;

struct ModelExecutorOptions {
  int32_t max_num_seqs = 0;      // executor slots
  int32_t max_step_tokens = 0;   // most rows of a target pass
  int64_t page_table_entries = 0;  // room for the page tables of a step; a step that needs more allocates
  int32_t max_draft_tokens = 0;  // γ; 0 without an MTP layer
};

// Runs StepPlans on the model: steps 3 to 6 of the iteration in architecture.md section 3. Owns the activations of a step and, per executor
// slot, the drafts of the last step with the very distributions they were drawn from. Everything a generation step touches
// is allocated at construction; scoring allocates per scored sequence.
// Not thread safe: the engine thread.
class ModelExecutor final : public Executor {
 public:
  // All pointers must outlive the executor; `memory` is host memory. REQUIRES: storage's window >= options.max_draft_tokens.
  ModelExecutor(const ModelConfig& config, const ModelExecutorOptions& options, Model* model, ModelStateStorage* storage,
                DeviceMemory* memory, ThreadPool* pool);

  absl::Status Execute(const StepPlan& plan, StepResult* result) override;
  absl::Status SetWeights(const ModelWeights* weights, int64_t epoch) override;
  absl::Status Quiesce() override { return absl::OkStatus(); }  // a step ends with Execute, and addresses are looked up in every pass

 private:
  // Drafts made for one sequence at the end of a step, verified in its next. Draft i's distribution is row slot * γ + i of draft_rows_.
  struct DraftSlot {
    uint32_t tokens[kMaxDraftTokens] = {};
  };
  // A sequence that is drafting in this step.
  struct Drafting {
    size_t sequence_idx = 0;     // into plan.sequences
    int32_t first_position = 0;  // absolute position of its first draft
  };

  void BuildTargetBatch(const StepPlan& plan);
  // Verifies all sampling sequences, in blocks of at most logit_rows_ rows of lm_head.
  void VerifyAll(const StepPlan& plan, StepResult* result);
  void VerifyBlock(const StepPlan& plan, StepResult* result);
  void TransformRow(const SequencePlan& sequence, int32_t row_in_sequence, int32_t logit_row);
  void VerifySequence(const SequencePlan& sequence, int32_t first_logit_row, SequenceOutcome* outcome);
  // Extends the MTP cache over the certain rows with the target's hidden states; leaves each drafting sequence's last row (the input of
  // draft 1) as its row of draft_hidden_.
  void ExtendMtp(const StepPlan& plan, const StepResult& result);
  void Draft(const StepPlan& plan, StepResult* result);
  TensorView Logits(int64_t rows);
  TensorView Hidden(std::vector<float>& buffer, int64_t rows) {
    return FloatMatrix(buffer.data(), rows, config_.hidden_size);
  }

  const ModelConfig config_;
  const ModelExecutorOptions options_;
  Model* const model_;
  ModelStateStorage* const storage_;
  ThreadPool* const pool_;
  const int32_t logit_rows_;  // most rows of one lm_head product
  int64_t weight_epoch_ = 0;

  Scorer scorer_;
  BatchBuilder target_batch_, mtp_batch_;
  std::vector<int32_t> score_first_row_, sequence_first_row_;  // parallel to plan.scores / plan.sequences
  std::vector<float> hidden_;         // [max_step_tokens, H] target, post-norm
  std::vector<float> mtp_input_;      // [max_step_tokens, H]
  std::vector<float> mtp_hidden_;     // [max_step_tokens, H]
  std::vector<float> draft_hidden_;   // [max_num_seqs, H] the row each drafting sequence draws its next draft from
  std::vector<float> gathered_;       // [logit_rows, H]
  std::vector<float> logits_;         // [logit_rows, V]
  std::vector<float> scratch_;        // [logit_rows, V]
  DistributionRows target_rows_;      // [logit_rows]
  DistributionRows draft_rows_;       // [max_num_seqs * γ]
  std::vector<DraftSlot> slots_;      // [max_num_seqs]
  std::vector<size_t> block_;         // indexes into plan.sequences of the block being verified
  std::vector<int32_t> block_first_row_;
  struct LogitRow {
    size_t sequence_idx;
    int32_t row_in_sequence;
  };
  std::vector<LogitRow> logit_row_;
  std::vector<Drafting> drafting_;
  std::vector<int32_t> extend_last_row_;  // parallel to plan.sequences; -1: not extended
};

}  // namespace bebop
