// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/base/clock.h"
#include "engine/schedule/engine_loads.h"
#include "engine/schedule/request.h"
#include "engine/schedule/scheduler_options.h"
#include "engine/schedule/step_plan.h"
#include "engine/schedule/weight_commit.h"
#include "engine/schedule/weight_epochs.h"

namespace bebop {

// What the core must know about the model and the server, besides its budgets.
struct EngineCoreOptions {
  SchedulerOptions scheduler;
  int32_t vocab_size = 0;                         // token ids are < vocab_size; 0: not checked
  int32_t max_draft_tokens = kMaxDraftTokens;     // most drafts a request may ask for (the executor's windows are sized by it)
  std::vector<uint32_t> eos_token_ids;            // end a sample unless the request has ignore_eos
  // Bytes that a token decodes to, for stop strings; the view must stay valid for the core's life. Null: the checkpoint has no
  // tokenizer, requests with stop strings are refused with FAILED_PRECONDITION.
  std::function<std::string_view(uint32_t)> token_bytes;
  WeightName weights;  // that the executor has at the start, under epoch 0
  // Hears of every sample that ends, once, whether or not anybody is there to get it; as observers are called. May be empty.
  std::function<void(const SampleResult&)> on_sample_end = nullptr;
};

// The engine without threads, model or wall clock: queue, scheduler, pools and delivery as one deterministic state machine. What
// happens is a function of the calls made, of clock->Now() and of what the executor returns, which is what lets the simulator
// (tests/sim) replay any run from a seed.
//
// Not thread safe: engine/runtime calls everything under one lock. It gives that lock up while Step is inside Executor::Execute; in
// that window Submit, SubmitScore, Loads and the const methods may be called, since they touch nothing that a plan borrows, and
// nothing else. Observers are called from inside the methods below (never
// after they were detached or told OnDone) and must not call back.
//
//   EngineCore core(options, &clock, &executor);
//   core.Submit(request, observer);
//   while (true) { auto worked = core.Step(); if (!worked.ok()) break; if (!*worked) <sleep until a call or core.NextDeadline()>; }
//
// A steady step (decoding, nobody comes, ends or is preempted) allocates nothing; outputs longer than 4,096 tokens grow by doubling.
// Submitting, starting, ending and score work allocate.
//
// Guarantees (reliability.md section 2):
//   I2   each sample of an accepted request ends exactly once, and each observer's OnDone is called exactly once, last;
//   I3   each token's span names the weights whose pass drew it;   I4   their epochs only grow within a sample;
//   I8   nothing starts from pages or states of other weights than the present; only what runs across a commit reads some, and kv_mixed tells;
//   I9   Detach, Abort and CancelScore free pages and slots at once, executor buffers by the end of the next Step;
//   I10  pages and slots are conserved (Audit recounts them);
//   I11  preemption changes no token and ends in finite time: among runnable work the first in (priority, arrival, sample) order is
//        never preempted, and nothing behind it is started while it waits for memory;
//   I26  the counters of EngineLoads, and those of SpecCounts:
//          tokens emitted = those of source plain, corrected or bonus + num_accepted_draft_tokens - num_trimmed_tokens.
class EngineCore {
 public:
  // REQUIRES: options in range (scheduler_options.h); `clock` and `executor` outlive the core.
  EngineCore(EngineCoreOptions options, const Clock* clock, Executor* executor);
  ~EngineCore();  // without a word to observers of unfinished work: call FailAll first
  EngineCore(const EngineCore&) = delete;
  EngineCore& operator=(const EngineCore&) = delete;

  // Queues a group, or attaches to the running or retained one with the same id and body hash; then the observer is told at once what
  // it missed: OnAdmitted, ended samples, with stream_tokens the tokens so far (OnTokens from 0, with those that were resumed, unless it has yet to
  // be admitted), and OnDone if it has ended.
  // Errors (no observer method is called):
  //   INVALID_ARGUMENT    empty id or prompt, token id >= vocab_size, a field out of range, prompt + max_new_tokens > max_model_len;
  //   ALREADY_EXISTS      id in use with another body hash;
  //   RESOURCE_EXHAUSTED  queue full by count or bytes (the server adds the retry hint), or the request can never fit the pool; the
  //                       message says which, with the numbers. CanNeverFit tells the two apart;
  //   FAILED_PRECONDITION stop strings without a tokenizer; [STEP_NOT_REACHED] WeightPolicy::refuse_if_behind, and not of a repeat;
  //   UNAVAILABLE draining (attaching still works);   INTERNAL engine failed.
  absl::Status Submit(GenerateRequest request, std::shared_ptr<GenerateObserver> observer);
  // Queues a score; *handle names it for CancelScore. Same errors. OnScore: OK, DEADLINE_EXCEEDED, UNAVAILABLE (drained) or the
  // engine's failure.
  absl::Status SubmitScore(ScoreRequest request, std::shared_ptr<ScoreObserver> observer, uint64_t* handle);
  // True of a RESOURCE_EXHAUSTED refusal that no retry can cure.
  static bool CanNeverFit(const absl::Status& refusal);

  // Detaches `observer`: no call to it any more. The request is cancelled when it was the last one. Unknown ids and observers are
  // ignored.
  void Detach(const std::string& request_id, const GenerateObserver* observer);
  // Forgets a score; its observer hears nothing more. Unknown handles are ignored.
  void CancelScore(uint64_t handle);
  // Ends a request for all observers with the tokens so far as data (kAborted, then OnDone OK). False: unknown or already ended.
  bool Abort(const std::string& request_id);

  // Refuses new work from now on; at `deadline` whatever still runs ends (groups kDrained with OnDone OK, scores UNAVAILABLE), and
  // while paused, at once. A second call may only bring the deadline forward.
  void StartDrain(absl::Time deadline);
  bool draining() const;
  bool Idle() const;  // nothing accepted is unfinished

  // The engine cannot go on: everything unfinished ends with `status` (samples kFailed, OnDone(status)), and new work is refused as
  // INTERNAL. REQUIRES: !status.ok(). The first failure stays.
  void FailAll(const absl::Status& status);
  const absl::Status& health() const;  // what FailAll was told

  // One iteration: deadlines and expirations, plan, execute, apply, deliver. True: something was done, call again. False: nothing can
  // be done now (idle, or every sample is paused because its observer has no room). An executor error is returned after FailAll.
  absl::StatusOr<bool> Step();
  // When Step has something to do even if nobody calls anything before: the next request, drain or retention deadline. Observers
  // regaining room are not foreseen: the runtime wakes, or looks again soon, while !Idle().
  absl::Time NextDeadline() const;

  // ---- Weights. Between two steps, like everything below ----

  // Gives new weights to the executor and does to running samples what `in_flight` and their requests say (docs/engine_contract.md, "Weight
  // epochs"). Nothing starts from what other weights computed: shared prefixes are forgotten, scores start over. An error is the executor's, after
  // FailAll. Ends HoldForCommit.
  absl::StatusOr<CommitResult> Commit(const ModelWeights* weights, WeightName name, InFlight in_flight);
  // The same weights at another address. REQUIRES: nothing is computed (FlushCache).
  absl::Status MoveWeights(const ModelWeights* weights);
  // For InFlight::kWait: until the hold ends, no sample begins that has not begun, and no score.
  void HoldForCommit(bool hold);
  // So that pushes in quick succession cannot make a score start over for ever: while one runs that has done so, a commit had better wait (the caller
  // bounds for how long), and HoldScores lets no other begin, until the commit or HoldForCommit(false).
  bool RestartedScoreRuns() const;
  void HoldScores();
  // Whether a sample runs, or has run and waits, whose request leaves it to the update what becomes of it.
  bool CommitMustWait() const;
  const WeightName& weights() const;

  // ---- Control ----

  // While paused, Step plans nothing: work is accepted and waits, and deadlines, endings and the drain go on.
  void Pause();  // as PauseMode::kKeep
  void Resume();
  bool paused() const;
  // Pauses and ends all groups, kAborted with the next abort epoch. Scores stay, and go on with Resume. Returns the samples ended.
  int32_t PauseAborting();
  int64_t abort_epoch() const;
  // For PauseMode::kWait: until Pause or Resume no request is admitted; RequestsRun tells whether an admitted one has not ended.
  void HoldForPause();
  bool holds_for_pause() const;
  bool RequestsRun() const;
  // Takes all that is computed: afterwards no page, state slot or executor slot is held, and the executor knows of nothing. REQUIRES: paused.
  // An error is the executor's, after FailAll.
  absl::Status FlushCache();

  EngineLoads Loads() const;
  // Recounts pages, references, slots, queues and counters from their holders. INTERNAL names the first difference. For tests and
  // debug builds: O(everything).
  absl::Status Audit() const;

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace bebop
