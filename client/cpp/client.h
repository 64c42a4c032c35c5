// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "bebop/v1/info.pb.h"
#include "bebop/v1/rollout.pb.h"

namespace bebop {

struct ClientOptions {
  std::string server = "127.0.0.1:50051";  // host:port; the admin port answers the Info calls and Health
  absl::Duration timeout = absl::InfiniteDuration();  // of each call
  std::string token = {};  // shown with each call, for servers with --token-file; empty: none
};

// Whether `server` can be an address: INVALID_ARGUMENT for a web address or one without a port, which calls would take for one that
// does not answer yet.
absl::Status CheckAddress(absl::string_view address);

// What a status of a call holds besides code and message.
struct ErrorDetails {
  std::string reason;  // the server's, e.g. INVALID_FIELD; empty when no server answered
  std::map<std::string, std::string> metadata;  // e.g. field, value, limit
  std::optional<absl::Duration> retry_after;
};
ErrorDetails GetErrorDetails(const absl::Status& status);
// `status` with that reason, for what is refused before it is sent.
absl::Status WithReason(absl::Status status, const std::string& reason);

// True when the call reached no server, as opposed to one that refused it.
bool IsConnectionError(const absl::Status& status);

// Typed calls to a bebop server. Each blocks until the reply, an error or the timeout; errors are the server's status with
// its ErrorDetails. Connects on first use. Thread safe: many threads may share one client and its connection.
//
//   bebop::Client client({.server = "127.0.0.1:50051"});
//   bebop::v1::GenerateRequest request;
//   request.add_prompt_token_ids(17);
//   absl::StatusOr<bebop::v1::GenerateResult> result = client.Generate(request);
class Client {
 public:
  explicit Client(const ClientOptions& options);
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  absl::StatusOr<v1::GenerateResult> Generate(const v1::GenerateRequest& request);
  // Calls `on_event` for each event on the calling thread; when it returns false the call is cancelled (CANCELLED).
  absl::Status GenerateStream(const v1::GenerateRequest& request, const std::function<bool(const v1::GenerateEvent&)>& on_event);
  absl::StatusOr<v1::ScoreResult> Score(const v1::ScoreRequest& request);
  absl::StatusOr<v1::AbortResult> Abort(const v1::AbortRequest& request);

  absl::StatusOr<v1::ServerInfo> GetServerInfo();
  absl::StatusOr<v1::ModelInfo> GetModelInfo();
  absl::StatusOr<v1::Loads> GetLoads();
  absl::StatusOr<v1::TokenizeResult> Tokenize(const v1::TokenizeRequest& request);
  absl::StatusOr<v1::DetokenizeResult> Detokenize(const v1::DetokenizeRequest& request);

  // "SERVING", "NOT_SERVING" or "UNKNOWN" of grpc.health.v1; `service` empty: the whole server. NOT_FOUND for a service it lacks.
  absl::StatusOr<std::string> Health(const std::string& service);

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace bebop
