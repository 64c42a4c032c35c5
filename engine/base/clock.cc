// SPDX-License-Identifier: Apache-2.0
#include "engine/base/clock.h"

#include <chrono>

namespace bebop {

absl::Time MonotonicClock::Now() const {
  return absl::UnixEpoch() + absl::FromChrono(std::chrono::steady_clock::now().time_since_epoch());
}

}  // namespace bebop
