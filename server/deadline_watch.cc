// SPDX-License-Identifier: Apache-2.0
#include "server/deadline_watch.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/mutex.h"
#include "server/status_details.h"

namespace bebop {
namespace {

// How long before the deadline: time for the answer to arrive, little enough not to matter.
constexpr std::chrono::milliseconds kLongestMargin(250);
constexpr int kShareOfTime = 10;

}  // namespace

absl::Status WhyItWaits(const EngineInterface& engine, int64_t min_step) {
  const EngineControl control = engine.control();
  const auto why = [](const std::string& waits_for, const auto&... parts) {
    return DetailedError(absl::StatusCode::kDeadlineExceeded, "DEADLINE",
                         absl::StrCat("not done before the call's deadline: ", parts...), {{"waits_for", waits_for}});
  };
  if (control.sleeping.weights || control.sleeping.kv_cache) {
    const bool both = control.sleeping.weights && control.sleeping.kv_cache;
    return why("WakeUp", "the server sleeps (", both ? "weights, kv_cache" : control.sleeping.weights ? "weights" : "kv_cache",
               ") until WakeUp");
  }
  if (control.paused) return why("ResumeGeneration", "generation is paused until ResumeGeneration");
  const int64_t target_step = engine.GetLoads().target_step;
  if (target_step < min_step) {
    return why("weights.min_step", "weights.min_step ", min_step, " is waited for; the target is at step ", target_step);
  }
  return absl::OkStatus();
}

struct DeadlineWatch::State {
  Mutex mutex;
  const EngineInterface* engine ABSL_GUARDED_BY(mutex) = nullptr;  // null: the call has ended
  std::function<void()> detach ABSL_GUARDED_BY(mutex);
};

void DeadlineWatch::Start(const grpc::CallbackServerContext& call, const EngineInterface& engine, int64_t min_step,
                          std::function<void()> detach, std::function<void(const absl::Status&)> end) {
  const auto deadline = call.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) return;
  const auto left = deadline - std::chrono::system_clock::now();
  if (left <= left.zero()) return;
  state_ = std::make_shared<State>();
  {
    MutexLock lock(&state_->mutex);
    state_->engine = &engine;
    state_->detach = std::move(detach);
  }
  alarm_ = std::make_unique<grpc::Alarm>();
  const auto margin = std::min<std::chrono::system_clock::duration>(kLongestMargin, left / kShareOfTime);
  alarm_->Set(deadline - margin, [state = state_, min_step, end = std::move(end)](bool rang) {
    if (!rang) return;
    absl::Status reason;
    {
      MutexLock lock(&state->mutex);
      if (state->engine == nullptr) return;
      reason = WhyItWaits(*state->engine, min_step);
      if (reason.ok()) return;
      state->detach();
    }
    end(reason);
  });
}

DeadlineWatch::~DeadlineWatch() {
  if (state_ == nullptr) return;
  {
    MutexLock lock(&state_->mutex);
    state_->engine = nullptr;
    state_->detach = nullptr;
  }
  alarm_->Cancel();
}

}  // namespace bebop
