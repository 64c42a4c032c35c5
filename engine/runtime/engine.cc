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
#include "engine/runtime/engine_impl.h"
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

// "tiny" of "models/tiny", "models/tiny/" and, seen from inside it, ".".
std::string LastComponent(const std::string& path) {
  std::error_code error;
  std::filesystem::path absolute = std::filesystem::absolute(path, error).lexically_normal();
  if (!absolute.has_filename()) absolute = absolute.parent_path();
  return absolute.filename();
}

}  // namespace

void Engine::Impl::Loop() {
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

void Engine::Impl::RunTasks() {
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

absl::Status Engine::Impl::OnEngineThread(std::function<bool(EngineCore&, ControlState&)> attempt, absl::Time deadline) {
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
  // Called by the core, that is with the lock.
  core_options.on_sample_end = [raw = impl.get()](const SampleResult& sample) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    if (raw->on_sample_end != nullptr) raw->on_sample_end(sample);
  };
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

void Engine::ListenToSampleEnds(std::function<void(const SampleResult&)> listener) {
  MutexLock lock(&impl_->mutex);
  impl_->on_sample_end = std::move(listener);
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

absl::StatusOr<WeightVersion> Engine::RehashWeights() const {
  const std::shared_ptr<const ModelWeights> present = weights();
  if (present == nullptr) return Asleep();
  BEBOP_ASSIGN_OR_RETURN(const std::unique_ptr<DeviceMemory> memory, impl_->backend->NewMemory());
  return RecomputeVersion(impl_->info.config, *present, memory.get());
}

// ---- State ----

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
