// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/control_client.h"

#include "bebop/v1/control.grpc.pb.h"
#include "client/cpp/connection.h"

namespace bebop {

using Stub = v1::Control::Stub;

struct ControlClient::Impl {
  explicit Impl(const ClientOptions& options) : connection(options), stub(v1::Control::NewStub(connection.channel())) {}

  template <typename Request>
  absl::StatusOr<v1::ControlState> Call(grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, v1::ControlState*), const Request& request) {
    return connection.Call<v1::ControlState>(stub.get(), method, request);
  }

  const Connection connection;
  const std::unique_ptr<Stub> stub;
};

ControlClient::ControlClient(const ClientOptions& options) : impl_(std::make_unique<Impl>(options)) {}
ControlClient::~ControlClient() = default;

absl::StatusOr<v1::ControlState> ControlClient::PauseGeneration(const v1::PauseGenerationRequest& request) {
  return impl_->Call(&Stub::PauseGeneration, request);
}

absl::StatusOr<v1::ControlState> ControlClient::ResumeGeneration() { return impl_->Call(&Stub::ResumeGeneration, v1::ResumeGenerationRequest()); }

absl::StatusOr<v1::ControlState> ControlClient::Sleep(const v1::SleepRequest& request) { return impl_->Call(&Stub::Sleep, request); }

absl::StatusOr<v1::ControlState> ControlClient::WakeUp(const v1::WakeUpRequest& request) { return impl_->Call(&Stub::WakeUp, request); }

absl::StatusOr<v1::ControlState> ControlClient::FlushCache() { return impl_->Call(&Stub::FlushCache, v1::FlushCacheRequest()); }

absl::StatusOr<v1::ControlState> ControlClient::Drain(const v1::DrainRequest& request) { return impl_->Call(&Stub::Drain, request); }

absl::StatusOr<v1::ControlState> ControlClient::SetSpeculation(const v1::SetSpeculationRequest& request) {
  return impl_->Call(&Stub::SetSpeculation, request);
}

}  // namespace bebop
