// SPDX-License-Identifier: Apache-2.0
// What steers an engine that runs: new weights, pause, sleep.
#include <algorithm>
#include <functional>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/base/status_reason.h"
#include "engine/runtime/engine_impl.h"

namespace bebop {
namespace {

// How long a commit waits at most for scores that have started over once.
constexpr absl::Duration kLongestScoreWait = absl::Seconds(10);


absl::Status Overtaken() { return absl::AbortedError("another call has paused or resumed generation meanwhile"); }

}  // namespace

absl::StatusOr<CommitResult> Engine::CommitWeights(std::unique_ptr<ModelWeights> weights, InFlight in_flight,
                                                   absl::Duration deadline) {
  using ControlState = Impl::ControlState;
  const absl::Time start = impl_->clock.Now();
  // Only waits for samples may end without a swap.
  const absl::Time until = in_flight == InFlight::kWait ? start + deadline : absl::InfiniteFuture();
  const absl::Time scores_until = start + std::min(deadline / 2, kLongestScoreWait);
  const WeightVersion& version = weights->version;
  const WeightName name{.target_step = version.target_step, .draft_step = version.draft_step, .label = version.label};
  // New weights until the swap, then the old ones: whose bytes go with this thread's last reference, far from the step loop.
  std::shared_ptr<const ModelWeights> swapped = std::move(weights);
  absl::StatusOr<CommitResult> result = absl::UnknownError("not tried");
  bool began = false;
  const auto attempt = [&](EngineCore& core, ControlState& state) {
    if (!core.health().ok()) {
      result = Failed(core);
    } else if (state.sleeping.weights) {
      result = Asleep();
    } else if (state.committing && !began) {
      return false;  // after the one that waits
    } else if (in_flight == InFlight::kWait && core.paused() && core.CommitMustWait()) {
      result = StatusWithReason(absl::StatusCode::kFailedPrecondition, "PAUSED",
                                absl::StrCat("the swap ", began ? "waited" : "is to wait", " for running samples, which stand still ",
                                             began ? "since generation was paused: resume it, and repeat the update"
                                                   : "while generation is paused: resume it first"));
    } else {
      if (!began && in_flight == InFlight::kWait) core.HoldForCommit(true);
      began = state.committing = true;
      const bool spares_scores = core.RestartedScoreRuns() && !core.paused() && impl_->clock.Now() < scores_until;
      if (spares_scores) core.HoldScores();
      if (spares_scores || (in_flight == InFlight::kWait && core.CommitMustWait())) return false;
      result = core.Commit(swapped.get(), name, in_flight);
      if (result.ok()) state.weights.swap(swapped);
    }
    if (began) {
      core.HoldForCommit(false);
      state.committing = false;
    }
    return true;
  };
  const absl::Status status = impl_->OnEngineThread(attempt, until);
  if (status.ok()) return result;
  if (began) {
    const absl::Status undone = impl_->OnEngineThread([](EngineCore& core, ControlState& state) {
      core.HoldForCommit(false);
      state.committing = false;
      return true;
    });
    undone.IgnoreError();  // the engine ends
  }
  if (!absl::IsDeadlineExceeded(status)) return status;
  return absl::DeadlineExceededError(
      absl::StrCat("running samples did not end within ", absl::FormatDuration(deadline), ": the weights are as they were"));
}

// ---- Control ----

absl::StatusOr<int32_t> Engine::Pause(PauseMode mode, bool clear_cache, absl::Duration deadline) {
  using ControlState = Impl::ControlState;
  absl::StatusOr<int32_t> ended = 0;
  int64_t change = -1;
  const auto pause = [&](EngineCore& core, ControlState& state) {
    state.sleep_paused = false;  // from now on somebody wants it
    ++state.num_changes;
    if (mode == PauseMode::kAbort) {
      ended = core.PauseAborting();
    } else {
      core.Pause();
    }
    if (clear_cache) {
      if (absl::Status status = core.FlushCache(); !status.ok()) ended = std::move(status);
    }
    return true;
  };
  const auto attempt = [&](EngineCore& core, ControlState& state) {
    if (!core.health().ok()) {
      ended = Failed(core);
      return true;
    }
    if (mode != PauseMode::kWait || !core.RequestsRun()) {
      if (change < 0 || change == state.num_changes) return pause(core, state);
    } else if (change < 0) {
      if (state.asleep()) {
        ended = Asleep();
        return true;
      }
      core.HoldForPause();
      change = ++state.num_changes;
      return false;
    } else if (change == state.num_changes) {
      return false;
    }
    ended = Overtaken();
    return true;
  };
  const absl::Status status = impl_->OnEngineThread(attempt, impl_->clock.Now() + deadline);
  if (!absl::IsDeadlineExceeded(status)) return status.ok() ? ended : status;
  mode = PauseMode::kKeep;
  const absl::Status paused = impl_->OnEngineThread([&](EngineCore& core, ControlState& state) {
    if (change < 0 || change == state.num_changes) return pause(core, state);
    ended = Overtaken();
    return true;
  });
  if (!paused.ok()) return paused;
  if (!ended.ok()) return ended;
  return absl::DeadlineExceededError(
      absl::StrCat("running requests did not end within ", absl::FormatDuration(deadline), ": paused, they stand still"));
}

absl::Status Engine::Resume() {
  absl::Status status;
  const absl::Status ran = impl_->OnEngineThread([&](EngineCore& core, Impl::ControlState& state) {
    if (state.asleep()) {
      status = Asleep();
      return true;
    }
    ++state.num_changes;
    state.sleep_paused = false;
    core.Resume();
    return true;
  });
  return ran.ok() ? status : ran;
}

absl::Status Engine::FlushCache() {
  absl::Status status;
  const absl::Status ran = impl_->OnEngineThread([&](EngineCore& core, Impl::ControlState&) {
    if (!core.health().ok()) {
      status = Failed(core);
    } else if (!core.paused()) {
      status = StatusWithReason(absl::StatusCode::kFailedPrecondition, "NOT_PAUSED", "generation runs: pause it first");
    } else {
      status = core.FlushCache();
    }
    return true;
  });
  return ran.ok() ? status : ran;
}

absl::Status Engine::Sleep(SleepTags tags) {
  using ControlState = Impl::ControlState;
  absl::Status status;
  // First nothing may use what goes; what goes then takes its time on this thread, while the engine's has its heartbeat.
  SleepTags going;
  std::shared_ptr<const ModelWeights> weights;
  absl::Status ran = impl_->OnEngineThread([&](EngineCore& core, ControlState& state) {
    if (state.moving) return false;
    if (!core.health().ok()) {
      status = Failed(core);
      return true;
    }
    if (!core.paused()) {
      core.Pause();
      state.sleep_paused = true;
      ++state.num_changes;
    }
    status = core.FlushCache();
    if (status.ok()) status = impl_->executor->Quiesce();
    if (!status.ok()) {
      core.FailAll(status);
      return true;
    }
    going = {.weights = tags.weights && !state.sleeping.weights, .kv_cache = tags.kv_cache && !state.sleeping.kv_cache};
    state.sleeping.weights = state.sleeping.weights || tags.weights;
    state.sleeping.kv_cache = state.sleeping.kv_cache || tags.kv_cache;
    state.moving = true;
    weights = state.weights;
    return true;
  });
  if (!ran.ok()) return ran;
  BEBOP_RETURN_IF_ERROR(status);
  if (going.kv_cache) impl_->storage->Release();
  std::shared_ptr<const OffloadedWeights> offloaded;
  if (going.weights && !impl_->backend->memory()->is_host()) {
    absl::StatusOr<std::unique_ptr<OffloadedWeights>> copy = impl_->Offload(*weights);
    if (copy.ok()) {
      offloaded = *std::move(copy);
    } else {
      status = copy.status();
    }
  }
  ran = impl_->OnEngineThread([&](EngineCore& core, ControlState& state) {
    state.moving = false;
    if (offloaded != nullptr) {
      state.offloaded = std::move(offloaded);
      state.weights.reset();  // `weights` is the last reference, and goes with this call
    } else if (!status.ok()) {
      state.sleeping.weights = false;
      if (!state.asleep() && std::exchange(state.sleep_paused, false)) {
        core.Resume();
        ++state.num_changes;
      }
    }
    return true;
  });
  return ran.ok() ? status : ran;
}

absl::Status Engine::WakeUp(SleepTags tags) {
  using ControlState = Impl::ControlState;
  absl::Status status;
  SleepTags coming;
  std::shared_ptr<const OffloadedWeights> offloaded;
  absl::Status ran = impl_->OnEngineThread([&](EngineCore& core, ControlState& state) {
    if (state.moving) return false;
    if (!core.health().ok()) {
      status = Failed(core);
      return true;
    }
    coming = {.weights = tags.weights && state.sleeping.weights, .kv_cache = tags.kv_cache && state.sleeping.kv_cache};
    offloaded = state.offloaded;
    state.moving = true;
    return true;
  });
  if (!ran.ok()) return ran;
  BEBOP_RETURN_IF_ERROR(status);
  std::shared_ptr<const ModelWeights> weights;
  if (coming.weights && offloaded != nullptr) {
    absl::StatusOr<std::unique_ptr<ModelWeights>> restored = impl_->Restore(*offloaded);
    if (restored.ok()) {
      weights = *std::move(restored);
    } else {
      status = restored.status();
    }
  }
  const bool has_weights = status.ok();
  if (status.ok() && coming.kv_cache) status = impl_->storage->Restore();
  const bool has_cache = status.ok();
  ran = impl_->OnEngineThread([&](EngineCore& core, ControlState& state) {
    state.moving = false;
    if (weights != nullptr) {
      if (absl::Status moved = core.MoveWeights(weights.get()); !moved.ok()) {
        status = std::move(moved);
        return true;
      }
      state.weights = std::move(weights);
      state.offloaded.reset();
    }
    if (coming.weights && has_weights) state.sleeping.weights = false;
    if (coming.kv_cache && has_cache) state.sleeping.kv_cache = false;
    if (!state.asleep() && std::exchange(state.sleep_paused, false)) {
      core.Resume();
      ++state.num_changes;
    }
    return true;
  });
  return ran.ok() ? status : ran;
}

}  // namespace bebop
