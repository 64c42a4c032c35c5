// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "absl/time/time.h"

namespace bebop {

// How a weight update ended.
enum class UpdateEnd : uint8_t { kCommitted, kFailed, kAborted, kExpired };

// How long an update's phases took; those it did not reach are zero.
struct UpdateTimes {
  absl::Duration stage{};   // from Start to Finish, or to its end
  absl::Duration check{};   // completeness and digests
  absl::Duration commit{};  // until the new weights ran: the wait for a step, or for running samples, and the swap
};

}  // namespace bebop
