// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "engine/memory/page_pool.h"
#include "engine/memory/slot_pool.h"
#include "engine/schedule/request_queue.h"
#include "engine/schedule/scheduler_options.h"
#include "engine/schedule/sequence.h"
#include "engine/schedule/step_plan.h"

namespace bebop {

// Decides what runs in each step and who holds which pages and slots. Knows nothing of observers, ids or time. Between Plan and Apply
// only CheckRoom, Add and the const methods may be called, except after a failed step (then everything is removed).
//
// Policy, all of it over the one Rank order:
//  1. Memory. Running sequences first grow, in order. One that finds no page takes from a victim: paused sequences first, then the last in
//     order behind it; if there is none it gives up its own memory (it was the last). Work that waits then starts, in order, with all pages
//     that its known tokens need plus one page of headroom for each running sequence. It takes only from paused sequences, from idle
//     shared prefixes behind it and, unless it is a score, from strictly lower priorities. What finds no memory blocks everything behind it.
//  2. Rows. Decodes take 1 + drafts rows each and are never cut (which drafts exist decides the tokens of rejection sampling), then
//     prefill chunks in order, then scores. Scores that got no row for kScorePatience steps get half of the next step, and a piece of
//     prefill_cut_tokens at least. Prompts and scores wait where rows are left but no whole piece: where they are cut must not depend on
//     what else runs. The first prompt always finds a piece beside all decodes, but for the one step in kScorePatience + 1 that scores share.
//  3. Groups. With two or more samples to start and a prompt of P > 1 tokens, a shared prefix computes [0, P-1) once; samples fork from
//     it: full pages by reference, the page of position P-1 by copy, the state by reading the prefix's slot in their first pass. The
//     last sample, or one for which nothing else would ever make room, takes the prefix over instead: no copy, no second slot.
//
// Why it never live-locks: let S be the first runnable work in order. If it runs, nobody may take from it, and it may take from all
// others but scores; if it waits, nothing behind it starts, so what runs ends or gives up, and then S fits the pool (Submit checked the
// empty pool). Running scores hold all they need from the start and get rows at least every kScorePatience + 1 steps.
class Scheduler {
 public:
  static constexpr int32_t kScorePatience = 8;

  // What Apply found out about one planned sequence.
  struct Progress {
    Sequence* sequence = nullptr;
    int32_t begin = 0;                           // output tokens before the step
    FinishReason finish = FinishReason::kNone;   // not kNone: the sample ended, its resources are free
    int64_t weight_epoch = 0;                    // of the outcome
    SpecCounts spec;                             // of this step
  };
  struct FinishedScore {
    ScoreWork* score = nullptr;
    ScoreResult* result = nullptr;  // in the StepResult
  };

  explicit Scheduler(const SchedulerOptions& options);
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // OK, or RESOURCE_EXHAUSTED with the numbers: no room in the queue, or (*never true) not even an empty pool would hold it.
  absl::Status CheckRoom(const Group& group, bool* never) const;
  absl::Status CheckRoom(const ScoreWork& score, bool* never) const;
  void Add(Group* group);  // REQUIRES: CheckRoom was OK. The group stays until Remove.
  void Add(ScoreWork* score);
  // Frees what the work holds and forgets it. Ended work must be removed, too.
  void Remove(Group* group);
  void Remove(ScoreWork* score);

  // ---- Between two steps; what becomes of running work ----

  // A running sample waits again, with its output; all else of it is forgotten. A preemption, unless nothing was computed.
  void Recompute(Sequence* sample);
  // An unfinished sample has ended: frees what it holds. Its group may go on.
  void End(Sequence* sample);
  // Forgets shared prefixes, also those half computed. Samples that were to begin from one and have not done so wait again.
  void DropPrefixes();
  // Running scores lose what was computed, and wait for their turn to start over.
  void RestartScores();
  // While set, what has not begun does not start: samples (Sequence::has_begun), and with them scores; or whole requests (Work::admitted).
  void HoldSamples(bool hold) { hold_samples_ = hold; }
  void HoldScores(bool hold) { hold_scores_ = hold; }  // scores alone
  bool RestartedScoreRuns() const;  // one that has already lost work
  void HoldRequests(bool hold) { hold_requests_ = hold; }
  bool holds_requests() const { return hold_requests_; }

  // A plan of nothing but what the executor must forget; may be empty.
  void PlanNothing(StepPlan* plan);
  // Fills *plan (reused; its spans are valid until the next Plan) and *admitted with the work that got its first resources.
  // Work::paused tells which groups may not run.
  void Plan(StepPlan* plan, std::vector<Work*>* admitted);
  // Applies the outcome of the planned step. Both lists are replaced.
  void Apply(const StepPlan& plan, StepResult* result, const WeightEpochs& epochs, std::vector<Progress>* progress,
             std::vector<FinishedScore>* finished);
  // The earliest epoch that an outcome of what runs may still carry; INT64_MAX: any.
  int64_t EarliestEpoch() const;

  const SchedulerOptions& options() const { return options_; }
  const PagePool& pages() const { return pages_; }
  const SlotPool& state_slots() const { return state_slots_; }
  const SlotPool& slots() const { return slots_; }
  const RequestQueue& queue() const { return queue_; }
  int64_t num_preemptions() const { return num_preemptions_; }
  int64_t num_recomputed_tokens() const { return num_recomputed_tokens_; }

  // Recounts references and slots from `groups` and `scores` (all work added and not removed). INTERNAL at the first difference.
  absl::Status Audit(const std::vector<const Group*>& groups, const std::vector<const ScoreWork*>& scores) const;

 private:
  enum class StartResult : uint8_t { kStarted, kSkipped, kNoSlot, kNoMemory };
  struct Need {
    int32_t pages = 0, state_slots = 0, slots = 0;
  };
  // Who asks for room, and whom it may take from.
  struct Requester {
    Rank rank;
    bool running = false;                   // grows: from anybody behind it
    bool is_score = false;
    const Sequence* keep = nullptr;         // the prefix it forks from
  };

  int32_t PagesFor(int32_t positions) const { return (positions + options_.page_tokens - 1) / options_.page_tokens; }
  bool HasFree(const Need& need) const;
  bool MayTake(const Requester& requester, const Sequence& holder) const;
  bool MakeRoom(const Requester& requester, const Need& need);
  void TakePages(int32_t count, std::vector<int32_t>* pages);
  void ReleaseMemory(Sequence* sequence);
  void ReleaseSlot(Sequence* sequence);
  void ReleaseScore(ScoreWork* score);
  void Preempt(Sequence* sequence);
  void TakeBack(Sequence* sequence);
  void ReleasePrefixIfUnneeded(Group* group);
  bool MayStart(const Sequence& sample) const;
  int32_t NumToStart(const Group& group) const;

  void GrowRunning();
  void StartWaiting(int32_t row_budget, std::vector<Work*>* admitted);
  StartResult StartGroup(Group* group, int32_t row_budget);
  StartResult StartSample(Sequence* sample);
  StartResult ForkSample(Sequence* sample);
  StartResult StartPrefix(Group* group);
  StartResult StartScore(ScoreWork* score);
  bool NothingRuns() const;
  int32_t Headroom(const Requester& requester) const;
  void Run(Sequence* sequence);
  void CompactRunning();
  void Reserve(Sequence* sequence);
  void PlanSequences(int32_t row_budget, StepPlan* plan);
  int32_t CutDown(int32_t position) const { return position / options_.prefill_cut_tokens * options_.prefill_cut_tokens; }
  int32_t PrefillRows(const Sequence& sequence, int32_t room) const;
  void PlanOne(Sequence* sequence, int32_t max_known, StepPlan* plan);
  void PlanScores(int32_t row_budget, StepPlan* plan);

  const SchedulerOptions options_;
  PagePool pages_;
  SlotPool state_slots_;
  SlotPool slots_;  // executor slots
  RequestQueue queue_;

  std::vector<Sequence*> running_;        // kRunning, by rank
  std::vector<Sequence*> ready_;          // prefixes in kReady
  std::vector<ScoreWork*> running_scores_;  // by rank
  std::vector<uint64_t> dropped_scores_;
  int64_t running_score_bytes_ = 0;
  int32_t score_steps_without_rows_ = 0;
  int64_t num_preemptions_ = 0;
  int64_t num_recomputed_tokens_ = 0;
  uint64_t last_residency_ = 0;
  bool hold_samples_ = false, hold_scores_ = false, hold_requests_ = false;

  // The step under way, parallel to StepPlan::sequences and StepPlan::scores.
  struct Planned {
    Sequence* sequence = nullptr;
    Pass pass;
  };
  std::vector<Planned> planned_;
  std::vector<ScoreWork*> planned_scores_;
  std::vector<PageCopy> page_copies_;     // made while starting
  std::vector<uint32_t> token_arena_;     // known tokens of the step; reserved for the largest one, so spans into it stay valid
};

}  // namespace bebop
