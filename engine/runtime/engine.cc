// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/engine.h"

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/clock.h"
#include "engine/base/logging.h"
#include "engine/base/mutex.h"
#include "engine/base/status_macros.h"
#include "engine/base/status_reason.h"
#include "engine/config/model_config.h"
#include "engine/formats/file.h"
#include "engine/model/model.h"
#include "engine/runtime/backend.h"
#include "engine/runtime/engine_memory.h"
#include "engine/schedule/engine_core.h"
#include "engine/weights/checkpoint.h"
#include "engine/weights/dummy_weights.h"
#include "engine/weights/offloaded_weights.h"
#include "engine/weights/resident_tensor.h"
#include "engine/weights/weight_layout.h"
#include "kernels/common/cpu_features.h"

namespace bebop {
namespace {

// How long the engine thread sleeps at most when nothing happens: it must come round for its heartbeat, and for observers whose room
// nobody announced.
constexpr absl::Duration kIdleWait = absl::Milliseconds(500);
constexpr absl::Duration kPausedWait = absl::Milliseconds(20);
// Waits for the end of a step are notified; this only bounds what a lost notification could cost.
constexpr std::chrono::milliseconds kSettleWait(50);
// How long a commit waits at most for scores that have started over once.
constexpr absl::Duration kLongestScoreWait = absl::Seconds(10);

// "tiny" of "models/tiny", "models/tiny/" and, seen from inside it, ".".
std::string LastComponent(const std::string& path) {
  std::error_code error;
  std::filesystem::path absolute = std::filesystem::absolute(path, error).lexically_normal();
  if (!absolute.has_filename()) absolute = absolute.parent_path();
  return absolute.filename();
}

absl::Status Overtaken() { return absl::AbortedError("another call has paused or resumed generation meanwhile"); }

absl::Status Failed(const EngineCore& core) {
  return absl::InternalError(absl::StrCat("the engine has failed: ", core.health().message()));
}

absl::Status Asleep() {
  return StatusWithReason(absl::StatusCode::kFailedPrecondition, "ASLEEP", "the engine sleeps: wake it up first");
}

}  // namespace

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
  CondVar changed;  // the engine thread waits on it when idle; callers of Abort and Drain wait for `settled`
  CondVar settled;
  std::unique_ptr<EngineCore> core ABSL_GUARDED_BY(mutex);
  bool executing ABSL_GUARDED_BY(mutex) = false;
  bool woken ABSL_GUARDED_BY(mutex) = false;
  bool stopping ABSL_GUARDED_BY(mutex) = false;
  ControlState state ABSL_GUARDED_BY(mutex);
  std::vector<Task*> tasks ABSL_GUARDED_BY(mutex);
  int32_t waiting_for_step ABSL_GUARDED_BY(mutex) = 0;  // callers that want the core between two steps; they go first
  std::vector<std::function<void(EngineCore&)>> deferred ABSL_GUARDED_BY(mutex);
  std::atomic<int64_t> heartbeat_ns{0};
  std::thread thread;

  void Beat() { heartbeat_ns.store(absl::ToUnixNanos(clock.Now()), std::memory_order_relaxed); }

  // The step loop.
  void Loop() {
    backend->EnterThread();
    MutexLock lock(&mutex);
    bool failure_logged = false;
    while (!stopping) {
      Beat();
      while (waiting_for_step > 0 && !stopping) settled.WaitFor(&mutex, kSettleWait);
      for (auto& action : deferred) action(*core);
      deferred.clear();
      RunTasks();
      woken = false;
      const absl::StatusOr<bool> worked = core->Step();
      settled.NotifyAll();
      if (!worked.ok()) {
        // The core has failed everything in flight; the loop stays to answer cancellations, and sleeps in between.
        if (!failure_logged) Log(LogLevel::kError, absl::StrCat("engine failed: ", worked.status().ToString()));
        failure_logged = true;
      } else if (*worked) {
        continue;
      }
      const absl::Duration longest = core->Idle() || core->paused() ? kIdleWait : kPausedWait;
      const absl::Duration wait = failure_logged ? kIdleWait : std::min(longest, core->NextDeadline() - clock.Now());
      if (!woken && !stopping && deferred.empty() && waiting_for_step == 0 && wait > absl::ZeroDuration()) {
        changed.WaitFor(&mutex, absl::ToChronoNanoseconds(wait));
      }
    }
  }

  void RunTasks() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    // An attempt may give up the lock inside the executor: others are added meanwhile, and those that have not started are taken out.
    for (size_t i = 0; i < tasks.size();) {
      Task* const task = tasks[i];
      task->started = true;
      task->done = task->attempt(*core, state);
      task->started = false;
      task->tried = true;
      const auto it = std::find(tasks.begin(), tasks.end(), task);
      i = static_cast<size_t>(it - tasks.begin());
      if (task->done) {
        tasks.erase(it);
        settled.NotifyAll();
      } else {
        ++i;
      }
    }
  }

  // Has the engine thread, whose the device is, call `attempt` between two steps, once at least, until it returns true. DEADLINE_EXCEEDED: it
  // did not until `deadline`, and is not called any more; UNAVAILABLE: the engine ends.
  absl::Status OnEngineThread(std::function<bool(EngineCore&, ControlState&)> attempt, absl::Time deadline = absl::InfiniteFuture()) {
    Task task{.attempt = std::move(attempt)};
    MutexLock lock(&mutex);
    tasks.push_back(&task);
    WakeLocked();
    while (!task.done) {
      const absl::Duration left = task.tried ? deadline - clock.Now() : absl::InfiniteDuration();
      const bool late = left <= absl::ZeroDuration();
      if ((stopping || late) && !task.started) {
        std::erase(tasks, &task);
        if (stopping) return absl::UnavailableError("the engine is shutting down");
        return absl::DeadlineExceededError("the deadline passed");
      }
      // Never no time at all, which would be to spin until the step ends.
      settled.WaitFor(&mutex, late ? std::chrono::nanoseconds(kSettleWait)
                                   : std::min<std::chrono::nanoseconds>(kSettleWait, absl::ToChronoNanoseconds(left)));
    }
    return absl::OkStatus();
  }

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

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(const EngineOptions& options, const ExecutorWrapper& wrap) {
  auto impl = std::make_unique<Impl>();
  BEBOP_ASSIGN_OR_RETURN(ModelConfig config, LoadModelConfig(options.model_path));
  impl->pool = std::make_unique<ThreadPool>(options.num_threads > 0 ? options.num_threads
                                                                    : std::max(1u, std::thread::hardware_concurrency()));
  BEBOP_ASSIGN_OR_RETURN(impl->backend, MakeBackend(options, impl->pool.get()));
  Backend& backend = *impl->backend;
  BEBOP_RETURN_IF_ERROR(backend.CheckShapes(config, options.dtype));
  // Options and sizes before weights: what cannot fit is said before gigabytes are read.
  const MatrixLayout layout = backend.memory()->is_host() ? MatrixLayout::kPanels : MatrixLayout::kRows;
  const int64_t weight_bytes = WeightBytes(config, options.dtype, config.num_mtp_layers > 0, layout);
  BEBOP_RETURN_IF_ERROR(backend.Sizes(options, config, weight_bytes).status());

  const std::string tokenizer_path = options.model_path + "/tokenizer.json";
  if (FileExists(tokenizer_path)) {
    BEBOP_ASSIGN_OR_RETURN(impl->tokenizer, Tokenizer::FromFile(tokenizer_path));
  }
  std::shared_ptr<const ModelWeights> weights;
  if (options.load_dummy) {
    if (options.needs_mtp && config.num_mtp_layers == 0) {
      return absl::FailedPreconditionError(absl::StrCat(options.model_path, ": expected an MTP layer for speculation, got "
                                                        "mtp_num_hidden_layers 0: start with --speculation off"));
    }
    BEBOP_ASSIGN_OR_RETURN(weights, MakeDummyWeights(config, options.dtype, options.dummy_seed, *impl->pool, backend.memory()));
  } else {
    LoadOptions load;
    load.path = options.model_path;
    load.mtp_path = options.mtp_path;
    load.dtype = options.dtype;
    load.needs_mtp = options.needs_mtp;
    BEBOP_ASSIGN_OR_RETURN(weights, LoadModelWeights(config, load, *impl->pool, backend.memory()));
  }
  if (!weights->mtp.has_value()) config.num_mtp_layers = 0;
  BEBOP_ASSIGN_OR_RETURN(const EngineSizes sizes, backend.Sizes(options, config, weights->storage_bytes));
  BEBOP_ASSIGN_OR_RETURN(impl->storage, ModelStateStorage::Create(config, sizes.state, backend.memory()));
  BEBOP_ASSIGN_OR_RETURN(impl->model, Model::Create(config, sizes.scheduler.max_step_tokens, backend.activation_dtype(options.dtype),
                                                    backend.ops(), backend.memory()));
  impl->model->SetWeights(weights.get());
  BEBOP_ASSIGN_OR_RETURN(impl->executor, backend.MakeExecutor(options, config, sizes, impl->model.get(), impl->storage.get()));
  if (wrap != nullptr) impl->executor = wrap(std::move(impl->executor));

  EngineInfo& info = impl->info;
  info.config = config;
  info.model_name = LastComponent(options.model_path);
  info.dtype = options.dtype;
  info.device = backend.name();
  info.instruction_set = cpu::InstructionSetName(cpu::DetectInstructionSet());
  info.num_threads = impl->pool->num_threads();
  info.max_model_len = sizes.scheduler.max_model_len;
  info.max_num_seqs = sizes.scheduler.max_num_seqs;
  info.max_step_tokens = sizes.scheduler.max_step_tokens;
  info.max_draft_tokens = sizes.max_draft_tokens;
  info.has_mtp = weights->mtp.has_value();
  info.dummy_weights = options.load_dummy;
  info.weight_bytes = weights->storage_bytes;
  info.kv_cache_bytes = PageBytes(config, sizes.state) * sizes.state.num_pages;
  info.state_bytes = SlotBytes(config, sizes.state) * sizes.state.num_slots;
  info.layer_bytes = weights->layer_bytes;
  info.lm_head_bytes = weights->lm_head_bytes;
  info.mtp_bytes = weights->mtp_bytes;

  EngineCoreOptions core_options;
  core_options.scheduler = sizes.scheduler;
  core_options.vocab_size = config.vocab_size;
  core_options.max_draft_tokens = sizes.max_draft_tokens;
  core_options.eos_token_ids = config.eos_token_ids;
  if (const Tokenizer* tokenizer = impl->tokenizer.get()) {
    core_options.token_bytes = [tokenizer](uint32_t token) { return tokenizer->TokenBytes(token); };
  }
  core_options.weights = {.target_step = weights->version.target_step, .draft_step = weights->version.draft_step, .label = weights->version.label};
  {
    MutexLock lock(&impl->mutex);
    impl->state.weights = std::move(weights);
    impl->core = std::make_unique<EngineCore>(std::move(core_options), &impl->clock, &impl->unlocked_executor);
  }
  impl->Beat();
  impl->thread = std::thread([raw = impl.get()] { raw->Loop(); });
  return std::unique_ptr<Engine>(new Engine(std::move(impl)));
}

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Engine::~Engine() {
  {
    MutexLock lock(&impl_->mutex);
    impl_->stopping = true;
    impl_->WakeLocked();
    impl_->settled.NotifyAll();
  }
  impl_->thread.join();
  impl_->backend->EnterThread();  // this thread takes everything down
  MutexLock lock(&impl_->mutex);
  if (!impl_->core->Idle()) impl_->core->FailAll(absl::UnavailableError("the engine was shut down"));
}

absl::Status Engine::Submit(GenerateRequest request, std::shared_ptr<GenerateObserver> observer) {
  MutexLock lock(&impl_->mutex);
  const absl::Status status = impl_->core->Submit(std::move(request), std::move(observer));
  impl_->WakeLocked();
  return status;
}

absl::Status Engine::SubmitScore(ScoreRequest request, std::shared_ptr<ScoreObserver> observer, uint64_t* handle) {
  if (request.draft_depth > 0 && !impl_->info.has_mtp) {
    return absl::FailedPreconditionError(absl::StrCat("draft_depth is ", request.draft_depth, ", but the model has no MTP layer"));
  }
  MutexLock lock(&impl_->mutex);
  const absl::Status status = impl_->core->SubmitScore(std::move(request), std::move(observer), handle);
  impl_->WakeLocked();
  return status;
}

void Engine::Detach(const std::string& request_id, const GenerateObserver* observer) {
  impl_->Control([request_id, observer](EngineCore& core) { core.Detach(request_id, observer); });
}

void Engine::CancelScore(uint64_t handle) {
  impl_->Control([handle](EngineCore& core) { core.CancelScore(handle); });
}

bool Engine::Abort(const std::string& request_id) {
  return impl_->ControlAndWait<bool>([&](EngineCore& core) { return core.Abort(request_id); });
}

void Engine::Wake() {
  MutexLock lock(&impl_->mutex);
  impl_->WakeLocked();
}

void Engine::Drain(absl::Duration deadline) {
  impl_->ControlAndWait<bool>([&](EngineCore& core) {
    core.StartDrain(impl_->clock.Now() + deadline);
    return true;
  });
  MutexLock lock(&impl_->mutex);
  while (!impl_->core->Idle() && !impl_->stopping) impl_->settled.WaitFor(&impl_->mutex, kSettleWait);
}

// ---- Weights ----

std::shared_ptr<const ModelWeights> Engine::weights() const {
  MutexLock lock(&impl_->mutex);
  return impl_->state.sleeping.weights ? nullptr : impl_->state.weights;
}

WeightVersion Engine::weight_version() const {
  std::shared_ptr<const ModelWeights> weights;
  std::shared_ptr<const OffloadedWeights> offloaded;
  {
    MutexLock lock(&impl_->mutex);
    weights = impl_->state.weights;
    offloaded = impl_->state.offloaded;
  }
  return weights != nullptr ? weights->version : offloaded->version();
}

absl::StatusOr<std::unique_ptr<WeightUpdate>> Engine::StartWeightUpdate(WeightUpdateSpec spec, int64_t limit_bytes) {
  const std::shared_ptr<const ModelWeights> base = weights();
  if (base == nullptr) return Asleep();
  MutexLock lock(&impl_->update_mutex);
  if (impl_->update_memory == nullptr) {
    BEBOP_ASSIGN_OR_RETURN(impl_->update_memory, impl_->backend->NewMemory());
  }
  return WeightUpdate::Start(impl_->info.config, *base, std::move(spec), limit_bytes, impl_->update_memory.get());
}

absl::StatusOr<CommitResult> Engine::CommitWeights(std::unique_ptr<ModelWeights> weights, InFlight in_flight, absl::Duration deadline) {
  using ControlState = Impl::ControlState;
  const absl::Time start = impl_->clock.Now();
  // Only waits for samples may end without a swap.
  const absl::Time until = in_flight == InFlight::kWait ? start + deadline : absl::InfiniteFuture();
  const absl::Time scores_until = start + std::min(deadline / 2, kLongestScoreWait);
  const WeightName name{.target_step = weights->version.target_step, .draft_step = weights->version.draft_step, .label = weights->version.label};
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
    } else if (!began && in_flight == InFlight::kWait && core.paused() && core.CommitMustWait()) {
      result = StatusWithReason(absl::StatusCode::kFailedPrecondition, "PAUSED",
                                "the swap is to wait for running samples, which stand still while generation is paused: resume it first");
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

absl::StatusOr<WeightVersion> Engine::RehashWeights() const {
  const std::shared_ptr<const ModelWeights> present = weights();
  if (present == nullptr) return Asleep();
  BEBOP_ASSIGN_OR_RETURN(const std::unique_ptr<DeviceMemory> memory, impl_->backend->NewMemory());
  return RecomputeVersion(impl_->info.config, *present, memory.get());
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

EngineControl Engine::control() const {
  MutexLock lock(&impl_->mutex);
  const EngineCore& core = *impl_->core;
  return {.paused = core.paused(), .draining = core.draining(), .pausing = core.holds_for_pause(), .committing = impl_->state.committing,
          .sleeping = impl_->state.sleeping, .abort_epoch = core.abort_epoch()};
}

const EngineInfo& Engine::info() const { return impl_->info; }
const Tokenizer* Engine::tokenizer() const { return impl_->tokenizer.get(); }

EngineLoads Engine::GetLoads() const {
  MutexLock lock(&impl_->mutex);
  return impl_->core->Loads();
}

absl::Status Engine::health() const {
  MutexLock lock(&impl_->mutex);
  return impl_->core->health();
}

absl::Duration Engine::SinceHeartbeat() const {
  return impl_->clock.Now() - absl::FromUnixNanos(impl_->heartbeat_ns.load(std::memory_order_relaxed));
}

}  // namespace bebop
