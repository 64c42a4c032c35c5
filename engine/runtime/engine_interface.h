// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/config/model_config.h"
#include "engine/schedule/engine_loads.h"
#include "engine/schedule/request.h"
#include "engine/schedule/weight_commit.h"
#include "engine/tokenizer/tokenizer.h"
#include "engine/weights/model_weights.h"
#include "engine/weights/weight_update.h"
#include "kernels/common/dtype.h"

namespace bebop {

struct EngineInfo {
  ModelConfig config;
  std::string model_name;  // last path component
  DType dtype = DType::kBFloat16;
  std::string device;           // "cpu", "cuda:0 (NVIDIA H200)"
  std::string instruction_set;  // of the CPU kernels
  int32_t num_threads = 0;
  int32_t max_model_len = 0, max_num_seqs = 0, max_step_tokens = 0, max_draft_tokens = 0;
  bool has_mtp = false, dummy_weights = false;
  int64_t weight_bytes = 0, kv_cache_bytes = 0, state_bytes = 0;
  // Bytes one target pass / one lm_head product / one MTP step streams (for effective bandwidth).
  int64_t layer_bytes = 0, lm_head_bytes = 0, mtp_bytes = 0;
};

// What the server needs of an engine; `Engine` is the implementation, tests pass a fake. Thread safe. All results come through
// observers, called one at a time under the engine's lock (request.h says from where).
//
// Every accepted request ends exactly once: OnDone is called for it even when the engine fails or shuts down.
class EngineInterface {
 public:
  virtual ~EngineInterface() = default;

  // Queues a group, or attaches to the running or retained one with the same id and body hash (its samples so far are delivered
  // to the new observer, too). `request` is complete: defaults resolved, fields in range (the server validates against info()).
  // ALREADY_EXISTS: id in use with another hash. RESOURCE_EXHAUSTED: queue full, or it can never fit (message says which).
  // INVALID_ARGUMENT: prompt + max_new_tokens > max_model_len, token id >= vocab_size. UNAVAILABLE: draining. INTERNAL: engine failed.
  // FAILED_PRECONDITION [STEP_NOT_REACHED]: WeightPolicy::refuse_if_behind; no repeat is refused for it.
  // On an error no observer method is called.
  virtual absl::Status Submit(GenerateRequest request, std::shared_ptr<GenerateObserver> observer) = 0;
  virtual absl::Status SubmitScore(ScoreRequest request, std::shared_ptr<ScoreObserver> observer, uint64_t* handle) = 0;

  // Detaches `observer` (no further call to it after the next step); the request is cancelled when it was the last one.
  virtual void Detach(const std::string& request_id, const GenerateObserver* observer) = 0;
  virtual void CancelScore(uint64_t handle) = 0;
  // `listener` hears of every sample that ends from now on, once, however many observers it has and whether or not it is asked for
  // again; as observers are called. For counters. Replaces the one before; empty: none.
  virtual void ListenToSampleEnds(std::function<void(const SampleResult&)> listener) = 0;
  // Ends a request for all observers with the tokens so far as data (finish kAborted); waits for the step that executes, if any.
  // False: unknown or already ended.
  virtual bool Abort(const std::string& request_id) = 0;
  // An observer's HasRoom() has become true again: look at once, also when the engine would otherwise sleep.
  virtual void Wake() = 0;

  // Refuses new work and lets running work finish until `deadline`, then ends the rest as kDrained with partial tokens; what stands still
  // because generation is paused, at once. Blocks.
  virtual void Drain(absl::Duration deadline) = 0;

  // ---- Weights ----

  // The weights that sample now, with their version; shares the arena, so it may outlive a swap. Null while they sleep.
  virtual std::shared_ptr<const ModelWeights> weights() const = 0;
  // What they are; also while they sleep.
  virtual WeightVersion weight_version() const = 0;
  // Opens an update of the present weights, in memory (and on a stream) of its own; see WeightUpdate::Start. At most one may exist, which is the caller's
  // to see to; it must end before the engine does. FAILED_PRECONDITION [ASLEEP].
  virtual absl::StatusOr<std::unique_ptr<WeightUpdate>> StartWeightUpdate(WeightUpdateSpec spec, int64_t limit_bytes) = 0;
  // Swaps in what WeightUpdate::Finish made, target and draft together, between two steps, and tells what it did. Blocks: for a step; for a
  // score that already had to start over, at most half of `deadline` and 10 s; and with kWait until the samples that it waits for have ended, at most until
  // `deadline` passes (DEADLINE_EXCEEDED: nothing has changed; `weights` is gone). Works while paused. FAILED_PRECONDITION [ASLEEP], or [PAUSED]: kWait,
  // and what it would wait for, or waits for, stands still: nobody could say for how long. UNAVAILABLE: the engine ends; INTERNAL: it failed.
  virtual absl::StatusOr<CommitResult> CommitWeights(std::unique_ptr<ModelWeights> weights, InFlight in_flight, absl::Duration deadline) = 0;
  // Hashes the resident bytes again; generation goes on. FAILED_PRECONDITION [ASLEEP].
  virtual absl::StatusOr<WeightVersion> RehashWeights() const = 0;

  // ---- Control; each may be repeated. They block for a step, or as said ----

  // Returns the samples it ended. kWait blocks until what runs has ended, at most until `deadline` passes (DEADLINE_EXCEEDED: paused as kKeep).
  // `clear_cache`: as FlushCache. What comes meanwhile is accepted, and waits.
  virtual absl::StatusOr<int32_t> Pause(PauseMode mode, bool clear_cache, absl::Duration deadline) = 0;
  virtual absl::Status Resume() = 0;  // FAILED_PRECONDITION [ASLEEP]
  // Pauses (kKeep) and gives memory back; WakeUp takes it again, and resumes if it was Sleep that paused and nothing sleeps any more.
  // WakeUp: RESOURCE_EXHAUSTED, still asleep.
  virtual absl::Status Sleep(SleepTags tags) = 0;
  virtual absl::Status WakeUp(SleepTags tags) = 0;
  // All that was computed for running samples and shared prefixes is forgotten, and computed again at Resume. FAILED_PRECONDITION [NOT_PAUSED].
  virtual absl::Status FlushCache() = 0;
  virtual EngineControl control() const = 0;

  virtual const EngineInfo& info() const = 0;
  virtual const Tokenizer* tokenizer() const = 0;  // null: the checkpoint has none
  virtual EngineLoads GetLoads() const = 0;
  // Not OK after a failure of the executor; health follows it. It stays: only a new process gets a failed device back.
  virtual absl::Status health() const = 0;
  // Time since the engine thread last went round its loop (heartbeat).
  virtual absl::Duration SinceHeartbeat() const = 0;
};

}  // namespace bebop
