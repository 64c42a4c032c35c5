// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/weights_client.h"

#include "bebop/v1/weights.grpc.pb.h"
#include "client/cpp/connection.h"

namespace bebop {

using Stub = v1::Weights::Stub;

struct WeightsClient::Impl {
  explicit Impl(const ClientOptions& options) : connection(options), stub(v1::Weights::NewStub(connection.channel())) {}

  const Connection connection;
  const std::unique_ptr<Stub> stub;
};

WeightsClient::WeightsClient(const ClientOptions& options) : impl_(std::make_unique<Impl>(options)) {}
WeightsClient::~WeightsClient() = default;

absl::StatusOr<v1::WeightInfo> WeightsClient::GetWeightInfo(bool tensors) {
  v1::GetWeightInfoRequest request;
  request.set_tensors(tensors);
  return impl_->connection.Call<v1::WeightInfo>(impl_->stub.get(), &Stub::GetWeightInfo, request);
}

absl::StatusOr<v1::WeightUpdate> WeightsClient::StartWeightUpdate(const v1::StartWeightUpdateRequest& request) {
  return impl_->connection.Call<v1::WeightUpdate>(impl_->stub.get(), &Stub::StartWeightUpdate, request);
}

absl::StatusOr<v1::PushWeightsResult> WeightsClient::PushWeights(const std::function<bool(v1::WeightChunk*)>& next) {
  grpc::ClientContext context;
  impl_->connection.Prepare(&context);
  v1::PushWeightsResult result;
  const auto writer = impl_->stub->PushWeights(&context, &result);
  v1::WeightChunk chunk;
  while (next(&chunk)) {
    if (!writer->Write(chunk)) break;  // Finish says why
  }
  writer->WritesDone();
  absl::Status status = FromGrpc(writer->Finish());
  if (!status.ok()) return status;
  return result;
}

absl::StatusOr<v1::UpdateWeightsResult> WeightsClient::UpdateWeights(const v1::UpdateWeightsRequest& request) {
  return impl_->connection.Call<v1::UpdateWeightsResult>(impl_->stub.get(), &Stub::UpdateWeights, request);
}

absl::StatusOr<v1::FinishWeightUpdateResult> WeightsClient::FinishWeightUpdate(const v1::FinishWeightUpdateRequest& request) {
  return impl_->connection.Call<v1::FinishWeightUpdateResult>(impl_->stub.get(), &Stub::FinishWeightUpdate, request);
}

absl::StatusOr<v1::AbortWeightUpdateResult> WeightsClient::AbortWeightUpdate(const v1::AbortWeightUpdateRequest& request) {
  return impl_->connection.Call<v1::AbortWeightUpdateResult>(impl_->stub.get(), &Stub::AbortWeightUpdate, request);
}

absl::StatusOr<v1::CheckWeightsResult> WeightsClient::CheckWeights() {
  return impl_->connection.Call<v1::CheckWeightsResult>(impl_->stub.get(), &Stub::CheckWeights, v1::CheckWeightsRequest());
}

}  // namespace bebop
