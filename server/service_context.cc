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

RequestRules ServiceContext::Rules() const {
  MutexLock lock(&mutex_);
  return RulesLocked();
}

RequestRules ServiceContext::RulesLocked() const {
  RequestRules current = rules;
  if (default_speculation_.has_value()) {
    current.default_mode = default_speculation_->mode;
    current.default_num_draft_tokens = default_speculation_->num_draft_tokens;
  }
  return current;
}

absl::Status ServiceContext::ChangeDefaultSpeculation(const std::function<absl::StatusOr<DefaultSpeculation>(const RequestRules&)>& change) {
  MutexLock lock(&mutex_);
  const absl::StatusOr<DefaultSpeculation> changed = change(RulesLocked());
  if (changed.ok()) default_speculation_ = *changed;
  return changed.status();
}

}  // namespace bebop
