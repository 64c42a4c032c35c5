// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/client.h"

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <future>
#include <utility>

#include "absl/strings/cord.h"
#include "bebop/rpc/health.pb.h"
#include "bebop/rpc/status.pb.h"
#include "bebop/v1/info.grpc.pb.h"
#include "bebop/v1/rollout.grpc.pb.h"

namespace bebop {
namespace {

constexpr char kErrorInfoUrl[] = "type.googleapis.com/google.rpc.ErrorInfo";
constexpr char kRetryInfoUrl[] = "type.googleapis.com/google.rpc.RetryInfo";

absl::Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  absl::Status result(static_cast<absl::StatusCode>(status.error_code()), status.error_message());  // the same codes
  rpc::Status details;
  if (details.ParseFromString(status.error_details())) {
    for (const auto& any : details.details()) result.SetPayload(any.type_url(), absl::Cord(any.value()));
  }
  return result;
}

template <typename Message>
bool GetPayload(const absl::Status& status, const char* type_url, Message* message) {
  const auto payload = status.GetPayload(type_url);
  return payload.has_value() && message->ParseFromString(std::string(*payload));
}

std::shared_ptr<grpc::Channel> Connect(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);  // replies are as large as what was asked for
  arguments.SetMaxSendMessageSize(-1);     // the server's limit decides
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);  // http_proxy in the environment is for the web, not for the cluster
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
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
      : timeout(options.timeout),
        channel(Connect(options.server)),
        rollout(v1::Rollout::NewStub(channel)),
        info(v1::Info::NewStub(channel)) {}

  void SetDeadline(grpc::ClientContext* context) const {
    if (timeout != absl::InfiniteDuration()) context->set_deadline(std::chrono::system_clock::now() + absl::ToChronoNanoseconds(timeout));
  }

  // One unary call of `stub`.
  template <typename Reply, typename Stub, typename Request>
  absl::StatusOr<Reply> Call(Stub* stub, grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Reply*), const Request& request) {
    grpc::ClientContext context;
    SetDeadline(&context);
    Reply reply;
    absl::Status status = FromGrpc((stub->*method)(&context, request, &reply));
    if (!status.ok()) return status;
    return reply;
  }

  const absl::Duration timeout;
  const std::shared_ptr<grpc::Channel> channel;
  const std::unique_ptr<v1::Rollout::Stub> rollout;
  const std::unique_ptr<v1::Info::Stub> info;
};

Client::Client(const ClientOptions& options) : impl_(std::make_unique<Impl>(options)) {}
Client::~Client() = default;

absl::StatusOr<v1::GenerateResult> Client::Generate(const v1::GenerateRequest& request) {
  return impl_->Call<v1::GenerateResult>(impl_->rollout.get(), &v1::Rollout::Stub::Generate, request);
}

absl::Status Client::GenerateStream(const v1::GenerateRequest& request, const std::function<bool(const v1::GenerateEvent&)>& on_event) {
  grpc::ClientContext context;
  impl_->SetDeadline(&context);
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
  return impl_->Call<v1::ScoreResult>(impl_->rollout.get(), &v1::Rollout::Stub::Score, request);
}

absl::StatusOr<v1::AbortResult> Client::Abort(const v1::AbortRequest& request) {
  return impl_->Call<v1::AbortResult>(impl_->rollout.get(), &v1::Rollout::Stub::Abort, request);
}

absl::StatusOr<v1::ServerInfo> Client::GetServerInfo() {
  return impl_->Call<v1::ServerInfo>(impl_->info.get(), &v1::Info::Stub::GetServerInfo, v1::GetServerInfoRequest());
}

absl::StatusOr<v1::ModelInfo> Client::GetModelInfo() {
  return impl_->Call<v1::ModelInfo>(impl_->info.get(), &v1::Info::Stub::GetModelInfo, v1::GetModelInfoRequest());
}

absl::StatusOr<v1::Loads> Client::GetLoads() {
  return impl_->Call<v1::Loads>(impl_->info.get(), &v1::Info::Stub::GetLoads, v1::GetLoadsRequest());
}

absl::StatusOr<v1::TokenizeResult> Client::Tokenize(const v1::TokenizeRequest& request) {
  return impl_->Call<v1::TokenizeResult>(impl_->info.get(), &v1::Info::Stub::Tokenize, request);
}

absl::StatusOr<v1::DetokenizeResult> Client::Detokenize(const v1::DetokenizeRequest& request) {
  return impl_->Call<v1::DetokenizeResult>(impl_->info.get(), &v1::Info::Stub::Detokenize, request);
}

absl::StatusOr<std::string> Client::Health(const std::string& service) {
  // gRPC ships the health service's implementation without its stub's header.
  grpc::TemplatedGenericStub<rpc::HealthCheckRequest, rpc::HealthCheckResponse> stub(impl_->channel);
  grpc::ClientContext context;
  impl_->SetDeadline(&context);
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
