// SPDX-License-Identifier: Apache-2.0
#include "engine/base/status_reason.h"

#include <utility>

#include "absl/strings/cord.h"

namespace bebop {
namespace {

constexpr char kReasonUrl[] = "bebop/reason";
constexpr char kMetadataUrl[] = "bebop/reason-metadata";  // names and values by turns, each with '\0' behind it

}  // namespace

absl::Status StatusWithReason(absl::StatusCode code, absl::string_view reason, absl::string_view message,
                              const StatusMetadata& metadata) {
  absl::Status status(code, message);
  status.SetPayload(kReasonUrl, absl::Cord(reason));
  std::string bytes;
  for (const auto& [name, value] : metadata) {
    for (const std::string& part : {name, value}) bytes.append(part).push_back('\0');
  }
  if (!bytes.empty()) status.SetPayload(kMetadataUrl, absl::Cord(absl::string_view(bytes)));
  return status;
}

std::string StatusReason(const absl::Status& status) {
  const auto reason = status.GetPayload(kReasonUrl);
  return reason.has_value() ? std::string(*reason) : std::string();
}

StatusMetadata StatusReasonMetadata(const absl::Status& status) {
  StatusMetadata metadata;
  const auto payload = status.GetPayload(kMetadataUrl);
  const std::string bytes = payload.has_value() ? std::string(*payload) : std::string();
  const auto next = [&bytes](size_t* begin) {
    const size_t end = bytes.find('\0', *begin);
    std::string part = bytes.substr(*begin, end - *begin);
    *begin = end + 1;
    return part;
  };
  for (size_t begin = 0; begin < bytes.size();) {
    std::string name = next(&begin);
    metadata.emplace_back(std::move(name), next(&begin));
  }
  return metadata;
}

}  // namespace bebop
