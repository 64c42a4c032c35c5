// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/runtime/engine_interface.h"
#include "engine/sampling/sampling_params.h"
#include "server/access.h"

namespace bebop {

// How to serve an engine; a part of ServerOptions with the ranges already checked.
struct ListenOptions {
  std::string host = "127.0.0.1";
  int32_t port = 0, admin_port = 0;  // 0: a free one
  bool is_loopback = true;           // reflection is for loopback only
  Access access;                     // who may call what; default: everybody everything
  int32_t http_port = -1;            // probes and metrics; 0: a free one, -1: none
  bool vllm_metrics = false, sglang_metrics = false;  // MetricsOptions
  std::string served_model_name;     // empty: the engine's
  SpeculationMode default_mode = SpeculationMode::kOff;
  int32_t default_num_draft_tokens = 0;  // of requests in a mode other than OFF, whatever default_mode is
  bool allow_synthetic_acceptance = false;  // also allowed with dummy weights
  bool allow_unknown_fields = false;
  absl::Duration max_request_time = absl::Hours(1);
  absl::Duration drain_timeout = absl::Seconds(30);  // of Control.Drain calls that name none
  std::string weights_root;          // folder beneath which UpdateWeights reads; empty: it does not
  int64_t weight_staging_bytes = 0;  // WeightSessionOptions::staging_limit_bytes
};

// Two listeners over one engine: the rollout port (Rollout, Info) and the admin port (Weights, Control, Info), each with grpc.health.v1 and
// reflection, limits and a memory quota of its own. A thread keeps the health status in step with the engine's. If asked for, a third listener
// answers probes and scrapes over HTTP, with threads of its own (docs/operations.md): /metrics, /health and /liveness, /ready, /version.
// Thread safe.
class Server {
 public:
  // Starts listening. `engine` must outlive the server. INVALID_ARGUMENT when an address cannot be bound.
  static absl::StatusOr<std::unique_ptr<Server>> Start(EngineInterface* engine, const ListenOptions& options);
  // Cuts what is still running.
  ~Server();

  // host:port to connect to.
  const std::string& rollout_address() const;
  const std::string& admin_address() const;
  const std::string& http_address() const;  // empty: none
  const std::string& served_model_name() const;

  // Health goes NOT_SERVING and new work is refused at once; then waits for running work, at most `timeout`, after which it ends as
  // DRAINED with its tokens so far, and their replies are made (reply_thread.h says how long that takes); then closes both
  // listeners. A second call waits for the first.
  void Drain(absl::Duration timeout);

 private:
  struct Impl;
  explicit Server(std::unique_ptr<Impl> impl);
  const std::unique_ptr<Impl> impl_;
};

}  // namespace bebop
