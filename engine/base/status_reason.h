// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace bebop {

// A status whose cause a program can tell: `reason` is UPPER_SNAKE_CASE and part of the API, where the server sends it as the
// reason of a google.rpc.ErrorInfo. Travels as a payload, so that the engine needs no Protobuf.
// `metadata`: what the reason is about, for programs, e.g. {"field", "base_step"}, {"value", "5"}; the server sends it along. No '\0' in it.
using StatusMetadata = std::vector<std::pair<std::string, std::string>>;
absl::Status StatusWithReason(absl::StatusCode code, absl::string_view reason, absl::string_view message, const StatusMetadata& metadata = {});

// The reason; empty when there is none.
std::string StatusReason(const absl::Status& status);
// The metadata, in order.
StatusMetadata StatusReasonMetadata(const absl::Status& status);

}  // namespace bebop
