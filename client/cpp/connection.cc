// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/connection.h"

#include <algorithm>
#include <iterator>

#include "absl/strings/ascii.h"
#include "absl/strings/cord.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
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

// Of gRPC's names that are no host: https://github.com/grpc/grpc/blob/master/doc/naming.md
constexpr absl::string_view kSchemes[] = {"dns", "unix", "unix-abstract", "vsock", "ipv4", "ipv6", "xds"};

bool IsPort(absl::string_view text) {
  uint32_t port = 0;
  const auto is_digit = [](char c) { return absl::ascii_isdigit(static_cast<unsigned char>(c)); };
  return !text.empty() && std::all_of(text.begin(), text.end(), is_digit) && absl::SimpleAtoi(text, &port) && port > 0 &&
         port < 65536;
}

}  // namespace

absl::Status CheckAddress(absl::string_view address) {
  const absl::string_view scheme = address.substr(0, std::min(address.find(':'), address.size()));
  const bool is_known = std::find(std::begin(kSchemes), std::end(kSchemes), scheme) != std::end(kSchemes);
  if (!is_known && absl::StrContains(address, "://")) {
    return absl::InvalidArgumentError(absl::StrCat("\"", address, "\": expected HOST:PORT, without ", scheme, "://"));
  }
  const size_t colon = address.rfind(':');
  const absl::string_view host = address.substr(0, std::min(colon, address.size()));
  const bool is_ipv6 = host.size() > 2 && host.front() == '[' && host.find(']') == host.size() - 1;
  const bool is_host = !host.empty() && host.find_first_of(":/[]") == absl::string_view::npos;
  if (colon != absl::string_view::npos && (is_ipv6 || is_host) && IsPort(address.substr(colon + 1))) return absl::OkStatus();
  if (is_known && scheme.size() + 1 < address.size()) return absl::OkStatus();  // gRPC knows what it means
  return absl::InvalidArgumentError(
      absl::StrCat("\"", address, "\": expected HOST:PORT, or [IPV6]:PORT, with a port from 1 to 65535"));
}

absl::Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  std::string message = status.error_message();
  if (status.error_code() == grpc::StatusCode::UNIMPLEMENTED && message.empty()) {  // a server of ours would say more
    message =
        "this address does not serve the call: generation and scores are on the rollout port, weights and control on the admin "
        "port";
  }
  absl::Status result(static_cast<absl::StatusCode>(status.error_code()), message);  // the same codes
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
