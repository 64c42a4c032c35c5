// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <limits>

#include "absl/time/time.h"

namespace bebop {

// Limits and budgets of the scheduler. Set once at start; validated by the server's configuration.
struct SchedulerOptions {
  int32_t max_num_seqs = 32;             // sequences running at once (executor slots)
  int32_t max_model_len = 4096;          // prompt + output tokens of a sequence
  int32_t max_step_tokens = 512;         // known rows + drafts of one step (prefill budget); >= max_num_seqs * (γ+1)
  int32_t num_pages = 0;                 // KV pages in the pool
  int32_t page_tokens = 16;
  // Prompts and scores are cut into passes at absolute multiples of this and nowhere else: a device computes them in chunks (model.md
  // section 5), and a cut elsewhere would let batch mates change low bits. Over 1: max_step_tokens and max_score_step_tokens leave room for
  // a piece of it, the first beside all decodes.
  int32_t prefill_cut_tokens = 1;
  // Rows that scores take in one step, at most: on a device their statistics are the host's work, and generation waits for it.
  int32_t max_score_step_tokens = std::numeric_limits<int32_t>::max();
  // Positions that page tables reach beyond what the next step can write: a device runs one iteration ahead of the host.
  int32_t lookahead_tokens = 0;
  int32_t num_state_slots = 0;           // recurrent-state slots in the pool (>= 2)
  int32_t max_queued_requests = 1024;    // waiting requests; more are RESOURCE_EXHAUSTED with a retry hint
  int64_t max_queued_bytes = 256 << 20;  // budget "queued requests": host bytes of waiting requests
  int64_t max_result_bytes = 256 << 20;  // budget "retained results": kept for idempotent repeats
  int64_t max_score_bytes = 1LL << 30;   // budget "score scratch": hidden states of scoring sequences
  int64_t score_bytes_per_token = 0;     // what one token of a scoring sequence charges to it (H * 4)
  absl::Duration result_ttl = absl::Minutes(10);
};

}  // namespace bebop
