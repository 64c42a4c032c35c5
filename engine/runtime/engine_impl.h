// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "engine/base/clock.h"
#include "engine/base/logging.h"
#include "engine/base/mutex.h"
#include "engine/base/status_macros.h"
#include "engine/base/status_reason.h"
#include "engine/model/model.h"
#include "engine/runtime/backend.h"
#include "engine/runtime/engine.h"
#include "engine/schedule/engine_core.h"
#include "engine/weights/offloaded_weights.h"

// What engine.cc and engine_control.cc share; not for others.
namespace bebop {

// Waits for the end of a step are notified; this only bounds what a lost notification could cost.
inline constexpr std::chrono::milliseconds kSettleWait(50);

inline absl::Status Failed(const EngineCore& core) {
  return absl::InternalError(absl::StrCat("the engine has failed: ", core.health().message()));
}

inline absl::Status Asleep() {
  return StatusWithReason(absl::StatusCode::kFailedPrecondition, "ASLEEP", "the engine sleeps: wake it up first");
}

// Threads: `core` is used under `mutex` only. The engine thread holds the mutex while the core plans and applies a step, and gives it
// up while the executor runs (UnlockedExecutor). In that window submissions and snapshots go ahead, since they touch nothing that the
// step plan borrows; cancellations, which free memory that the plan may be using, wait in `deferred` for the step to end.
struct Engine::Impl {
  // Runs the real executor without the lock.
  class UnlockedExecutor final : public Executor {
   public:
    explicit UnlockedExecutor(Impl* impl) : impl_(impl) {}
    // Called by EngineCore::Step, that is with impl_->mutex held, which the analysis cannot see through the interface.
    absl::Status Execute(const StepPlan& plan, StepResult* result) override ABSL_NO_THREAD_SAFETY_ANALYSIS {
      impl_->executing = true;
      impl_->mutex.Unlock();
      absl::Status status = impl_->executor->Execute(plan, result);
      impl_->mutex.Lock();
      impl_->executing = false;
      return status;
    }
    // It may wait for an iteration.
    absl::Status SetWeights(const ModelWeights* weights, int64_t epoch) override ABSL_NO_THREAD_SAFETY_ANALYSIS {
      impl_->executing = true;
      impl_->mutex.Unlock();
      absl::Status status = impl_->executor->SetWeights(weights, epoch);
      impl_->mutex.Lock();
      impl_->executing = false;
      return status;
    }
    absl::Status Quiesce() override { return impl_->executor->Quiesce(); }

   private:
    Impl* const impl_;
  };

  EngineInfo info;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<ThreadPool> pool;
  std::unique_ptr<Backend> backend;  // what follows lives in it
  Mutex update_mutex;
  std::unique_ptr<DeviceMemory> update_memory ABSL_GUARDED_BY(update_mutex);  // where updates are staged, one after the other
  std::unique_ptr<ModelStateStorage> storage;
  std::unique_ptr<Model> model;
  std::unique_ptr<Executor> executor;
  MonotonicClock clock;
  UnlockedExecutor unlocked_executor{this};

  // What control changes.
  struct ControlState {
    std::shared_ptr<const ModelWeights> weights;         // null while they are offloaded
    std::shared_ptr<const OffloadedWeights> offloaded;
    SleepTags sleeping;
    bool sleep_paused = false;  // it was Sleep that paused
    bool moving = false;        // a Sleep or a WakeUp is under way, and may be without the lock
    bool committing = false;    // a CommitWeights is
    int64_t num_changes = 0;    // of pause and resume: a Pause that waits gives way to the next one

    bool asleep() const { return sleeping.weights || sleeping.kv_cache; }
  };
  // What a caller has the engine thread do between two steps: called until it returns true.
  struct Task {
    std::function<bool(EngineCore&, ControlState&)> attempt;
    bool started = false, tried = false, done = false;  // an attempt is under way; one has ended; the last one has
  };

  mutable Mutex mutex;
  CondVar changed;  // the engine thread waits on it when idle
  CondVar settled;  // callers of Abort and Drain, and those with a task, wait on it
  std::unique_ptr<EngineCore> core ABSL_GUARDED_BY(mutex);
  bool executing ABSL_GUARDED_BY(mutex) = false;
  bool woken ABSL_GUARDED_BY(mutex) = false;
  bool stopping ABSL_GUARDED_BY(mutex) = false;
  ControlState state ABSL_GUARDED_BY(mutex);
  std::vector<Task*> tasks ABSL_GUARDED_BY(mutex);
  int32_t waiting_for_step ABSL_GUARDED_BY(mutex) = 0;  // callers that want the core between two steps; they go first
  std::vector<std::function<void(EngineCore&)>> deferred ABSL_GUARDED_BY(mutex);
  std::function<void(const SampleResult&)> on_sample_end ABSL_GUARDED_BY(mutex);
  std::atomic<int64_t> heartbeat_ns{0};
  std::thread thread;

  void Beat() { heartbeat_ns.store(absl::ToUnixNanos(clock.Now()), std::memory_order_relaxed); }

  // The step loop.
  void Loop();

  void RunTasks() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex);

  // Has the engine thread, whose the device is, call `attempt` between two steps, once at least, until it returns true.
  // DEADLINE_EXCEEDED: it did not until `deadline`, and is not called any more; UNAVAILABLE: the engine ends.
  absl::Status OnEngineThread(std::function<bool(EngineCore&, ControlState&)> attempt, absl::Time deadline = absl::InfiniteFuture());

  absl::StatusOr<std::unique_ptr<OffloadedWeights>> Offload(const ModelWeights& weights) {
    BEBOP_ASSIGN_OR_RETURN(const std::unique_ptr<DeviceMemory> memory, backend->NewMemory());
    return OffloadedWeights::Create(info.config, weights, memory.get());
  }

  absl::StatusOr<std::unique_ptr<ModelWeights>> Restore(const OffloadedWeights& weights) {
    BEBOP_ASSIGN_OR_RETURN(const std::unique_ptr<DeviceMemory> memory, backend->NewMemory());
    return weights.Restore(memory.get());
  }

  // Wakes the engine thread; REQUIRES the lock, so that no wake-up is lost.
  void WakeLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    woken = true;
    changed.NotifyAll();
  }

  // Runs `action` between two steps: now if none is executing, else before the next.
  void Control(std::function<void(EngineCore&)> action) {
    MutexLock lock(&mutex);
    if (executing) {
      deferred.push_back(std::move(action));
    } else {
      action(*core);
    }
    WakeLocked();
  }

  // The same, but waits for it; for callers that need the answer.
  template <typename Result>
  Result ControlAndWait(const std::function<Result(EngineCore&)>& action) {
    MutexLock lock(&mutex);
    ++waiting_for_step;
    while (executing) settled.Wait(&mutex);
    --waiting_for_step;
    Result result = action(*core);
    settled.NotifyAll();
    WakeLocked();
    return result;
  }
};

}  // namespace bebop
