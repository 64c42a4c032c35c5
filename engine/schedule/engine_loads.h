// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>

#include "absl/time/time.h"
#include "engine/schedule/request.h"

namespace bebop {

inline constexpr int32_t kNumStepSpreads = 8;

// Snapshot of what the engine does (Info.GetLoads, metrics). Requests are groups and scores alike. Counters since start satisfy
//   submitted = finished + cancelled + failed + running_requests + waiting_requests      (I26)
// at every moment: a request is counted in exactly one of the five, whatever becomes of it.
struct EngineLoads {
  int32_t running_requests = 0;  // hold, or once held, resources; and have not ended
  int32_t waiting_requests = 0;  // accepted, never admitted yet
  int32_t running_sequences = 0, max_num_seqs = 0;  // executor slots
  int32_t used_pages = 0, total_pages = 0, used_state_slots = 0, total_state_slots = 0;
  int64_t queued_bytes = 0;      // host bytes of waiting requests (budget max_queued_bytes)
  int64_t retained_bytes = 0;    // host bytes of finished samples that are kept (budget max_result_bytes)
  int64_t submitted = 0;         // accepted; an attach is not a submission
  int64_t finished = 0;          // every sample ran to its own end (stop, length, non-finite); scores: delivered
  int64_t cancelled = 0;         // aborted, drained, left by the last observer, or with samples that a weight update ended
  int64_t failed = 0;            // deadline or engine failure
  int64_t refused = 0;           // not accepted, for whatever reason
  int64_t steps = 0;             // executor calls
  int64_t prompt_tokens = 0;     // of admitted groups, each group's prompt once
  int64_t generated_tokens = 0;  // emitted, after trimming at stops
  int64_t preemptions = 0;       // sequences that lost their pages and were, or will be, recomputed
  SpecCounts spec;               // summed over all samples, running ones included
  // Samples by how they ended, indexed by FinishReason; and those by max target step - min target step of their spans, the last counts all above.
  std::array<int64_t, kNumFinishReasons> samples_by_finish{};
  std::array<int64_t, kNumStepSpreads> samples_by_spread{};
  int64_t recomputed_tokens = 0;
  // Weights.
  int64_t target_step = 0, draft_step = 0;
  int64_t weight_commits = 0;
  absl::Duration last_swap_time, total_swap_time;
  SpecCounts version_spec;           // of verifications under the present weights
  SpecCounts previous_version_spec;  // and of those under the weights before, whole
};

}  // namespace bebop
