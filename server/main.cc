// SPDX-License-Identifier: Apache-2.0
// bebop-server: loads a model, serves it, drains on SIGTERM, ends when its engine fails.
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "engine/runtime/engine.h"
#include "server/serve.h"
#include "server/server.h"
#include "server/server_options.h"

extern char** environ;

namespace {

int Fail(const absl::Status& status) {
  std::string message(status.message());
  for (char& c : message) {
    if (c == '\n') c = ' ';  // one line, whatever a file put into it
  }
  std::fprintf(stderr, "error: %s\n", message.c_str());
  return bebop::StartFailureStatus(status);
}

std::vector<std::pair<std::string, std::string>> Environment() {
  std::vector<std::pair<std::string, std::string>> variables;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string text = *entry;
    const size_t equals = text.find('=');
    if (equals != std::string::npos) variables.emplace_back(text.substr(0, equals), text.substr(equals + 1));
  }
  return variables;
}

bebop::ListenOptions ToListenOptions(const bebop::ServerOptions& options, bebop::Access access) {
  return {.host = options.host,
          .port = options.port,
          .admin_port = options.admin_port,
          .is_loopback = bebop::IsLoopback(options.host),
          .access = std::move(access),
          .http_port = options.http_port,
          .vllm_metrics = options.vllm_metrics,
          .sglang_metrics = options.sglang_metrics,
          .served_model_name = options.served_model_name,
          .default_mode = options.speculation,
          .default_num_draft_tokens = options.num_speculative_tokens,
          .allow_synthetic_acceptance = options.allow_synthetic_acceptance,
          .allow_unknown_fields = options.allow_unknown_fields,
          .max_request_time = absl::Seconds(options.max_request_s),
          .drain_timeout = absl::Seconds(options.drain_timeout_s),
          .weights_root = options.weights_root,
          .weight_staging_bytes = options.engine.weight_staging_bytes};
}

}  // namespace

int main(int argc, char** argv) {
  // Signals are waited for below, by this thread alone; blocked before any other thread exists, so that all inherit it.
  sigset_t stop_signals;
  sigemptyset(&stop_signals);
  sigaddset(&stop_signals, SIGTERM);
  sigaddset(&stop_signals, SIGINT);
  signal(SIGPIPE, SIG_IGN);
  // What fails is said by this program. Before gRPC looks, and before other threads exist.
  setenv("GRPC_VERBOSITY", "NONE", /*overwrite=*/0);

  const auto command = bebop::ParseServerCommand(std::vector<std::string>(argv + 1, argv + argc), Environment());
  if (!command.ok()) return Fail(command.status());
  if (command->action == bebop::ServerAction::kPrintAndExit) {
    std::fputs(command->text.c_str(), stdout);
    return 0;
  }
  const bebop::ServerOptions& options = command->options;
  std::fprintf(stderr, "# resolved options\n%s", bebop::ToYaml(options).c_str());
  bebop::Access access;
  if (!options.token_file.empty()) {
    auto tokens = bebop::Access::FromFile(options.token_file);
    if (!tokens.ok()) return Fail(absl::Status(tokens.status().code(), "--token-file: " + std::string(tokens.status().message())));
    access = *std::move(tokens);
  }
  if (command->action == bebop::ServerAction::kCheckConfig) return 0;

  // While the model loads a signal simply ends the process; from here on it drains.
  auto engine = bebop::Engine::Create(options.engine);
  if (!engine.ok()) return Fail(bebop::NameFlags(engine.status()));
  pthread_sigmask(SIG_BLOCK, &stop_signals, nullptr);
  auto server = bebop::Server::Start(engine->get(), ToListenOptions(options, std::move(access)));
  if (!server.ok()) return Fail(server.status());

  const std::string& http = (*server)->http_address();
  std::printf("bebop-server ready: rollout=%s admin=%s model=%s version=%lld%s\n", (*server)->rollout_address().c_str(),
              (*server)->admin_address().c_str(), (*server)->served_model_name().c_str(),
              static_cast<long long>((*engine)->weight_version().target_step), http.empty() ? "" : (" http=" + http).c_str());
  std::fflush(stdout);

  const int status = bebop::ServeUntilStopped(**engine, **server, {.stop_signals = stop_signals, .drain_timeout = absl::Seconds(options.drain_timeout_s)});
  server->reset();
  // A failed device may keep whoever takes down what lives on it waiting; the system takes it all back.
  if (status != 0) _exit(status);
  engine->reset();
  return status;
}
