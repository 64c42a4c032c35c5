// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "absl/time/time.h"

namespace bebop {

// Time for deadlines, TTLs and timings: monotonic in the engine (wall-clock jumps change nothing), virtual in the simulator.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual absl::Time Now() const = 0;  // thread safe
};

// std::chrono::steady_clock as absl::Time (its epoch has no meaning).
class MonotonicClock final : public Clock {
 public:
  absl::Time Now() const override;
};

}  // namespace bebop
