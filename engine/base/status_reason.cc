// SPDX-License-Identifier: Apache-2.0
#include "engine/base/status_reason.h"

#include "absl/strings/cord.h"

namespace bebop {
namespace {

constexpr char kReasonUrl[] = "bebop/reason";

}  // namespace

absl::Status StatusWithReason(absl::StatusCode code, absl::string_view reason, absl::string_view message) {
  absl::Status status(code, message);
  status.SetPayload(kReasonUrl, absl::Cord(reason));
  return status;
}

std::string StatusReason(const absl::Status& status) {
  const auto reason = status.GetPayload(kReasonUrl);
  return reason.has_value() ? std::string(*reason) : std::string();
}

}  // namespace bebop
