// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "bebop/v1/control.pb.h"
#include "client/cpp/client.h"

namespace bebop {

// Typed calls of the Control service, as Client has those of Rollout and Info. Each returns the state afterwards. Thread safe.
//
//   bebop::ControlClient control({.server = "127.0.0.1:50052"});
//   absl::StatusOr<bebop::v1::ControlState> state = control.PauseGeneration({});
class ControlClient {
 public:
  explicit ControlClient(const ClientOptions& options);  // `server` is the admin port
  ~ControlClient();
  ControlClient(const ControlClient&) = delete;
  ControlClient& operator=(const ControlClient&) = delete;

  absl::StatusOr<v1::ControlState> PauseGeneration(const v1::PauseGenerationRequest& request);
  absl::StatusOr<v1::ControlState> ResumeGeneration();
  absl::StatusOr<v1::ControlState> Sleep(const v1::SleepRequest& request);
  absl::StatusOr<v1::ControlState> WakeUp(const v1::WakeUpRequest& request);
  absl::StatusOr<v1::ControlState> FlushCache();
  absl::StatusOr<v1::ControlState> Drain(const v1::DrainRequest& request);
  absl::StatusOr<v1::ControlState> SetSpeculation(const v1::SetSpeculationRequest& request);

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace bebop
