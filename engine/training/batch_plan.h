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
// all of its target rows are in the document. (Taking a chain from the step on that predicts loss_start would train products of
// acceptances that decoding never forms: there a chain starts after the first sampled token, and all that it predicts are
// completion tokens.)
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

// Fills `plan`, whose memory is reused. `logit_rows`: most targets and drafts (K a base) of a chunk, >= 2K.
void PlanBatch(std::span<const TrainingDocument* const> documents, DraftLoss loss, int32_t num_steps, int64_t logit_rows,
               BatchPlan* plan);

}  // namespace bebop
