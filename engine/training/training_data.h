// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace bebop {

// One sequence to train on.
struct TrainingDocument {
  std::vector<uint32_t> token_ids;
  int32_t loss_start = 0;  // the first token whose prediction counts
  int64_t line = 0;        // of the file, from 1: for messages
  int32_t sample = 0;      // of a GenerateResult line, from 0
};

struct TrainingDataOptions {
  int64_t vocab_size = 0;
  int32_t num_steps_ahead = 5;  // documents of fewer than num_steps_ahead + 2 tokens are skipped
  int32_t max_seq_len = 0;      // longer ones lose their end; > num_steps_ahead + 1
};

struct TrainingDataCounts {
  int64_t documents = 0;       // kept
  int64_t tokens = 0;          // of those
  int64_t loss_tokens = 0;     // of those, from loss_start on
  int64_t skipped_short = 0;   // shorter than num_steps_ahead + 2, or nothing left to predict
  int64_t skipped_failed = 0;  // samples of a GenerateResult that ended in an error
  int64_t truncated = 0;
};

struct TrainingData {
  std::vector<TrainingDocument> documents;
  TrainingDataCounts counts;
  std::string digest;  // SHA-256 of the file, hex
};

// Reads JSON lines (cli.md section 4): {"token_ids": [...], "loss_start": N} (default 0), or a GenerateResult with
// prompt_token_ids as `bebop rollouts` and `bebop generate --json` print it: each of its samples is a document whose loss_start is
// by default the first completion token. Empty lines are skipped.
//
// Errors name file, line, field and both values. NOT_FOUND: no file. INVALID_ARGUMENT: a line that is not such JSON; a token id
// outside the vocabulary ("data of another vocabulary"); a loss_start outside the document; a file with no document left, saying
// what was skipped and why.
absl::StatusOr<TrainingData> ReadTrainingData(const std::string& path, const TrainingDataOptions& options);

// The batches of epoch `epoch` = 0, 1, ...: indices into data.documents. A permutation that (seed, epoch) decide, cut where the next
// document would pass `batch_tokens`. REQUIRES: batch_tokens >= the longest document.
std::vector<std::vector<int32_t>> PlanEpoch(const TrainingData& data, int64_t batch_tokens, uint64_t seed, int64_t epoch);

}  // namespace bebop
