// SPDX-License-Identifier: Apache-2.0
#include "server/grpc_status.h"

#include <string>

#include "absl/strings/cord.h"
#include "bebop/rpc/status.pb.h"
#include "server/status_details.h"

namespace bebop {

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const absl::Status detailed = CompleteDetails(status);
  rpc::Status details;
  details.set_code(static_cast<int>(detailed.code()));  // absl's codes are gRPC's
  details.set_message(std::string(detailed.message()));
  detailed.ForEachPayload([&details](absl::string_view type_url, const absl::Cord& payload) {
    google::protobuf::Any* any = details.add_details();
    any->set_type_url(std::string(type_url));
    any->set_value(std::string(payload));
  });
  return grpc::Status(static_cast<grpc::StatusCode>(detailed.code()), std::string(detailed.message()), details.SerializeAsString());
}

}  // namespace bebop
