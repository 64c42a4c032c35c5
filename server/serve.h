// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <signal.h>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/runtime/engine_interface.h"
#include "server/server.h"

namespace bebop {

// Exit status of a process whose engine failed. Not 2, which a supervisor need not repeat: that is for bad flags, files and models.
inline constexpr int kEngineFailedStatus = 1;
inline constexpr int kBadInputStatus = 2;

// Exit status of a process that could not start: an engine's INTERNAL error is a device's, which another start may not meet.
inline int StartFailureStatus(const absl::Status& status) { return absl::IsInternal(status) ? kEngineFailedStatus : kBadInputStatus; }

struct ServeOptions {
  sigset_t stop_signals;        // blocked in all threads
  absl::Duration drain_timeout;
  // From the engine's failure to the end: clients and load balancers see NOT_SERVING and the error first.
  absl::Duration failure_grace = absl::Seconds(5);
};

// Waits for a stop signal, drains, and returns 0, or kEngineFailedStatus when the engine failed meanwhile; another signal while draining ends
// the process at once with 128 + its number.
// When the engine fails (a device error is sticky: only a new process can use the device again) everything in flight has ended with the
// error already: returns kEngineFailedStatus after the grace, so that a supervisor starts the process again.
int ServeUntilStopped(const EngineInterface& engine, Server& server, const ServeOptions& options);

}  // namespace bebop
