// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <compare>
#include <cstdint>
#include <vector>

#include "absl/time/time.h"
#include "engine/schedule/request.h"
#include "engine/schedule/step_plan.h"
#include "engine/schedule/stop_matcher.h"
#include "engine/schedule/weight_epochs.h"

namespace bebop {

struct Group;

// The one order of all work: lower priority value, then earlier arrival, then sample index. A group's shared prefix ranks behind its
// samples (whoever needs memory takes it before it takes a sample), yet before every later request.
struct Rank {
  int32_t priority = 0;
  uint64_t arrival = 0;
  int32_t sub = 0;
  auto operator<=>(const Rank&) const = default;
};
inline constexpr int32_t kPrefixSub = INT32_MAX;

// What a sequence would do in one step, in counts (see SequencePlan).
struct Pass {
  int32_t num_known = 0;
  int32_t num_drafts = 0;
  bool sample = false;
  int32_t num_drafts_next = 0;
  int32_t num_positions = 0;  // its page table must cover positions [0, num_positions)

  int32_t num_rows() const { return num_known + num_drafts; }
};

// One sample of a group, or the group's shared prefix (prompt tokens [0, P-1)): counters, output and what it holds. The counters are
// those of docs/engine_contract.md; the invariant outside a step is
//   0 <= num_computed < num_tokens (prefix: <=),   num_replay + num_drafts > 0 only between verifications of a running sample.
//
// Losing its memory (Reset) keeps the output. Recomputing then feeds prompt and output as known tokens; if drafts were pending, it stops
// before the last emitted token and makes the same drafts anew, so that even rejection sampling, whose tokens depend on which places
// were drafted, continues with the very tokens it would have drawn.
class Sequence {
 public:
  enum class State : uint8_t {
    kIdle,     // prefix only: not built
    kWaiting,  // holds nothing
    kRunning,  // holds an executor slot, a state slot and pages for all its tokens
    kReady,    // prefix only: computed; holds a state slot and pages
    kEnded,
  };

  // `group` and `rules` outlive the sequence. sample_index kPrefixSub: the shared prefix.
  Sequence(Group* group, const StopRules* rules, int32_t sample_index);
  // Goes on with a sample that was cut short. REQUIRES: CheckResume (request.h) was OK.
  Sequence(Group* group, const StopRules* rules, SampleResult resumed);
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;
  Sequence(Sequence&&) = default;

  bool is_prefix() const { return sample_index_ == kPrefixSub; }
  int32_t sample_index() const { return sample_index_; }
  Rank rank() const;

  int32_t num_tokens() const;  // prompt + output; the prefix: P-1
  int32_t num_output() const { return static_cast<int32_t>(result.token_ids.size()); }
  int32_t num_remaining() const;
  uint32_t token(int32_t position) const;  // 0 <= position < prompt + output
  int32_t num_computed() const { return num_computed_; }
  int32_t num_replay() const { return num_replay_; }
  int32_t num_drafts() const { return num_drafts_; }
  // One known token and its drafts; otherwise chunks of the prompt (or of what is recomputed) are left.
  bool is_decoding() const;
  // It has drawn something or is at it: it ran here, and did not lose all it did.
  bool has_begun() const { return state == State::kRunning || (residency != 0 && num_output() > 0); }
  // It came with tokens of an earlier run.
  bool resumed() const { return resumed_; }
  // Drafts that stand, or would be made anew, behind its last token.
  int32_t num_pending_drafts() const { return std::max(num_drafts_, num_restore_drafts_); }
  // Of the weights of its latest pass.
  int64_t weight_epoch() const { return weight_epoch_; }

  // The next pass, with at most max_known (>= 1) known tokens.
  Pass NextPass(int32_t max_known) const;
  // Positions to have pages for: those of the next pass with all known tokens and, since a device runs ahead of the host, `lookahead` more, yet
  // never more than the sequence can come to (the prompt, the longest output and the drafts behind it).
  int32_t NumPositions(int32_t lookahead) const;

  // Applies the outcome of `pass`: trims once, at the first stop or length end, and only then appends per-token values; adds this step's
  // counts (taken before trimming) to the result, and replaces *step_counts by them. Returns why the sample ended, or kNone. The tokens' span is
  // that of the weights that the pass ran with, whatever is current meanwhile; `epochs` has their name.
  FinishReason Apply(const Pass& pass, const SequenceOutcome& outcome, const WeightEpochs& epochs, SpecCounts* step_counts);

  // Starts to run from the pages and state of its shared prefix.
  void StartFrom(const Sequence& prefix);
  // Everything computed is lost, the output stays. Drafts that were pending will be made anew: by the weights of that time, which changes no
  // distribution, and with equal weights no token.
  void Reset();

  // Held resources and place in the schedule; the scheduler's to change.
  State state = State::kWaiting;
  int32_t slot = -1;
  uint64_t residency = 0;      // of its present or last stay in an executor slot; 0: it never had one
  int32_t state_slot = -1;
  bool fork_pending = false;   // the first pass after a fork reads the prefix's state slot
  std::vector<int32_t> pages;

  Group* group() const { return group_; }
  absl::Time first_token_time = absl::InfiniteFuture();
  SampleResult result;

 private:
  void NoteEpoch(int64_t epoch);
  void ExtendSpans(int32_t num_tokens, const WeightEpochs& epochs);

  Group* group_;
  int32_t sample_index_;
  StopMatcher matcher_;
  int32_t num_computed_ = 0;
  int32_t num_replay_ = 0;
  int32_t num_drafts_ = 0;          // pending in the executor slot, to verify in the next pass
  int32_t num_restore_drafts_ = 0;  // were pending when the sequence was reset
  int32_t num_computed_ever_ = 0;   // high-water mark: rows below it are recomputed ones
  int64_t weight_epoch_ = 0;        // of the latest pass
  int64_t span_epoch_ = -1;         // of the last span; -1: none, or it is another engine's
  bool resumed_ = false;
  bool cache_mixed_ = false;        // what is computed was so under weights of more than one epoch
};

// What waits to start: a group with at least one waiting sample, or a score.
struct Work {
  bool is_score = false;
  int32_t priority = 0;
  uint64_t arrival = 0;     // unique, in order of submission
  bool admitted = false;    // has held resources
  bool paused = false;      // an observer has no room
  int64_t queued_bytes = 0; // charged to the queue until admitted
  absl::Time submitted, admitted_at;
  absl::Time deadline = absl::InfiniteFuture();
};

struct Group : Work {
  // `token_bytes` outlives the group. Takes request.resume: the samples have it then.
  Group(GenerateRequest generate_request, const std::vector<uint32_t>& eos_token_ids, const TokenBytes* token_bytes);

  std::vector<SampleResult> resume_;  // request.resume on its way to the samples; empty afterwards
  const GenerateRequest request;
  const StopRules rules;
  std::vector<uint32_t> banned_before_min;
  const int32_t num_draft_tokens;  // γ; 0 when the mode is off
  std::vector<Sequence> samples;   // never resized
  Sequence prefix;
  int32_t num_waiting = 0;         // samples in kWaiting
  int32_t num_unfinished = 0;
  int32_t num_fork_pending = 0;    // samples that have forked and not yet run: the prefix stays
  bool prefix_forked = false;      // since it was built
  bool cut_short = false;          // a weight update ended a sample
};

struct ScoreWork : Work {
  explicit ScoreWork(ScoreRequest score_request);

  const ScoreRequest request;
  uint64_t handle = 0;
  std::shared_ptr<ScoreObserver> observer;
  int64_t score_bytes = 0;  // charged while running
  bool running = false;
  int32_t num_rows_done = 0, num_bases_done = 0;
  int32_t num_restarts = 0;  // times that it lost rows to a commit or a flush
  int32_t state_slot = -1;
  std::vector<int32_t> pages;

  int32_t num_rows() const { return static_cast<int32_t>(request.token_ids.size()); }
  int32_t num_bases() const { return request.draft_depth > 0 ? num_rows() - 1 : 0; }
  bool done() const { return num_rows_done == num_rows() && num_bases_done == num_bases(); }
};

}  // namespace bebop
