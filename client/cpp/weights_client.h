// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "bebop/v1/weights.pb.h"
#include "client/cpp/client.h"

namespace bebop {

// Typed calls of the Weights service, as Client has those of Rollout and Info. Thread safe.
//
//   bebop::WeightsClient weights({.server = "127.0.0.1:50052"});
//   absl::StatusOr<bebop::v1::WeightInfo> info = weights.GetWeightInfo(/*tensors=*/false);
//
// checkpoint_push.h brings whole checkpoints with it.
class WeightsClient {
 public:
  explicit WeightsClient(const ClientOptions& options);  // `server` is the admin port
  ~WeightsClient();
  WeightsClient(const WeightsClient&) = delete;
  WeightsClient& operator=(const WeightsClient&) = delete;

  absl::StatusOr<v1::WeightInfo> GetWeightInfo(bool tensors);
  absl::StatusOr<v1::WeightUpdate> StartWeightUpdate(const v1::StartWeightUpdateRequest& request);
  // One stream: sends what `next` puts into its argument, until it returns false. The argument keeps what it held in the call before.
  absl::StatusOr<v1::PushWeightsResult> PushWeights(const std::function<bool(v1::WeightChunk*)>& next);
  absl::StatusOr<v1::UpdateWeightsResult> UpdateWeights(const v1::UpdateWeightsRequest& request);
  absl::StatusOr<v1::FinishWeightUpdateResult> FinishWeightUpdate(const v1::FinishWeightUpdateRequest& request);
  absl::StatusOr<v1::AbortWeightUpdateResult> AbortWeightUpdate(const v1::AbortWeightUpdateRequest& request);
  absl::StatusOr<v1::CheckWeightsResult> CheckWeights();

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace bebop
