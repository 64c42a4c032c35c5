// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "bebop/v1/weights.pb.h"
#include "server/weight_session.h"

// weights.proto <-> WeightSession: pure functions. Every refusal is an InvalidField (status_details.h); unknown fields are the caller's
// to check (CheckKnownFields).
namespace bebop {

absl::StatusOr<WeightSession::StartRequest> ToSession(const v1::StartWeightUpdateRequest& message);
absl::StatusOr<ExpectedDigests> ToSession(const v1::FinishWeightUpdateRequest& message);
absl::Status Validate(const v1::UpdateWeightsRequest& message);
absl::Status Validate(const v1::AbortWeightUpdateRequest& message);

// Checks a chunk's fields and replaces what it leaves out by `update_id` and `tensor`, those of the chunk before; both become the chunk's.
absl::Status CompleteChunk(v1::WeightChunk* message, std::string* update_id, std::string* tensor);
// Nothing: the chunk has none. REQUIRES: CompleteChunk was OK.
std::optional<Sha256Digest> DigestOf(const v1::WeightChunk& message);

v1::WeightUpdate ToProto(const WeightSession::State& state);
v1::WeightInfo ToProto(const WeightSession::Info& info);
v1::FinishWeightUpdateResult ToProto(const WeightSession::FinishResult& result);
v1::CheckWeightsResult ToProto(const WeightSession::CheckResult& result);

}  // namespace bebop
