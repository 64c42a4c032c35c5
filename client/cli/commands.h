// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bebop/v1/rollout.pb.h"
#include "client/cpp/checkpoint_push.h"
#include "client/cpp/client.h"
#include "client/cpp/weights_client.h"

// The verbs of `bebop`. Each prints its result on stdout, errors on stderr, and returns an ExitCode (console.h). They are checked
// against cli.md section 2 by tests/integration.
namespace bebop {

// Flags that every verb knows.
struct GlobalFlags {
  std::string server = "127.0.0.1:50051";
  double timeout_s = 0.0;  // 0: none
  bool json = false;
};

// Many messages, one a line, with `concurrency` in flight and the replies in order. The verb's other flags fill what a line
// leaves unset.
struct BatchFlags {
  std::string requests;      // FILE or "-"; empty: one request from flags
  int32_t concurrency = 32;
};

struct GenerateFlags {
  BatchFlags batch;
  std::optional<std::string> text;
  std::string token_ids;
  bool parse_special = false;
  bool stream = false;
  // Everything else of the flags.
  v1::GenerateRequest request;
};
int RunGenerate(Client* client, const GlobalFlags& global, const GenerateFlags& flags);

struct RolloutsFlags {
  std::string prompts;  // a GenerateRequest a line
  std::string out;      // a GenerateResult a line; FILE.run beside it
  int32_t concurrency = 32;
  std::optional<uint64_t> seed;  // of the run; a prompt without a seed gets one from this and its place in the file
  v1::GenerateRequest request;   // what the lines leave unset
};
// Output lines have the request_id of their prompt, or "line-N" where it has none. They come in order of arrival, each synced before
// its place in flight is given on, and are in the order of the prompts once the run has come to its end. A run that finds its output
// there asks for the prompts it lacks, and refuses to go on with other prompts or flags. Refused prompts have no line, and are asked
// again by the next run.
int RunRollouts(Client* client, const GlobalFlags& global, const RolloutsFlags& flags);

struct ScoreFlags {
  BatchFlags batch;
  std::string token_ids;
  v1::ScoreRequest request;
};
int RunScore(Client* client, const GlobalFlags& global, const ScoreFlags& flags);

struct TokenizeFlags {
  BatchFlags batch;
  std::optional<std::string> text;
  bool parse_special = false;
};
int RunTokenize(Client* client, const GlobalFlags& global, const TokenizeFlags& flags);

struct DetokenizeFlags {
  BatchFlags batch;
  std::vector<std::string> ids;
  bool skip_special = false;
};
int RunDetokenize(Client* client, const GlobalFlags& global, const DetokenizeFlags& flags);

int RunInfo(Client* client, const GlobalFlags& global);
int RunHealth(Client* client, const GlobalFlags& global, const std::string& service);
int RunLoads(Client* client, const GlobalFlags& global);

struct BenchFlags {
  int32_t concurrency = 8;     // closed loop: requests in flight
  double rate = 0.0;           // > 0: open loop, requests per second (Poisson arrivals)
  int32_t num_requests = 32;
  int32_t num_samples = 1;
  int32_t prompt_len = 64;
  int32_t output_len = 64;
  int32_t warmup = 2;          // requests before the measurement
  uint64_t seed = 1;
  double temperature = 1.0;
  std::optional<int32_t> num_draft_tokens;
  v1::SpeculationParams::Mode mode = v1::SpeculationParams::UNSPECIFIED;
  std::optional<double> synthetic_acceptance;
  std::optional<double> synthetic_accept_length;  // solved for the number of draft tokens
};
int RunBench(Client* client, const GlobalFlags& global, const BenchFlags& flags);

struct VerifyFlags {
  int32_t num_prompts = 4;
  int32_t num_samples = 2048;  // a mode and prompt
  int32_t greedy_tokens = 48;
  uint64_t seed = 0;           // 0: a fresh one
};
int RunVerify(Client* client, const GlobalFlags& global, const VerifyFlags& flags);

// `push` and `update`.
struct WeightsUpdateFlags {
  std::vector<std::string> paths;  // push: files or one folder of this machine; update: one beneath the server's --weights-root
  WeightUpdateOptions options;
};
int RunWeightsPush(WeightsClient* client, const GlobalFlags& global, const WeightsUpdateFlags& flags);
int RunWeightsUpdate(WeightsClient* client, const GlobalFlags& global, const WeightsUpdateFlags& flags);
int RunWeightsInfo(WeightsClient* client, const GlobalFlags& global);
int RunWeightsCheck(WeightsClient* client, const GlobalFlags& global);
int RunWeightsAbort(WeightsClient* client, const GlobalFlags& global, const std::string& update_id);

}  // namespace bebop
