// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/base/clock.h"
#include "engine/runtime/engine_interface.h"
#include "server/access.h"
#include "server/translation.h"

namespace bebop {

// What the gRPC services share. Set before they start and constant from then on, but for `draining`; outlives them.
struct ServiceContext {
  EngineInterface* engine = nullptr;
  RequestRules rules;
  Access access;  // every handler's first question
  std::string served_model_name;
  std::string boot_id;
  std::string build;
  absl::Duration max_request_time = absl::Hours(1);
  MonotonicClock clock;
  std::atomic<bool> draining = false;

  // UNAVAILABLE / DRAINING once draining, INTERNAL / ENGINE_FAILED after a failure of the engine, else OK.
  absl::Status CheckServing() const;
  RequestContext NewRequestContext() const;
};

// A random 64-bit number from the system.
uint64_t RandomBits();

}  // namespace bebop
