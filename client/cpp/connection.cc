// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/connection.h"

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "bebop/rpc/status.pb.h"

namespace bebop {
namespace {

std::shared_ptr<grpc::Channel> Connect(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);  // replies are as large as what was asked for
  arguments.SetMaxSendMessageSize(-1);     // the server's limit decides
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);  // http_proxy in the environment is for the web, not for the cluster
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

}  // namespace

absl::Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  absl::Status result(static_cast<absl::StatusCode>(status.error_code()), status.error_message());  // the same codes
  rpc::Status details;
  if (details.ParseFromString(status.error_details())) {
    for (const auto& any : details.details()) result.SetPayload(any.type_url(), absl::Cord(any.value()));
  }
  return result;
}

Connection::Connection(const ClientOptions& options)
    : timeout_(options.timeout),
      authorization_(options.token.empty() ? std::string() : absl::StrCat("Bearer ", options.token)),
      channel_(Connect(options.server)) {}

}  // namespace bebop
