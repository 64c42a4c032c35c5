// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/sampling/sampling_params.h"
#include "engine/schedule/request.h"

namespace bebop {

struct ModelWeights;  // engine/weights/model_weights.h

// Sequence counters (defined once, in docs/engine_contract.md): a sequence's tokens are prompt + output. `num_computed` of them have
// been through the target and are in KV pages and recurrent state (the accepted drafts of the last iteration count as computed; they
// sit in the slot's window until the next pass replays them). Outside a step at least one token is not computed: the last
// emitted one, or the rest of the prompt.

// What one sequence does in a step. Two shapes, one code path:
//   prefill chunk: known_tokens = the next tokens; sample = true when they reach the end of the sequence's tokens.
//   decode: known_tokens = the last emitted token; num_drafts drafts (held by the executor in `slot`) are verified after it.
struct SequencePlan {
  int32_t slot = -1;               // executor slot of this sequence (drafts and their distributions live there), 0..max_num_seqs-1
  uint64_t residency = 0;          // unique for each stay of a sequence in a slot, never 0
  std::span<const uint32_t> known_tokens;  // committed by this pass, first one at position num_computed
  int32_t num_computed = 0;
  int32_t num_replay = 0;          // drafts accepted in this sequence's previous pass (recurrent window of state_src)
  int32_t num_drafts = 0;          // drafts to verify now: the first num_drafts that this slot's latest pass made. Steps in which the
                                   // sequence is not planned (its observer has no room) leave the slot's drafts alone.
  bool sample = false;             // draw tokens after the last known row
  // Drafts to make at the end of this step (0: none). REQUIRES sample, or next_known_token: the last chunk of a recompute after
  // preemption stops before the last emitted token and drafts behind it (next_known_token), with the draws the lost drafts were made
  // with (output places from num_output on). So the next verification meets the same drafts, and no token changes in any mode.
  int32_t num_drafts_next = 0;
  std::span<const uint32_t> next_known_token;  // prefill chunk that ends before the sequence does: its following token, else empty
  bool keep_mtp = false;           // the request may draft: extend the MTP cache over this pass's certain rows
  // Page table covering positions [0, num_computed + known + num_drafts + max(num_drafts_next, keep_mtp ? 1 : 0)): the MTP entry for
  // a row lies at its *next* token's position, and recurrent draft steps write behind the last emitted token. It only grows while a residency
  // lasts, and may reach further than that (SchedulerOptions::lookahead_tokens).
  std::span<const int32_t> pages;
  int32_t state_src = -1;          // recurrent-state slots; src -1 = fresh zero state
  int32_t state_dst = -1;
  int32_t num_output = 0;          // tokens emitted so far by this sample (before this step)
  // Constant over the sequence's life; borrowed from the sequence.
  const GenerateRequest* request = nullptr;
  uint64_t seed = 0;
  uint32_t sample_index = 0;
  // Banned while fewer than min_new_tokens are out; empty when min_new_tokens is 0. Per row: the row whose token would become output
  // num_output + i (0-based) is banned iff num_output + i < min_new_tokens; the same place's draft distribution likewise.
  std::span<const uint32_t> banned_before_min;
  // Ids that end the sample: at most kMaxStopTokenIds and the model's own.
  std::span<const uint32_t> stop_ids;
};

// Work on a scoring sequence: target rows [begin, end) of [0, T), or, once all target rows are done and draft_depth > 0 and T > 1, MTP
// rows for bases [begin, end) of [0, T-1) (a base t starts from h_t and x_{t+1}).
// One sequence's target rows and draft bases come in order; the executor keeps its hidden states between steps under `handle`.
struct ScorePlan {
  uint64_t handle = 0;
  const ScoreRequest* request = nullptr;
  bool draft_phase = false;
  int32_t begin = 0, end = 0;
  bool first = false, last = false;  // first / last work of this handle; after `last` the result is complete
  std::span<const int32_t> pages;
  int32_t state_src = -1, state_dst = -1;
};

struct PageCopy {
  int32_t source = 0, destination = 0;
};

// Everything one executor call does, in this order: page copies, target pass (scores, prefill chunks, then decodes), verification, MTP extend
// and drafting. Plain data; spans point into scheduler state and are valid until StepResult is applied.
struct StepPlan {
  std::vector<PageCopy> page_copies;
  std::vector<uint64_t> dropped_score_handles;  // cancelled scores: forget their hidden states
  std::vector<ScorePlan> scores;
  std::vector<SequencePlan> sequences;
  bool empty() const { return sequences.empty() && scores.empty(); }
};

// What a sequence emitted. Arrays hold num_emitted values when the request asked for them. Trimming at stops is the scheduler's.
struct SequenceOutcome {
  int32_t num_emitted = 0;   // 0 for a chunk that did not sample
  int32_t num_accepted = 0;  // drafts accepted: num_emitted = num_accepted + 1 unless non_finite
  int32_t num_reached = 0;
  bool non_finite = false;   // a needed row was not finite; tokens before it are valid
  std::array<uint32_t, kMaxDraftTokens + 1> tokens{};
  std::array<int32_t, kMaxDraftTokens + 1> source{};
  std::array<float, kMaxDraftTokens + 1> logprob{}, raw_logprob{}, entropy{}, draft_logprob{};
  std::array<double, kMaxDraftTokens> overlap{};  // of the reached places, when spec_detail asks
  int32_t num_drafts_made = 0;  // <= num_drafts_next
  int64_t weight_epoch = 0;     // of the weights whose target pass this was (Executor::SetWeights)
};

struct StepResult {
  std::vector<SequenceOutcome> sequences;        // parallel to StepPlan::sequences
  std::vector<ScoreResult> finished_scores;      // one for each ScorePlan with `last`, in order
};

// Runs steps. The engine's implementation drives the model; the simulator's is a fake.
class Executor {
 public:
  virtual ~Executor() = default;
  // Fills *result (reused between steps). An error means the engine cannot go on: everything in flight fails with it.
  // A plan without sequences and scores may still carry page copies or dropped handles.
  virtual absl::Status Execute(const StepPlan& plan, StepResult* result) = 0;

  // Weights of the passes that are enqueued from now on; their outcomes carry `epoch`, which starts at 0 and grows. With the present epoch
  // they are the same weights at another address. Called between two steps, while no score is under way (the scheduler restarts them). When
  // it returns nothing reads the previous weights any more. An iteration that
  // ran ahead keeps the weights and the epoch it was enqueued with; its outcome is returned by the step that plans it, or dropped with its
  // residency. Drafts that are pending stay what they are.
  virtual absl::Status SetWeights(const ModelWeights* weights, int64_t epoch) = 0;
  // Waits until nothing that was enqueued runs, and forgets what ran ahead and every address of caches and weights that it keeps. REQUIRES: no
  // sequence of earlier plans will be planned again with its residency (all were preempted).
  virtual absl::Status Quiesce() = 0;
};

}  // namespace bebop
