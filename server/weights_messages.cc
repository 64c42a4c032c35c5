// SPDX-License-Identifier: Apache-2.0
#include "server/weights_messages.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/formats/strings.h"
#include "server/limits.h"
#include "server/status_details.h"
#include "server/translation.h"

namespace bebop {
namespace {

absl::Status CheckUpdateId(absl::string_view field, const std::string& id) {
  if (IsValidRequestId(id)) return absl::OkStatus();
  return InvalidField(field, Quoted(id), "1..64 bytes of [A-Za-z0-9._:-]");
}

absl::Status CheckSize(absl::string_view field, int64_t size, int64_t low, int64_t high, absl::string_view unit) {
  if (size >= low && size <= high) return absl::OkStatus();
  return InvalidField(field, absl::StrCat(size, " ", unit), absl::StrCat("in [", low, ", ", high, "] ", unit));
}

absl::Status CheckBytes(absl::string_view field, const std::string& value, int64_t low, int64_t high) {
  return CheckSize(field, static_cast<int64_t>(value.size()), low, high, "bytes");
}

absl::StatusOr<std::optional<Sha256Digest>> ParseExpected(absl::string_view field, const std::string& hex) {
  if (hex.empty()) return std::nullopt;
  const absl::StatusOr<Sha256Digest> digest = ParseDigest(hex);
  if (!digest.ok()) return InvalidField(field, Quoted(hex), "64 hexadecimal digits, or empty");
  return *digest;
}

std::string HexOrEmpty(const std::optional<Sha256Digest>& digest) { return digest.has_value() ? DigestHex(*digest) : std::string(); }

absl::StatusOr<InFlight> ParseInFlight(v1::InFlight::Mode mode) {
  switch (mode) {
    case v1::InFlight::UNSPECIFIED:
    case v1::InFlight::KEEP: return InFlight::kKeep;
    case v1::InFlight::RECOMPUTE: return InFlight::kRecompute;
    case v1::InFlight::ABORT: return InFlight::kAbort;
    case v1::InFlight::WAIT: return InFlight::kWait;
    default: return InvalidField("in_flight", absl::StrCat(static_cast<int>(mode)), "KEEP, RECOMPUTE, ABORT or WAIT");
  }
}

absl::StatusOr<WeightEncoding> ParseEncoding(v1::WeightEncoding::Type type) {
  switch (type) {
    case v1::WeightEncoding::UNSPECIFIED:
    case v1::WeightEncoding::FULL: return WeightEncoding::kFull;
    case v1::WeightEncoding::OVERWRITE_DELTA: return WeightEncoding::kOverwriteDelta;
    default: return InvalidField("encoding", absl::StrCat(static_cast<int>(type)), "FULL or OVERWRITE_DELTA");
  }
}

}  // namespace

absl::StatusOr<WeightSession::StartRequest> ToSession(const v1::StartWeightUpdateRequest& message) {
  WeightSession::StartRequest request;
  WeightUpdateSpec& spec = request.spec;
  BEBOP_RETURN_IF_ERROR(CheckUpdateId("update_id", message.update_id()));
  spec.update_id = message.update_id();
  if (message.has_base_step()) {
    if (message.base_step() < 0) return InvalidField("base_step", absl::StrCat(message.base_step()), ">= 0");
    spec.base_step = message.base_step();
  }
  if (message.target_step() < 0) return InvalidField("target_step", absl::StrCat(message.target_step()), ">= 0");
  spec.target_step = message.target_step();
  BEBOP_RETURN_IF_ERROR(CheckBytes("label", message.label(), 0, limits::kWeightLabelBytes));
  spec.label = message.label();
  BEBOP_RETURN_IF_ERROR(CheckSize("components", message.components_size(), 0, limits::kWeightComponents, "components"));
  for (int i = 0; i < message.components_size(); ++i) {
    const std::string field = absl::StrCat("components[", i, "]");
    const int type = message.components(i);
    if (type != v1::WeightComponent::TARGET && type != v1::WeightComponent::DRAFT) return InvalidField(field, absl::StrCat(type), "TARGET or DRAFT");
    const WeightComponent component = type == v1::WeightComponent::TARGET ? WeightComponent::kTarget : WeightComponent::kDraft;
    if (std::find(spec.components.begin(), spec.components.end(), component) != spec.components.end()) {
      return InvalidField(field, v1::WeightComponent::Type_Name(message.components(i)), "named once");
    }
    spec.components.push_back(component);
  }
  std::sort(spec.components.begin(), spec.components.end());  // a repeated start may name them in another order
  BEBOP_RETURN_IF_ERROR(CheckSize("manifest", message.manifest_size(), 0, limits::kWeightTensors, "tensors"));
  spec.manifest.reserve(static_cast<size_t>(message.manifest_size()));
  for (int i = 0; i < message.manifest_size(); ++i) {
    const v1::TensorSpec& tensor = message.manifest(i);
    const std::string field = absl::StrCat("manifest[", i, "]");
    BEBOP_RETURN_IF_ERROR(CheckBytes(absl::StrCat(field, ".name"), tensor.name(), 1, limits::kTensorNameBytes));
    BEBOP_RETURN_IF_ERROR(CheckBytes(absl::StrCat(field, ".dtype"), tensor.dtype(), 0, limits::kTensorDTypeBytes));
    BEBOP_RETURN_IF_ERROR(CheckSize(absl::StrCat(field, ".shape"), tensor.shape_size(), 0, limits::kTensorDimensions, "sizes"));
    spec.manifest.push_back({tensor.name(), tensor.dtype(), {tensor.shape().begin(), tensor.shape().end()}});
  }
  BEBOP_ASSIGN_OR_RETURN(spec.encoding, ParseEncoding(message.encoding()));
  BEBOP_ASSIGN_OR_RETURN(request.in_flight, ParseInFlight(message.in_flight()));
  if (message.has_deadline_ms()) {
    if (message.deadline_ms() < 1 || message.deadline_ms() > limits::kWeightDeadlineMs) {
      return InvalidField("deadline_ms", absl::StrCat(message.deadline_ms()), absl::StrCat("in [1, ", limits::kWeightDeadlineMs, "]"));
    }
    request.deadline = absl::Milliseconds(message.deadline_ms());
  }
  spec.rewind = message.rewind();
  return request;
}

absl::StatusOr<ExpectedDigests> ToSession(const v1::FinishWeightUpdateRequest& message) {
  BEBOP_RETURN_IF_ERROR(CheckUpdateId("update_id", message.update_id()));
  ExpectedDigests expected;
  BEBOP_ASSIGN_OR_RETURN(expected.target, ParseExpected("expect_target_digest", message.expect_target_digest()));
  BEBOP_ASSIGN_OR_RETURN(expected.draft, ParseExpected("expect_draft_digest", message.expect_draft_digest()));
  return expected;
}

absl::Status Validate(const v1::UpdateWeightsRequest& message) {
  BEBOP_RETURN_IF_ERROR(CheckUpdateId("update_id", message.update_id()));
  return CheckBytes("path", message.path(), 1, limits::kWeightPathBytes);
}

absl::Status Validate(const v1::AbortWeightUpdateRequest& message) {
  return message.update_id().empty() ? absl::OkStatus() : CheckUpdateId("update_id", message.update_id());
}

absl::Status CompleteChunk(v1::WeightChunk* message, std::string* update_id, std::string* tensor) {
  if (!message->update_id().empty()) {
    BEBOP_RETURN_IF_ERROR(CheckUpdateId("update_id", message->update_id()));
    *update_id = message->update_id();
  } else if (update_id->empty()) {
    return InvalidField("update_id", "missing", "optional in the first chunk of a stream");
  }
  if (!message->tensor().empty()) {
    BEBOP_RETURN_IF_ERROR(CheckBytes("tensor", message->tensor(), 1, limits::kTensorNameBytes));
    *tensor = message->tensor();
  } else if (tensor->empty()) {
    return InvalidField("tensor", "missing", "optional in the first chunk of a stream");
  }
  BEBOP_RETURN_IF_ERROR(CheckBytes("data", message->data(), 0, limits::kWeightChunkBytes));
  if (!message->digest().empty() && message->digest().size() != sizeof(Sha256Digest)) {
    return InvalidField("digest", absl::StrCat(message->digest().size(), " bytes"), absl::StrCat(sizeof(Sha256Digest), " bytes, or empty"));
  }
  message->set_update_id(*update_id);
  message->set_tensor(*tensor);
  return absl::OkStatus();
}

std::optional<Sha256Digest> DigestOf(const v1::WeightChunk& message) {
  if (message.digest().empty()) return std::nullopt;
  Sha256Digest digest;
  std::memcpy(digest.data(), message.digest().data(), digest.size());
  return digest;
}

v1::WeightUpdate ToProto(const WeightSession::State& state) {
  v1::WeightUpdate message;
  message.set_update_id(state.update_id);
  message.set_target_step(state.target_step);
  message.set_received_bytes(state.progress.received_bytes);
  message.set_expected_bytes(state.progress.expected_bytes);
  message.set_complete_tensors(state.progress.complete_tensors);
  message.set_num_tensors(state.progress.num_tensors);
  for (const TensorProgress& tensor : state.progress.missing) {
    v1::TensorProgress* const missing = message.add_missing();
    missing->set_name(tensor.name);
    missing->set_next_offset(tensor.next_offset);
  }
  return message;
}

v1::WeightInfo ToProto(const WeightSession::Info& info) {
  v1::WeightInfo message;
  message.set_target_step(info.version.target_step);
  message.set_draft_step(info.version.draft_step);
  if (!info.version.label.empty()) message.set_label(info.version.label);
  message.set_target_digest(DigestHex(info.version.target_digest));
  message.set_draft_digest(HexOrEmpty(info.version.draft_digest));
  message.set_update_id(info.update_id);
  if (info.open.has_value()) *message.mutable_update() = ToProto(*info.open);
  message.set_num_updates(info.num_updates);
  message.set_staging_bytes(info.staging_bytes);
  message.set_staging_limit_bytes(info.staging_limit_bytes);
  for (const TensorInfo& tensor : info.version.tensors) {
    v1::TensorSpec* const spec = message.add_tensors();
    spec->set_name(tensor.name);
    spec->set_dtype(FormName(tensor.form));
    spec->mutable_shape()->Add(tensor.shape.begin(), tensor.shape.end());
  }
  return message;
}

v1::FinishWeightUpdateResult ToProto(const WeightSession::FinishResult& result) {
  v1::FinishWeightUpdateResult message;
  *message.mutable_info() = ToProto(result.info);
  message.set_stage_seconds(absl::ToDoubleSeconds(result.stage_time));
  message.set_swap_seconds(absl::ToDoubleSeconds(result.commit.swap_time));
  message.set_kept_samples(result.commit.kept);
  message.set_recomputed_samples(result.commit.recomputed);
  message.set_ended_samples(result.commit.ended);
  return message;
}

v1::CheckWeightsResult ToProto(const WeightSession::CheckResult& result) {
  v1::CheckWeightsResult message;
  message.set_target_matches(result.target_matches);
  message.set_draft_matches(result.draft_matches);
  message.set_target_digest(DigestHex(result.now.target_digest));
  message.set_draft_digest(HexOrEmpty(result.now.draft_digest));
  return message;
}

}  // namespace bebop
