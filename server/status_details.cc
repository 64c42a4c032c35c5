// SPDX-License-Identifier: Apache-2.0
#include "server/status_details.h"

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "bebop/rpc/status.pb.h"
#include "engine/base/status_reason.h"
#include "engine/schedule/engine_core.h"

namespace bebop {
namespace {

rpc::ErrorInfo GetErrorInfo(const absl::Status& status) {
  rpc::ErrorInfo info;
  if (const auto payload = status.GetPayload(kErrorInfoUrl)) info.ParseFromString(std::string(*payload));
  return info;
}

absl::Cord ToCord(const google::protobuf::Message& message) {
  const std::string bytes = message.SerializeAsString();
  return absl::Cord(absl::string_view(bytes));  // Cord(std::string&&) has another mangled name in Clang than in the packaged library
}

}  // namespace

absl::Status DetailedError(absl::StatusCode code, absl::string_view reason, absl::string_view message,
                           std::initializer_list<std::pair<absl::string_view, std::string>> metadata) {
  rpc::ErrorInfo info;
  info.set_reason(std::string(reason));
  info.set_domain(kErrorDomain);
  for (const auto& [key, value] : metadata) (*info.mutable_metadata())[std::string(key)] = value;
  absl::Status status(code, message);
  status.SetPayload(kErrorInfoUrl, ToCord(info));
  return status;
}

absl::Status InvalidField(absl::string_view field, absl::string_view value, absl::string_view limit) {
  return DetailedError(absl::StatusCode::kInvalidArgument, "INVALID_FIELD", absl::StrCat(field, ": ", value, " is not ", limit),
                       {{"field", std::string(field)}, {"value", std::string(value)}, {"limit", std::string(limit)}});
}

absl::Status WithRetryAfter(absl::Status status, absl::Duration delay) {
  rpc::RetryInfo info;
  const int64_t nanos = absl::ToInt64Nanoseconds(delay);
  info.mutable_retry_delay()->set_seconds(nanos / 1000000000);
  info.mutable_retry_delay()->set_nanos(static_cast<int32_t>(nanos % 1000000000));
  status.SetPayload(kRetryInfoUrl, ToCord(info));
  return status;
}

absl::Status CompleteDetails(absl::Status status) {
  if (status.ok() || status.GetPayload(kErrorInfoUrl).has_value()) return status;
  const std::string engine_reason = StatusReason(status);
  if (!engine_reason.empty()) {
    rpc::ErrorInfo info;
    info.set_reason(engine_reason);
    info.set_domain(kErrorDomain);
    for (const auto& [name, value] : StatusReasonMetadata(status)) (*info.mutable_metadata())[name] = value;
    absl::Status detailed(status.code(), status.message());
    detailed.SetPayload(kErrorInfoUrl, ToCord(info));
    // Another learner's update ends; what does not fit today does not fit tomorrow.
    const bool retry = absl::IsUnavailable(status) || engine_reason == "UPDATE_IN_PROGRESS";
    return retry ? WithRetryAfter(std::move(detailed), kCapacityRetryDelay) : detailed;
  }
  const bool never_fits = absl::IsResourceExhausted(status) && EngineCore::CanNeverFit(status);  // however long it waits
  const auto reason = [&status, never_fits]() -> absl::string_view {
    switch (status.code()) {
      case absl::StatusCode::kInvalidArgument: return "INVALID_FIELD";
      case absl::StatusCode::kFailedPrecondition: return "PRECONDITION_FAILED";
      case absl::StatusCode::kAlreadyExists: return "REQUEST_ID_REUSED";
      case absl::StatusCode::kResourceExhausted: return never_fits ? "CANNOT_FIT" : "CAPACITY";
      case absl::StatusCode::kUnavailable: return "NOT_SERVING";
      case absl::StatusCode::kDeadlineExceeded: return "DEADLINE";
      case absl::StatusCode::kCancelled: return "CANCELLED";
      case absl::StatusCode::kNotFound: return "NOT_FOUND";
      case absl::StatusCode::kPermissionDenied: return "PERMISSION_DENIED";
      case absl::StatusCode::kDataLoss: return "DATA_LOSS";
      default: return "ENGINE_FAILED";
    }
  }();
  const bool retry = (absl::IsResourceExhausted(status) && !never_fits) || absl::IsUnavailable(status);
  absl::Status detailed = DetailedError(status.code(), reason, status.message());
  return retry ? WithRetryAfter(std::move(detailed), kCapacityRetryDelay) : detailed;
}

std::string ErrorReason(const absl::Status& status) { return GetErrorInfo(status).reason(); }

std::string ErrorMetadata(const absl::Status& status, absl::string_view key) {
  const rpc::ErrorInfo info = GetErrorInfo(status);
  const auto found = info.metadata().find(std::string(key));
  return found == info.metadata().end() ? std::string() : found->second;
}

}  // namespace bebop
