// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/training/training_data.h"
#include "kernels/attention/chain_attention.h"
#include "kernels/draft_losses/draft_losses.h"

namespace bebop {

// Neighbouring bases of one document whose chains count.
struct BaseRun {
  int32_t document = 0;
  int64_t first_row = 0;  // of the batch
  int64_t num_bases = 0;
  int64_t first_target = 0;  // the first row of the batch that judges them
  int64_t num_targets = 0;
};

// Bases whose logits exist at the same time. Its arrays are parts of those of BatchPlan, from first_base, or K · first_base, on.
struct LogitChunk {
  int64_t first_run = 0;
  int64_t num_runs = 0;
  int64_t first_base = 0;
  int64_t num_bases = 0;    // n: of its runs, one after the other
  int64_t num_targets = 0;  // of its runs, one after the other
};

// What a batch is to the trainer: the packed rows, and which of them count where. Host memory.
//
// Row t of a document of n tokens is the base t; step k of its chain is judged by target row t + k and predicts the token t + k +
// 1, which counts when it is at loss_start or after. The target row must be in the document; cross-entropy also needs the token
// there. End-to-end TV takes a chain as a whole: it counts when its first predicted token, t + 2, is at loss_start or after and
// all of its target rows are in the document: a product of acceptances that began inside the chain is none that decoding forms.
//
// loss_start is the first token whose prediction counts, and so the rule is the same for every loss: a step counts by what it
// predicts. Two consequences. With loss_start the first completion token, the base loss_start - 2 counts, whose first step
// predicts the first sampled token: decoding drafts no such token, as a chain starts after it (one base of a document). And the
// losses by single steps also count those later steps of up to K - 1 bases before that one which predict at loss_start or after,
// with prompt tokens fed: these chains e2e TV leaves out.
struct BatchPlan {
  int64_t num_rows = 0;  // R
  std::vector<DocumentRows> documents;
  std::vector<uint32_t> token_ids;    // [K, R] as in MtpBatch
  std::vector<int32_t> row_position;  // [K, R]
  std::vector<BaseRun> runs;
  std::vector<LogitChunk> chunks;
  std::vector<int32_t> steps;         // [bases] as in ChainLossArgs
  std::vector<int32_t> target_rows;   // [K, n] a chunk, among the chunk's targets; -1: does not count
  std::vector<uint32_t> data_tokens;  // [K, n] a chunk
  std::vector<int64_t> step_rows;     // [K] rows that count
  int64_t terms = 0;                  // of the mean
};

// Whether any step of the document counts: a batch without one is no step (terms 0).
bool AnythingCounts(const TrainingDocument& document, DraftLoss loss, int32_t num_steps);

// Fills `plan`, whose memory is reused. `logit_rows`: most targets and drafts (K a base) of a chunk, >= 2K.
void PlanBatch(std::span<const TrainingDocument* const> documents, DraftLoss loss, int32_t num_steps, int64_t logit_rows,
               BatchPlan* plan);

}  // namespace bebop
