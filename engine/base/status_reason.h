// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace bebop {

// A status whose cause a program can tell: `reason` is UPPER_SNAKE_CASE and part of the API, where the server sends it as the
// reason of a google.rpc.ErrorInfo. Travels as a payload, so that the engine needs no Protobuf.
absl::Status StatusWithReason(absl::StatusCode code, absl::string_view reason, absl::string_view message);

// The reason; empty when there is none.
std::string StatusReason(const absl::Status& status);

}  // namespace bebop
