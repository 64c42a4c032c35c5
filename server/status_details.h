// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <initializer_list>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace bebop {

// Details travel as payloads of absl::Status under google.rpc's type URLs; grpc_status.h puts them on the wire.
inline constexpr char kErrorInfoUrl[] = "type.googleapis.com/google.rpc.ErrorInfo";
inline constexpr char kRetryInfoUrl[] = "type.googleapis.com/google.rpc.RetryInfo";
inline constexpr char kErrorDomain[] = "bebop";

// When to come back. A full queue moves with every sample that ends, so soon; a server that shuts down is gone for good, and whoever
// replaces it needs a while to load its weights.
inline constexpr absl::Duration kCapacityRetryDelay = absl::Seconds(1);
inline constexpr absl::Duration kDrainingRetryDelay = absl::Seconds(5);

// A status with an ErrorInfo{reason, domain "bebop", metadata}. `reason` is UPPER_SNAKE_CASE and part of the API.
absl::Status DetailedError(absl::StatusCode code, absl::string_view reason, absl::string_view message,
                           std::initializer_list<std::pair<absl::string_view, std::string>> metadata = {});

// INVALID_ARGUMENT / INVALID_FIELD: "<field>: <value> is not <limit>", all three in the metadata.
absl::Status InvalidField(absl::string_view field, absl::string_view value, absl::string_view limit);

// The same status with a RetryInfo.
absl::Status WithRetryAfter(absl::Status status, absl::Duration delay);

// Gives a status of the engine, which knows no details, an ErrorInfo with its reason (status_reason.h), or else the one that its code
// has in the API, and, where trying again helps, a RetryInfo. Leaves details alone that are there.
absl::Status CompleteDetails(absl::Status status);

// The ErrorInfo's reason and one metadata entry; empty when there is none. For tests and logs.
std::string ErrorReason(const absl::Status& status);
std::string ErrorMetadata(const absl::Status& status, absl::string_view key);

}  // namespace bebop
