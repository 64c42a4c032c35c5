// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <grpcpp/impl/codegen/proto_utils.h>
#include <grpcpp/support/byte_buffer.h>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/status_details.h"

namespace bebop {

// Bytes of the wire -> message. INVALID_ARGUMENT / MALFORMED_MESSAGE, also for text that is not UTF-8.
template <typename Message>
absl::Status ParseMessage(const grpc::ByteBuffer& bytes, Message* message) {
  grpc::ByteBuffer copy = bytes;  // shares the slices; deserialising consumes its buffer
  if (grpc::SerializationTraits<Message>::Deserialize(&copy, message).ok()) return absl::OkStatus();
  return DetailedError(absl::StatusCode::kInvalidArgument, "MALFORMED_MESSAGE",
                       absl::StrCat("the bytes received are not a ", Message::descriptor()->full_name()));
}

// Message -> bytes of the wire. RESOURCE_EXHAUSTED for a reply beyond what protobuf can carry (2 GiB).
template <typename Message>
absl::Status SerializeMessage(const Message& message, grpc::ByteBuffer* bytes) {
  bool owned = false;
  if (grpc::SerializationTraits<Message>::Serialize(message, bytes, &owned).ok()) return absl::OkStatus();
  return DetailedError(absl::StatusCode::kResourceExhausted, "REPLY_TOO_LARGE",
                       "the reply is larger than a message can be; ask for fewer samples or use GenerateStream");
}

}  // namespace bebop
