// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/mutex.h"
#include "engine/base/status_reason.h"
#include "engine/runtime/engine_interface.h"
#include "engine/weights/resident_tensor.h"

namespace bebop {

// An engine whose every step a test decides: requests wait until the test delivers samples or ends them, on the calling thread.
class FakeEngine final : public EngineInterface {
 public:
  struct Request {
    GenerateRequest request;
    std::vector<std::shared_ptr<GenerateObserver>> observers;
    std::vector<std::shared_ptr<const SampleResult>> samples;
    bool done = false;
  };
  struct Score {
    ScoreRequest request;
    std::shared_ptr<ScoreObserver> observer;  // null: cancelled or delivered
  };

  FakeEngine() {
    info_.model_name = "fake";
    info_.config.vocab_size = 100;
    info_.config.hidden_size = 8;
    info_.config.layers = {LayerKind::kLinearAttention, LayerKind::kFullAttention};
    info_.device = "cpu";
    info_.max_model_len = 1 << 20;
    info_.max_num_seqs = 4;
    info_.max_draft_tokens = 5;
    info_.has_mtp = true;
    version_.target_step = version_.draft_step = 7;
  }

  // ---- EngineInterface ----

  absl::Status Submit(GenerateRequest request, std::shared_ptr<GenerateObserver> observer) override {
    MutexLock lock(&mutex_);
    if (!submit_status_.ok()) return submit_status_;
    const std::string id = request.request_id;
    const int64_t step = weights_ != nullptr ? weights_->version.target_step : version_.target_step;
    if (request.weights.refuse_if_behind && step < request.weights.min_step && !requests_.contains(id)) {
      return StatusWithReason(absl::StatusCode::kFailedPrecondition, "STEP_NOT_REACHED",
                              absl::StrCat("weights.min_step: ", request.weights.min_step, " is not reached; the target is at step ", step));
    }
    auto [found, is_new] = requests_.try_emplace(id);
    if (is_new) {
      found->second.request = std::move(request);
    } else if (found->second.request.body_hash != request.body_hash) {
      return absl::AlreadyExistsError("request id in use with another body");
    }
    Request& entry = found->second;
    for (const auto& sample : entry.samples) observer->OnSample(sample);
    if (entry.done) {
      observer->OnDone(absl::OkStatus());
    } else {
      entry.observers.push_back(std::move(observer));
    }
    return absl::OkStatus();
  }

  absl::Status SubmitScore(ScoreRequest request, std::shared_ptr<ScoreObserver> observer, uint64_t* handle) override {
    MutexLock lock(&mutex_);
    if (scores_left_ == 0) return absl::ResourceExhaustedError("queue full");
    --scores_left_;
    *handle = ++last_handle_;
    scores_[*handle] = {std::move(request), std::move(observer)};
    return absl::OkStatus();
  }

  void Detach(const std::string& request_id, const GenerateObserver* observer) override {
    MutexLock lock(&mutex_);
    const auto found = requests_.find(request_id);
    if (found == requests_.end()) return;
    auto& observers = found->second.observers;
    for (auto it = observers.begin(); it != observers.end(); ++it) {
      if (it->get() != observer) continue;
      observers.erase(it);
      ++num_detached_;
      return;
    }
  }
  void CancelScore(uint64_t handle) override {
    MutexLock lock(&mutex_);
    scores_[handle].observer = nullptr;
    ++num_cancelled_scores_;
  }
  void ListenToSampleEnds(std::function<void(const SampleResult&)> listener) override {
    MutexLock lock(&mutex_);
    on_sample_end_ = std::move(listener);
  }
  bool Abort(const std::string& request_id) override {
    MutexLock lock(&mutex_);
    const auto found = requests_.find(request_id);
    return found != requests_.end() && !found->second.done;
  }
  void Wake() override { ++num_wakes_; }
  void Drain(absl::Duration) override {
    draining_ = true;
    while (HasOpenRequests()) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }

  // Weights: updates are real once LoadWeights gave this engine some; a commit then does what the test set.
  std::shared_ptr<const ModelWeights> weights() const override {
    MutexLock lock(&mutex_);
    return weights_;
  }
  WeightVersion weight_version() const override {
    MutexLock lock(&mutex_);
    return weights_ != nullptr ? weights_->version : version_;
  }
  absl::StatusOr<std::unique_ptr<WeightUpdate>> StartWeightUpdate(WeightUpdateSpec spec, int64_t limit_bytes) override {
    const std::shared_ptr<const ModelWeights> base = weights();
    if (base == nullptr) return StatusWithReason(absl::StatusCode::kFailedPrecondition, "ASLEEP", "the fake engine has no weights");
    return WeightUpdate::Start(info_.config, *base, std::move(spec), limit_bytes, memory_);
  }
  absl::StatusOr<CommitResult> CommitWeights(std::unique_ptr<ModelWeights> weights, InFlight in_flight, absl::Duration deadline) override {
    std::function<absl::StatusOr<CommitResult>(InFlight, absl::Duration)> on_commit;
    {
      MutexLock lock(&mutex_);
      on_commit = on_commit_;
    }
    CommitResult result;
    if (on_commit != nullptr) {
      absl::StatusOr<CommitResult> told = on_commit(in_flight, deadline);
      if (!told.ok()) return told;
      result = *told;
    }
    MutexLock lock(&mutex_);
    weights_ = std::move(weights);
    return result;
  }
  absl::StatusOr<WeightVersion> RehashWeights() const override {
    const std::shared_ptr<const ModelWeights> resident = weights();
    if (resident == nullptr) return weight_version();
    std::function<void()> on_rehash;
    {
      MutexLock lock(&mutex_);
      on_rehash = on_rehash_;
    }
    if (on_rehash != nullptr) on_rehash();
    return RecomputeVersion(info_.config, *resident, memory_);
  }

  // Control: remembers what it was told.
  absl::StatusOr<int32_t> Pause(PauseMode mode, bool clear_cache, absl::Duration deadline) override {
    std::function<void()> on_pause;
    {
      MutexLock lock(&mutex_);
      on_pause = on_pause_;
    }
    if (on_pause != nullptr) on_pause();
    MutexLock lock(&mutex_);
    control_.paused = true;
    if (mode == PauseMode::kAbort) ++control_.abort_epoch;
    calls_.push_back(absl::StrCat("pause ", static_cast<int>(mode), clear_cache ? " clear " : " ", absl::ToInt64Milliseconds(deadline)));
    return mode == PauseMode::kAbort ? 3 : 0;
  }
  absl::Status Resume() override {
    MutexLock lock(&mutex_);
    control_.paused = false;
    calls_.push_back("resume");
    return absl::OkStatus();
  }
  absl::Status Sleep(SleepTags tags) override {
    MutexLock lock(&mutex_);
    control_.sleeping.weights |= tags.weights;
    control_.sleeping.kv_cache |= tags.kv_cache;
    return absl::OkStatus();
  }
  absl::Status WakeUp(SleepTags tags) override {
    MutexLock lock(&mutex_);
    control_.sleeping.weights &= !tags.weights;
    control_.sleeping.kv_cache &= !tags.kv_cache;
    return absl::OkStatus();
  }
  absl::Status FlushCache() override {
    MutexLock lock(&mutex_);
    calls_.push_back("flush");
    return absl::OkStatus();
  }
  EngineControl control() const override {
    MutexLock lock(&mutex_);
    return control_;
  }

  const EngineInfo& info() const override { return info_; }
  const Tokenizer* tokenizer() const override { return nullptr; }
  EngineLoads GetLoads() const override {
    EngineLoads loads;
    {
      MutexLock lock(&mutex_);
      const WeightVersion& version = weights_ != nullptr ? weights_->version : version_;
      loads.target_step = version.target_step;
      loads.draft_step = version.draft_step;
    }
    loads.submitted = 3;
    loads.finished = 2;
    loads.running_requests = 1;
    return loads;
  }
  absl::Status health() const override {
    MutexLock lock(&mutex_);
    return health_;
  }
  absl::Duration SinceHeartbeat() const override { return absl::Milliseconds(250); }

  // ---- for tests ----

  // Before the server starts. `memory` holds the weights and will hold updates.
  void LoadWeights(const ModelConfig& config, std::shared_ptr<const ModelWeights> weights, DeviceMemory* memory) {
    info_.config = config;
    info_.weight_bytes = weights->storage_bytes;
    memory_ = memory;
    MutexLock lock(&mutex_);
    weights_ = std::move(weights);
  }
  // What CommitWeights does first: its error is the commit's, and it may take its time.
  void OnCommit(std::function<absl::StatusOr<CommitResult>(InFlight, absl::Duration)> on_commit) {
    MutexLock lock(&mutex_);
    on_commit_ = std::move(on_commit);
  }
  // What Pause does first; it may take its time.
  void OnPause(std::function<void()> on_pause) {
    MutexLock lock(&mutex_);
    on_pause_ = std::move(on_pause);
  }
  // What RehashWeights does first.
  void OnRehash(std::function<void()> on_rehash) {
    MutexLock lock(&mutex_);
    on_rehash_ = std::move(on_rehash);
  }
  void SetSubmitStatus(absl::Status status) {
    MutexLock lock(&mutex_);
    submit_status_ = std::move(status);
  }
  void SetHealth(absl::Status status) {
    MutexLock lock(&mutex_);
    health_ = std::move(status);
  }
  void SetScoresLeft(int count) {
    MutexLock lock(&mutex_);
    scores_left_ = count;
  }
  EngineInfo& mutable_info() { return info_; }  // before the server starts

  // True once `condition` holds; false after 10 s.
  static bool WaitUntil(const std::function<bool()>& condition) {
    for (int i = 0; i < 2000; ++i) {
      if (condition()) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return false;
  }
  // The request's observers, once `count` of them are attached.
  std::vector<std::shared_ptr<GenerateObserver>> WaitForObservers(const std::string& id, size_t count = 1) {
    std::vector<std::shared_ptr<GenerateObserver>> observers;
    WaitUntil([&] {
      MutexLock lock(&mutex_);
      const auto found = requests_.find(id);
      if (found == requests_.end() || found->second.observers.size() < count) return false;
      observers = found->second.observers;
      return true;
    });
    return observers;
  }
  void Sample(const std::string& id, SampleResult sample) {
    std::vector<std::shared_ptr<GenerateObserver>> observers;
    std::shared_ptr<const SampleResult> ended;
    std::function<void(const SampleResult&)> on_sample_end;
    {
      MutexLock lock(&mutex_);
      sample.speculation = requests_[id].request.speculation;
      ended = std::make_shared<const SampleResult>(std::move(sample));
      requests_[id].samples.push_back(ended);
      observers = requests_[id].observers;
      on_sample_end = on_sample_end_;
    }
    if (on_sample_end != nullptr) on_sample_end(*ended);
    for (const auto& observer : observers) observer->OnSample(ended);
  }
  void Done(const std::string& id, const absl::Status& status) {
    std::vector<std::shared_ptr<GenerateObserver>> observers;
    {
      MutexLock lock(&mutex_);
      requests_[id].done = true;
      observers.swap(requests_[id].observers);
    }
    for (const auto& observer : observers) observer->OnDone(status);
  }
  GenerateRequest RequestOf(const std::string& id) {
    MutexLock lock(&mutex_);
    return requests_[id].request;
  }
  std::string OnlyRequestId() const {
    MutexLock lock(&mutex_);
    return requests_.size() == 1 ? requests_.begin()->first : std::string();
  }
  bool HasOpenRequests() const {
    MutexLock lock(&mutex_);
    for (const auto& [id, request] : requests_) {
      if (!request.observers.empty()) return true;
    }
    return false;
  }
  // Delivers `make(request)` to every waiting score, once `count` wait.
  bool AnswerScores(size_t count, const std::function<std::pair<absl::Status, ScoreResult>(const ScoreRequest&)>& make) {
    std::vector<Score> waiting;
    const bool found = WaitUntil([&] {
      MutexLock lock(&mutex_);
      size_t open = 0;
      for (const auto& [handle, score] : scores_) open += score.observer != nullptr ? 1 : 0;
      if (open < count) return false;
      for (auto& [handle, score] : scores_) {
        if (score.observer != nullptr) waiting.push_back(score);
        score.observer = nullptr;
      }
      return true;
    });
    for (const Score& score : waiting) {
      auto [status, result] = make(score.request);
      score.observer->OnScore(status, std::move(result));
    }
    return found;
  }
  int num_detached() const {
    MutexLock lock(&mutex_);
    return num_detached_;
  }
  int num_cancelled_scores() const {
    MutexLock lock(&mutex_);
    return num_cancelled_scores_;
  }
  std::vector<std::string> calls() const {
    MutexLock lock(&mutex_);
    return calls_;
  }
  int num_wakes() const { return num_wakes_; }
  bool draining() const { return draining_; }

 private:
  mutable Mutex mutex_;
  std::function<void(const SampleResult&)> on_sample_end_ ABSL_GUARDED_BY(mutex_);
  std::function<void()> on_pause_ ABSL_GUARDED_BY(mutex_);
  EngineInfo info_;
  std::map<std::string, Request> requests_ ABSL_GUARDED_BY(mutex_);
  std::map<uint64_t, Score> scores_ ABSL_GUARDED_BY(mutex_);
  uint64_t last_handle_ ABSL_GUARDED_BY(mutex_) = 0;
  int scores_left_ ABSL_GUARDED_BY(mutex_) = 1 << 20;
  absl::Status submit_status_ ABSL_GUARDED_BY(mutex_);
  absl::Status health_ ABSL_GUARDED_BY(mutex_);
  WeightVersion version_ ABSL_GUARDED_BY(mutex_);  // without weights
  DeviceMemory* memory_ = nullptr;
  std::shared_ptr<const ModelWeights> weights_ ABSL_GUARDED_BY(mutex_);
  std::function<absl::StatusOr<CommitResult>(InFlight, absl::Duration)> on_commit_ ABSL_GUARDED_BY(mutex_);
  std::function<void()> on_rehash_ ABSL_GUARDED_BY(mutex_);
  EngineControl control_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::string> calls_ ABSL_GUARDED_BY(mutex_);  // of control, in order
  int num_detached_ ABSL_GUARDED_BY(mutex_) = 0;
  int num_cancelled_scores_ ABSL_GUARDED_BY(mutex_) = 0;
  std::atomic<int> num_wakes_ = 0;
  std::atomic<bool> draining_ = false;
};

}  // namespace bebop
