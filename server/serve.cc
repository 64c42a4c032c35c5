// SPDX-License-Identifier: Apache-2.0
#include "server/serve.h"

#include <time.h>
#include <unistd.h>

#include <atomic>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "engine/base/logging.h"

namespace bebop {
namespace {

constexpr absl::Duration kHealthInterval = absl::Milliseconds(100);
constexpr absl::Duration kDrainInterval = absl::Milliseconds(20);

// The signal that came within `wait`; <= 0 for none.
int WaitForSignal(const sigset_t& signals, absl::Duration wait) {
  const timespec timeout = absl::ToTimespec(wait);
  return sigtimedwait(&signals, nullptr, &timeout);
}

int DrainAndReport(const EngineInterface& engine, Server& server, const ServeOptions& options, int signal_number) {
  Log(LogLevel::kInfo, absl::StrCat("signal ", signal_number, ": draining for at most ", absl::ToDoubleSeconds(options.drain_timeout),
                                    " s; another signal stops at once"));
  std::atomic<bool> drained = false;
  std::thread drain([&server, &options, &drained] {
    server.Drain(options.drain_timeout);
    drained = true;
  });
  while (!drained) {
    const int second_signal = WaitForSignal(options.stop_signals, kDrainInterval);
    if (second_signal > 0) _exit(128 + second_signal);  // as a shell reports a process that the signal ended
  }
  drain.join();
  if (const absl::Status health = engine.health(); !health.ok()) {
    Log(LogLevel::kError, absl::StrCat("engine failed while draining: ", std::string(health.message())));
    return kEngineFailedStatus;
  }
  return 0;
}

}  // namespace

int ServeUntilStopped(const EngineInterface& engine, Server& server, const ServeOptions& options) {
  while (engine.health().ok()) {
    const int signal_number = WaitForSignal(options.stop_signals, kHealthInterval);
    if (signal_number > 0) return DrainAndReport(engine, server, options, signal_number);
  }
  Log(LogLevel::kError, absl::StrCat("engine failed, the process ends in ", absl::FormatDuration(options.failure_grace), ": ",
                                     std::string(engine.health().message())));
  WaitForSignal(options.stop_signals, options.failure_grace);  // a signal cuts the grace short
  return kEngineFailedStatus;
}

}  // namespace bebop
