// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

#include "absl/time/time.h"

namespace bebop {

// What becomes of running samples when new weights are swapped in. A request's own OnUpdate goes first, except over kAbort.
enum class InFlight : uint8_t {
  kKeep,       // they go on with the caches they have
  kRecompute,  // they recompute their caches under the new weights
  kAbort,      // they end with their tokens so far (kSuperseded)
  kWait,       // the swap waits until those that leave the choice to it have ended; nothing new starts meanwhile
};

// A request's own choice.
enum class OnUpdate : uint8_t { kAsTheUpdateSays, kContinue, kRecompute, kStop };

// Which weight versions may sample a request's tokens (rollout.proto, WeightParams).
struct WeightPolicy {
  int64_t min_step = INT64_MIN;         // it waits until the target's step has reached this
  bool refuse_if_behind = false;        // a new request below min_step is refused; it waits all the same if the step is set back afterwards
  int64_t max_step_spread = INT64_MAX;  // a sample ends (kWeightPolicy) rather than span target steps further apart
  OnUpdate on_update = OnUpdate::kAsTheUpdateSays;
};

// What a commit did. Samples that were running, by what became of them; those that had nothing computed count nowhere.
struct CommitResult {
  absl::Duration swap_time;  // from the last step under the old weights to the first that may run under the new: generation stood still
  int32_t kept = 0, recomputed = 0, ended = 0;
};

enum class PauseMode : uint8_t {
  kKeep,   // running samples stand still and go on at Resume
  kAbort,  // running and waiting groups end (kAborted) with their tokens so far; scores go on
  kWait,   // running groups and scores end first; waiting ones stay
};

// What sleeps, or wakes.
struct SleepTags {
  bool weights = false;   // leave the device for host memory; on the CPU, where they are in host memory, this changes nothing
  bool kv_cache = false;  // KV pages and recurrent states are given back; what was running is recomputed
};

// What control has made of the engine.
struct EngineControl {
  bool paused = false, draining = false;
  bool pausing = false;     // a pause with kWait waits for what runs
  bool committing = false;  // CommitWeights is at work, or waits
  SleepTags sleeping;
  int64_t abort_epoch = 0;      // counts the pauses with kAbort
};

}  // namespace bebop
