// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/cpp/client.h"

// What the typed clients of this folder share; not for their users.
namespace bebop {

// The same code, message and details.
absl::Status FromGrpc(const grpc::Status& status);

// A lazy connection to one port, with a deadline and a token for each call. Thread safe.
class Connection {
 public:
  explicit Connection(const ClientOptions& options);

  const std::shared_ptr<grpc::Channel>& channel() const { return channel_; }

  // Gives a call its deadline and its token.
  void Prepare(grpc::ClientContext* context) const {
    if (timeout_ != absl::InfiniteDuration()) context->set_deadline(std::chrono::system_clock::now() + absl::ToChronoNanoseconds(timeout_));
    if (!authorization_.empty()) context->AddMetadata("authorization", authorization_);
  }

  // One unary call of `stub`.
  template <typename Reply, typename Stub, typename Request>
  absl::StatusOr<Reply> Call(Stub* stub, grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Reply*), const Request& request) const {
    grpc::ClientContext context;
    Prepare(&context);
    Reply reply;
    absl::Status status = FromGrpc((stub->*method)(&context, request, &reply));
    if (!status.ok()) return status;
    return reply;
  }

 private:
  const absl::Duration timeout_;
  const std::string authorization_;  // empty: no token
  const std::shared_ptr<grpc::Channel> channel_;
};

}  // namespace bebop
