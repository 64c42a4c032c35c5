// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/client.h"

#include <grpcpp/generic/generic_stub.h>

#include <future>
#include <utility>

#include "absl/strings/cord.h"
#include "bebop/rpc/health.pb.h"
#include "bebop/rpc/status.pb.h"
#include "bebop/v1/info.grpc.pb.h"
#include "bebop/v1/rollout.grpc.pb.h"
#include "client/cpp/connection.h"

namespace bebop {
namespace {

constexpr char kErrorInfoUrl[] = "type.googleapis.com/google.rpc.ErrorInfo";
constexpr char kRetryInfoUrl[] = "type.googleapis.com/google.rpc.RetryInfo";

template <typename Message>
bool GetPayload(const absl::Status& status, const char* type_url, Message* message) {
  const auto payload = status.GetPayload(type_url);
  return payload.has_value() && message->ParseFromString(std::string(*payload));
}

}  // namespace

ErrorDetails GetErrorDetails(const absl::Status& status) {
  ErrorDetails details;
  rpc::ErrorInfo info;
  if (GetPayload(status, kErrorInfoUrl, &info)) {
    details.reason = info.reason();
    details.metadata.insert(info.metadata().begin(), info.metadata().end());
  }
  rpc::RetryInfo retry;
  if (GetPayload(status, kRetryInfoUrl, &retry)) {
    details.retry_after = absl::Seconds(retry.retry_delay().seconds()) + absl::Nanoseconds(retry.retry_delay().nanos());
  }
  return details;
}

absl::Status WithReason(absl::Status status, const std::string& reason) {
  rpc::ErrorInfo info;
  info.set_reason(reason);
  info.set_domain("bebop");
  const std::string bytes = info.SerializeAsString();
  status.SetPayload(kErrorInfoUrl, absl::Cord(absl::string_view(bytes)));  // not Cord(std::string&&): see server/status_details.cc
  return status;
}

bool IsConnectionError(const absl::Status& status) { return absl::IsUnavailable(status) && GetErrorDetails(status).reason.empty(); }

struct Client::Impl {
  explicit Impl(const ClientOptions& options)
      : connection(options),
        rollout(v1::Rollout::NewStub(connection.channel())),
        info(v1::Info::NewStub(connection.channel())) {}

  const Connection connection;
  const std::unique_ptr<v1::Rollout::Stub> rollout;
  const std::unique_ptr<v1::Info::Stub> info;
};

Client::Client(const ClientOptions& options) : impl_(std::make_unique<Impl>(options)) {}
Client::~Client() = default;

absl::StatusOr<v1::GenerateResult> Client::Generate(const v1::GenerateRequest& request) {
  return impl_->connection.Call<v1::GenerateResult>(impl_->rollout.get(), &v1::Rollout::Stub::Generate, request);
}

absl::Status Client::GenerateStream(const v1::GenerateRequest& request, const std::function<bool(const v1::GenerateEvent&)>& on_event) {
  grpc::ClientContext context;
  impl_->connection.Prepare(&context);
  const auto reader = impl_->rollout->GenerateStream(&context, request);
  v1::GenerateEvent event;
  while (reader->Read(&event)) {
    if (on_event(event)) continue;
    context.TryCancel();
    while (reader->Read(&event)) {
    }
  }
  return FromGrpc(reader->Finish());
}

absl::StatusOr<v1::ScoreResult> Client::Score(const v1::ScoreRequest& request) {
  return impl_->connection.Call<v1::ScoreResult>(impl_->rollout.get(), &v1::Rollout::Stub::Score, request);
}

absl::StatusOr<v1::AbortResult> Client::Abort(const v1::AbortRequest& request) {
  return impl_->connection.Call<v1::AbortResult>(impl_->rollout.get(), &v1::Rollout::Stub::Abort, request);
}

absl::StatusOr<v1::ServerInfo> Client::GetServerInfo() {
  return impl_->connection.Call<v1::ServerInfo>(impl_->info.get(), &v1::Info::Stub::GetServerInfo, v1::GetServerInfoRequest());
}

absl::StatusOr<v1::ModelInfo> Client::GetModelInfo() {
  return impl_->connection.Call<v1::ModelInfo>(impl_->info.get(), &v1::Info::Stub::GetModelInfo, v1::GetModelInfoRequest());
}

absl::StatusOr<v1::Loads> Client::GetLoads() {
  return impl_->connection.Call<v1::Loads>(impl_->info.get(), &v1::Info::Stub::GetLoads, v1::GetLoadsRequest());
}

absl::StatusOr<v1::TokenizeResult> Client::Tokenize(const v1::TokenizeRequest& request) {
  return impl_->connection.Call<v1::TokenizeResult>(impl_->info.get(), &v1::Info::Stub::Tokenize, request);
}

absl::StatusOr<v1::DetokenizeResult> Client::Detokenize(const v1::DetokenizeRequest& request) {
  return impl_->connection.Call<v1::DetokenizeResult>(impl_->info.get(), &v1::Info::Stub::Detokenize, request);
}

absl::StatusOr<std::string> Client::Health(const std::string& service) {
  // gRPC ships the health service's implementation without its stub's header.
  grpc::TemplatedGenericStub<rpc::HealthCheckRequest, rpc::HealthCheckResponse> stub(impl_->connection.channel());
  grpc::ClientContext context;
  impl_->connection.Prepare(&context);
  rpc::HealthCheckRequest request;
  request.set_service(service);
  rpc::HealthCheckResponse reply;
  std::promise<grpc::Status> done;
  stub.UnaryCall(&context, "/grpc.health.v1.Health/Check", grpc::StubOptions(), &request, &reply,
                 [&done](grpc::Status status) { done.set_value(std::move(status)); });
  absl::Status status = FromGrpc(done.get_future().get());
  if (!status.ok()) return status;
  return rpc::HealthCheckResponse::ServingStatus_Name(reply.status());
}

}  // namespace bebop
