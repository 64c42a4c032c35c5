// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/base/clock.h"
#include "engine/base/mutex.h"
#include "engine/runtime/engine_interface.h"
#include "server/access.h"
#include "server/metrics.h"
#include "server/reply_thread.h"
#include "server/translation.h"

namespace bebop {

// What the gRPC services share. Set before they start and constant from then on, but for `draining` and the speculation that requests get which
// leave it unset; outlives them.
struct ServiceContext {
  EngineInterface* engine = nullptr;
  RequestRules rules;  // its speculation defaults are those of the start; Rules() has the present ones
  Access access;  // every handler's first question
  std::shared_ptr<Metrics> metrics;  // shared with observers, which the engine may keep for longer; may be empty
  std::string served_model_name;
  std::string boot_id;
  std::string build;
  absl::Duration max_request_time = absl::Hours(1);
  absl::Duration drain_timeout = absl::Seconds(30);  // of Control.Drain calls that name none
  std::function<void()> on_draining;                 // health follows at once; may be empty
  mutable ReplyThread reply_thread;  // outlives every call
  MonotonicClock clock;
  std::atomic<bool> draining = false;

  // UNAVAILABLE / DRAINING once draining, INTERNAL / ENGINE_FAILED after a failure of the engine, else OK.
  absl::Status CheckServing() const;
  RequestContext NewRequestContext() const;

  RequestRules Rules() const;
  // Changes them under a lock, so that calls that come together change one after the other: `change` is given the present rules.
  absl::Status ChangeDefaultSpeculation(const std::function<absl::StatusOr<DefaultSpeculation>(const RequestRules&)>& change);

 private:
  RequestRules RulesLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  mutable Mutex mutex_;
  std::optional<DefaultSpeculation> default_speculation_ ABSL_GUARDED_BY(mutex_);  // none: as at the start
};

// A random 64-bit number from the system.
uint64_t RandomBits();

}  // namespace bebop
