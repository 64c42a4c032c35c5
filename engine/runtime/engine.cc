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
#include "engine/config/model_config.h"
#include "engine/formats/file.h"
#include "engine/model/model.h"
#include "engine/runtime/backend.h"
#include "engine/runtime/engine_memory.h"
#include "engine/schedule/engine_core.h"
#include "engine/weights/checkpoint.h"
#include "engine/weights/dummy_weights.h"
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

// "tiny" of "models/tiny", "models/tiny/" and, seen from inside it, ".".
std::string LastComponent(const std::string& path) {
  std::error_code error;
  std::filesystem::path absolute = std::filesystem::absolute(path, error).lexically_normal();
  if (!absolute.has_filename()) absolute = absolute.parent_path();
  return absolute.filename();
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
    absl::Status SetWeights(const ModelWeights* weights, int64_t epoch) override { return impl_->executor->SetWeights(weights, epoch); }
    absl::Status Quiesce() override { return impl_->executor->Quiesce(); }

   private:
    Impl* const impl_;
  };

  EngineInfo info;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<ThreadPool> pool;
  std::unique_ptr<Backend> backend;  // what follows lives in it
  std::unique_ptr<ModelWeights> weights;
  std::unique_ptr<ModelStateStorage> storage;
  std::unique_ptr<Model> model;
  std::unique_ptr<Executor> executor;
  MonotonicClock clock;
  UnlockedExecutor unlocked_executor{this};

  mutable Mutex mutex;
  CondVar changed;  // the engine thread waits on it when idle; callers of Abort and Drain wait for `settled`
  CondVar settled;
  std::unique_ptr<EngineCore> core ABSL_GUARDED_BY(mutex);
  bool executing ABSL_GUARDED_BY(mutex) = false;
  bool woken ABSL_GUARDED_BY(mutex) = false;
  bool stopping ABSL_GUARDED_BY(mutex) = false;
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
      const absl::Duration longest = core->Idle() ? kIdleWait : kPausedWait;
      const absl::Duration wait = failure_logged ? kIdleWait : std::min(longest, core->NextDeadline() - clock.Now());
      if (!woken && !stopping && deferred.empty() && waiting_for_step == 0 && wait > absl::ZeroDuration()) {
        changed.WaitFor(&mutex, absl::ToChronoNanoseconds(wait));
      }
    }
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
  if (options.load_dummy) {
    if (options.needs_mtp && config.num_mtp_layers == 0) {
      return absl::FailedPreconditionError(absl::StrCat(options.model_path, ": expected an MTP layer for speculation, got "
                                                        "mtp_num_hidden_layers 0: start with --speculation off"));
    }
    BEBOP_ASSIGN_OR_RETURN(impl->weights, MakeDummyWeights(config, options.dtype, options.dummy_seed, *impl->pool, backend.memory()));
  } else {
    LoadOptions load;
    load.path = options.model_path;
    load.mtp_path = options.mtp_path;
    load.dtype = options.dtype;
    load.needs_mtp = options.needs_mtp;
    BEBOP_ASSIGN_OR_RETURN(impl->weights, LoadModelWeights(config, load, *impl->pool, backend.memory()));
  }
  if (!impl->weights->mtp.has_value()) config.num_mtp_layers = 0;
  BEBOP_ASSIGN_OR_RETURN(const EngineSizes sizes, backend.Sizes(options, config, impl->weights->storage_bytes));
  BEBOP_ASSIGN_OR_RETURN(impl->storage, ModelStateStorage::Create(config, sizes.state, backend.memory()));
  BEBOP_ASSIGN_OR_RETURN(impl->model, Model::Create(config, sizes.scheduler.max_step_tokens, backend.activation_dtype(options.dtype),
                                                    backend.ops(), backend.memory()));
  impl->model->SetWeights(impl->weights.get());
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
  info.has_mtp = impl->weights->mtp.has_value();
  info.dummy_weights = options.load_dummy;
  info.weight_bytes = impl->weights->storage_bytes;
  info.kv_cache_bytes = PageBytes(config, sizes.state) * sizes.state.num_pages;
  info.state_bytes = SlotBytes(config, sizes.state) * sizes.state.num_slots;
  info.layer_bytes = impl->weights->layer_bytes;
  info.lm_head_bytes = impl->weights->lm_head_bytes;
  info.mtp_bytes = impl->weights->mtp_bytes;

  EngineCoreOptions core_options;
  core_options.scheduler = sizes.scheduler;
  core_options.vocab_size = config.vocab_size;
  core_options.max_draft_tokens = sizes.max_draft_tokens;
  core_options.eos_token_ids = config.eos_token_ids;
  if (const Tokenizer* tokenizer = impl->tokenizer.get()) {
    core_options.token_bytes = [tokenizer](uint32_t token) { return tokenizer->TokenBytes(token); };
  }
  {
    MutexLock lock(&impl->mutex);
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

// ---- Weights and control: seams, to be filled ----
std::shared_ptr<const ModelWeights> Engine::weights() const { return std::shared_ptr<const ModelWeights>(impl_->weights->storage, impl_->weights.get()); }
WeightVersion Engine::weight_version() const { return impl_->weights->version; }
absl::StatusOr<std::unique_ptr<WeightUpdate>> Engine::StartWeightUpdate(WeightUpdateSpec spec, int64_t limit_bytes) {
  return WeightUpdate::Start(impl_->info.config, *impl_->weights, std::move(spec), limit_bytes, impl_->backend->memory());
}
absl::StatusOr<CommitResult> Engine::CommitWeights(std::unique_ptr<ModelWeights>, InFlight, absl::Duration) { return absl::UnimplementedError("seam"); }
absl::StatusOr<WeightVersion> Engine::RehashWeights() const { return absl::UnimplementedError("seam"); }
absl::StatusOr<int32_t> Engine::Pause(PauseMode, bool, absl::Duration) { return absl::UnimplementedError("seam"); }
absl::Status Engine::Resume() { return absl::UnimplementedError("seam"); }
absl::Status Engine::Sleep(SleepTags) { return absl::UnimplementedError("seam"); }
absl::Status Engine::WakeUp(SleepTags) { return absl::UnimplementedError("seam"); }
absl::Status Engine::FlushCache() { return absl::UnimplementedError("seam"); }
EngineControl Engine::control() const { return {}; }

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
