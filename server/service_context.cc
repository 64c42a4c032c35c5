// SPDX-License-Identifier: Apache-2.0
#include "server/service_context.h"

#include <random>

#include "absl/strings/str_cat.h"
#include "server/status_details.h"

namespace bebop {

uint64_t RandomBits() {
  std::random_device device;
  return (static_cast<uint64_t>(device()) << 32) | device();
}

absl::Status ServiceContext::CheckServing() const {
  if (draining.load(std::memory_order_relaxed)) {
    return WithRetryAfter(DetailedError(absl::StatusCode::kUnavailable, "DRAINING", "the server is shutting down"), kDrainingRetryDelay);
  }
  if (const absl::Status health = engine->health(); !health.ok()) {
    return DetailedError(absl::StatusCode::kInternal, "ENGINE_FAILED", absl::StrCat("the engine has failed: ", health.message()));
  }
  return absl::OkStatus();
}

RequestContext ServiceContext::NewRequestContext() const {
  return {.fresh_request_id = absl::StrCat("req-", absl::Hex(RandomBits(), absl::kZeroPad16), absl::Hex(RandomBits(), absl::kZeroPad16)),
          .fresh_seed = RandomBits(),
          .deadline = clock.Now() + max_request_time};
}

}  // namespace bebop
