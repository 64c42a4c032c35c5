// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/runtime/engine.h"
#include "engine/sampling/sampling_params.h"

namespace bebop {

// Everything `bebop-server` can be told. Defaults here are the only ones.
struct ServerOptions {
  EngineOptions engine;
  std::string served_model_name;  // empty: the model's directory name
  std::string host = "127.0.0.1";
  int32_t port = 50051;        // 0: a free one
  int32_t admin_port = 50052;  // 0: a free one
  int32_t http_port = -1;      // probes and metrics; 0: a free one, -1: none
  bool vllm_metrics = false, sglang_metrics = false;  // under those names, too
  SpeculationMode speculation = SpeculationMode::kRejection;  // of requests that leave it unset
  int32_t num_speculative_tokens = 3;                         // likewise
  double drain_timeout_s = 30.0;       // after SIGTERM, until running work is cut short
  double max_request_s = 3600.0;       // longest wall time of a request
  std::string weights_root;            // folder beneath which clients may name weight files; empty: none
  bool allow_synthetic_acceptance = false;
  bool allow_unknown_fields = false;
  std::string token_file;              // Access::FromFile; empty: no tokens
  bool insecure_no_auth = false;       // allows other than loopback addresses without tokens
};

// What the command line asked for.
enum class ServerAction { kServe, kCheckConfig, kPrintAndExit };
struct ServerCommand {
  ServerAction action = ServerAction::kServe;
  std::string text;  // kPrintAndExit: help or version
  ServerOptions options;
};

// Reads the options from `--config FILE.yaml`, then the environment (BEBOP_MAX_MODEL_LEN for --max-model-len, and so on), then the flags;
// later ones win. Config keys are flag names without dashes, `-` or `_` alike. Then validates.
// INVALID_ARGUMENT in one line that names the flag, variable or key, the value and what is allowed.
// `environment`: (name, value) pairs; variables that name no flag are left alone, as the client's live there, too.
absl::StatusOr<ServerCommand> ParseServerCommand(const std::vector<std::string>& arguments,
                                                 const std::vector<std::pair<std::string, std::string>>& environment);

// Ranges and combinations that flags alone do not show.
absl::Status Validate(const ServerOptions& options);

// A status of Engine::Create in the words of the command line: an error about an engine option (`max_model_len: ...`) names the flag
// (`--max-model-len: ...`). Others stay as they are.
absl::Status NameFlags(const absl::Status& status);

// True for 127.0.0.0/8, ::1 and localhost.
bool IsLoopback(const std::string& host);

// The resolved options as YAML that --config reads back.
std::string ToYaml(const ServerOptions& options);

}  // namespace bebop
