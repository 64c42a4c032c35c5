// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <utility>

#include "engine/base/mutex.h"
#include "engine/runtime/backend.h"
#include "engine/runtime/engine.h"
#include "engine/schedule/request.h"
#include "tests/engine/runtime/test_engine.h"

namespace bebop::test {

// What this build calls its first device.
inline std::string DeviceName() { return CheckDeviceName("emulated").ok() ? "emulated" : "cuda"; }

// A small engine with dummy weights on `device`.
inline EngineOptions SmallEngineOptions(const std::string& device) {
  EngineOptions options;
  options.model_path = WriteSmallConfigFolder();
  options.load_dummy = true;
  options.device = device;
  options.num_threads = 2;
  options.max_num_seqs = 4;
  options.max_draft_tokens = 3;
  options.max_step_tokens = 128;
  options.max_model_len = 128;
  options.dtype = DType::kFloat32;
  return options;
}

// Lets a thread wait for the end of a request or score.
template <typename Observer>
class Waiting : public Observer {
 public:
  // False after `timeout`.
  bool Wait(std::chrono::seconds timeout = std::chrono::seconds(120)) {
    MutexLock lock(&mutex_);
    const auto end = std::chrono::steady_clock::now() + timeout;
    while (!ended_ && std::chrono::steady_clock::now() < end) changed_.WaitFor(&mutex_, std::chrono::milliseconds(50));
    return ended_;
  }
  // REQUIRES: Wait() was true.
  absl::Status status;

 protected:
  void End(const absl::Status& with) {
    MutexLock lock(&mutex_);
    status = with;
    ended_ = true;
    changed_.NotifyAll();
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
};

class WaitingGenerate final : public Waiting<GenerateObserver> {
 public:
  void OnSample(const std::shared_ptr<const SampleResult>& result) override { sample = *result; }
  void OnDone(const absl::Status& with) override { End(with); }
  SampleResult sample;
};

class WaitingScore final : public Waiting<ScoreObserver> {
 public:
  void OnScore(const absl::Status& with, ScoreResult score) override {
    result = std::move(score);
    End(with);
  }
  ScoreResult result;
};

}  // namespace bebop::test
