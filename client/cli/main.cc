// SPDX-License-Identifier: Apache-2.0
// bebop: the command line client.
#include <CLI/CLI.hpp>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <map>
#include <string>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "client/cli/commands.h"
#include "client/cli/console.h"
#include "client/cli/control_commands.h"

namespace {

using bebop::v1::SpeculationParams;

const std::map<std::string, SpeculationParams::Mode> kModes = {{"off", SpeculationParams::OFF},
                                                               {"target_only", SpeculationParams::TARGET_ONLY},
                                                               {"rejection", SpeculationParams::REJECTION},
                                                               {"coupled", SpeculationParams::COUPLED}};

// CLI11 wraps negative numbers around and cuts large ones.
std::string CheckUnsigned(std::string& text) {
  uint64_t number = 0;
  if (!absl::SimpleAtoi(text, &number)) {
    return absl::StrCat(text, " is not in [0, ", std::numeric_limits<uint64_t>::max(), "]");
  }
  text = absl::StrCat(number);
  return "";
}

void AddSeed(CLI::App* verb, const std::string& help, std::function<void(uint64_t)> set) {
  verb->add_option_function<uint64_t>("--seed", std::move(set), help)->transform(CLI::Validator(CheckUnsigned, ""));
}

void AddBatch(CLI::App* verb, bebop::BatchFlags* flags) {
  verb->add_option("--requests", flags->requests, "One JSON message a line from FILE, or - for stdin");
  verb->add_option("--concurrency", flags->concurrency, "With --requests: how many are in flight")->check(CLI::Range(1, 1024))->capture_default_str();
}

void AddMode(CLI::App* verb, std::function<void(SpeculationParams::Mode)> set) {
  std::vector<std::string> names;
  for (const auto& [name, mode] : kModes) names.push_back(name);
  verb->add_option_function<std::string>("--mode", [set](const std::string& name) { set(kModes.at(name)); }, "off, target_only, rejection or coupled")
      ->check(CLI::IsMember(names));
}

// What `generate` and `rollouts` ask for, but for the seed.
void AddRequest(CLI::App* verb, bebop::v1::GenerateRequest* request) {
  verb->add_option_function<int32_t>("-n,--num-samples", [request](int32_t n) { request->set_num_samples(n); }, "Samples of the prompt");
  verb->add_option_function<int32_t>("--max-new-tokens", [request](int32_t n) { request->mutable_stopping()->set_max_new_tokens(n); }, "");
  verb->add_option_function<int32_t>("--min-new-tokens", [request](int32_t n) { request->mutable_stopping()->set_min_new_tokens(n); }, "");
  verb->add_option_function<float>("--temperature", [request](float x) { request->mutable_sampling()->set_temperature(x); }, "0 is greedy");
  verb->add_option_function<float>("--top-p", [request](float x) { request->mutable_sampling()->set_top_p(x); }, "");
  verb->add_option_function<int32_t>("--top-k", [request](int32_t n) { request->mutable_sampling()->set_top_k(n); }, "");
  verb->add_option_function<float>("--min-p", [request](float x) { request->mutable_sampling()->set_min_p(x); }, "");
  verb->add_option_function<std::vector<std::string>>(
          "--stop",
          [request](const std::vector<std::string>& stops) {
            for (const std::string& stop : stops) request->mutable_stopping()->add_stop(stop);
          },
          "Stop string; may be repeated")
      ->allow_extra_args(false);
  verb->add_option_function<std::string>(
      "--stop-token-ids",
      [request](const std::string& text) {
        const auto ids = bebop::ParseTokenIds(text);
        if (!ids.ok()) throw CLI::ValidationError("--stop-token-ids", std::string(ids.status().message()));
        request->mutable_stopping()->mutable_stop_token_ids()->Add(ids->begin(), ids->end());
      },
      "\"1 2 3\"");
  verb->add_flag_callback("--ignore-eos", [request] { request->mutable_stopping()->set_ignore_eos(true); }, "");
  AddMode(verb, [request](SpeculationParams::Mode mode) { request->mutable_speculation()->set_mode(mode); });
  verb->add_option_function<int32_t>("--num-draft-tokens", [request](int32_t n) { request->mutable_speculation()->set_num_draft_tokens(n); }, "");
  verb->add_flag_callback("--logprobs", [request] { request->mutable_output()->set_logprobs(true); }, "");
}

CLI::App* AddGenerate(CLI::App* app, bebop::GenerateFlags* flags) {
  CLI::App* verb = app->add_subcommand("generate", "Continue a prompt");
  auto* const request = &flags->request;
  verb->add_option_function<std::string>("TEXT", [flags](const std::string& text) { flags->text = text; }, "The prompt as text");
  verb->add_option("--token-ids", flags->token_ids, "The prompt as token ids, \"1 2 3\"");
  verb->add_flag("--parse-special", flags->parse_special, "Special tokens written in TEXT become their ids");
  AddBatch(verb, &flags->batch);
  AddRequest(verb, request);
  AddSeed(verb, "", [request](uint64_t n) { request->mutable_sampling()->set_seed(n); });
  verb->add_flag("--stream", flags->stream, "Show tokens as they come");
  verb->footer(
      "A line of --requests whose request_id the server has seen with the same body gets the result that is kept\n"
      "(for 10 minutes), also after new weights. Leave request_id out to sample afresh.");
  return verb;
}

CLI::App* AddRollouts(CLI::App* app, bebop::RolloutsFlags* flags) {
  CLI::App* verb = app->add_subcommand("rollouts", "Training data from a file of prompts; a run that was interrupted goes on");
  verb->add_option("--prompts", flags->prompts, "One GenerateRequest a line in JSON; the flags fill what a line leaves unset")
      ->required();
  verb->add_option("--out", flags->out, "One GenerateResult a line, with its prompt; beside it FILE.run, which says what made it")
      ->required();
  verb->add_option("--concurrency", flags->concurrency, "How many are in flight")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  AddSeed(verb, "Of the run: each prompt gets one of its own from it; default: a fresh one, kept in FILE.run",
          [flags](uint64_t n) { flags->seed = n; });
  AddRequest(verb, &flags->request);
  return verb;
}

CLI::App* AddScore(CLI::App* app, bebop::ScoreFlags* flags) {
  CLI::App* verb = app->add_subcommand("score", "Teacher-forced log-probabilities");
  auto* const request = &flags->request;
  AddBatch(verb, &flags->batch);
  verb->add_option("--token-ids", flags->token_ids, "One sequence, \"1 2 3\"");
  verb->add_option_function<int32_t>("--score-start", [request](int32_t n) { request->set_score_start(n); }, "First position to score");
  verb->add_option_function<float>("--temperature", [request](float x) { request->set_temperature(x); }, "");
  verb->add_option_function<int32_t>("--top-logprobs", [request](int32_t n) { request->set_top_logprobs(n); }, "");
  verb->add_flag_callback("--entropy", [request] { request->set_entropy(true); }, "");
  verb->add_option_function<int32_t>("--draft-depth", [request](int32_t n) { request->set_draft_depth(n); }, "Score the MTP layer, too");
  return verb;
}

CLI::App* AddBench(CLI::App* app, bebop::BenchFlags* flags) {
  CLI::App* verb = app->add_subcommand("bench", "Put load on the server and measure");
  const auto number = [verb](const char* name, int32_t* value, int low, const char* help) {
    verb->add_option(name, *value, help)->check(CLI::Range(low, 1 << 24))->capture_default_str();
  };
  number("--concurrency", &flags->concurrency, 1, "Closed loop: requests in flight");
  verb->add_option("--rate", flags->rate, "Open loop: requests per second, Poisson arrivals")->check(CLI::Range(1e-6, 1e6));
  number("--num-requests", &flags->num_requests, 1, "Requests measured");
  number("--num-samples", &flags->num_samples, 1, "Samples a request");
  number("--prompt-len", &flags->prompt_len, 1, "Random prompt ids");
  number("--output-len", &flags->output_len, 1, "Tokens a sample");
  number("--warmup", &flags->warmup, 0, "Requests before the measurement");
  AddSeed(verb, "Of prompts, samples and arrivals; default: 1", [flags](uint64_t n) { flags->seed = n; });
  verb->add_option("--temperature", flags->temperature, "")->capture_default_str();
  verb->add_option_function<int32_t>("--num-draft-tokens", [flags](int32_t n) { flags->num_draft_tokens = n; }, "");
  AddMode(verb, [flags](SpeculationParams::Mode mode) { flags->mode = mode; });
  CLI::Option* acceptance = verb->add_option_function<double>(
      "--synthetic-acceptance", [flags](double x) { flags->synthetic_acceptance = x; }, "Accept each reached draft with this probability");
  verb->add_option_function<double>("--synthetic-accept-length", [flags](double x) { flags->synthetic_accept_length = x; },
                                    "The same by the mean number of tokens an iteration")
      ->excludes(acceptance);
  return verb;
}

CLI::App* AddPause(CLI::App* app, bebop::v1::PauseGenerationRequest* request) {
  using Pause = bebop::v1::PauseGenerationRequest;
  static const std::map<std::string, Pause::Mode> kPauseModes = {{"keep", Pause::KEEP}, {"abort", Pause::ABORT}, {"wait", Pause::WAIT}};
  CLI::App* verb = app->add_subcommand("pause", "Stop generation between two iterations; new requests wait");
  verb->add_option_function<std::string>("--mode", [request](const std::string& name) { request->set_mode(kPauseModes.at(name)); },
                                         "Of running samples: keep (they go on at resume), abort (they end, with what they have and a resume handle) or "
                                         "wait (until they end, --timeout at most); default: keep")
      ->check(CLI::IsMember({"keep", "abort", "wait"}));
  verb->add_flag_callback("--clear-cache", [request] { request->set_clear_cache(true); }, "Give their caches back; they are recomputed at resume");
  return verb;
}

CLI::App* AddTags(CLI::App* app, const std::string& name, const std::string& help, std::vector<std::string>* tags) {
  CLI::App* verb = app->add_subcommand(name, help);
  verb->add_option("--tags", *tags, "weights, kv_cache, or both, with a comma; default: both")->delimiter(',')->check(CLI::IsMember({"weights", "kv_cache"}));
  return verb;
}

CLI::App* AddSpec(CLI::App* app, bebop::v1::SpeculationParams* speculation) {
  CLI::App* verb = app->add_subcommand("spec", "How requests draft that leave it unset; without flags: show it");
  AddMode(verb, [speculation](SpeculationParams::Mode mode) { speculation->set_mode(mode); });
  verb->add_option_function<int32_t>("--num-draft-tokens", [speculation](int32_t n) { speculation->set_num_draft_tokens(n); }, "Drafts before each verification");
  return verb;
}

CLI::App* AddVerify(CLI::App* app, bebop::VerifyFlags* flags) {
  CLI::App* verb = app->add_subcommand("verify", "Test that speculative and plain sampling agree on the loaded checkpoint");
  verb->add_option("--num-prompts", flags->num_prompts, "")->check(CLI::Range(1, 64))->capture_default_str();
  verb->add_option("--num-samples", flags->num_samples, "Samples a mode and prompt")->check(CLI::Range(1, 1 << 24))->capture_default_str();
  verb->add_option("--greedy-tokens", flags->greedy_tokens, "Tokens of the equality tests")->check(CLI::Range(1, 4096))->capture_default_str();
  AddSeed(verb, "Of prompts and samples; default: 0 = a fresh one", [flags](uint64_t n) { flags->seed = n; });
  return verb;
}

// CLI11 cuts numbers that are too large.
std::string CheckStep(std::string& text) {
  int64_t step = 0;
  return absl::SimpleAtoi(text, &step) && step >= 0 ? "" : absl::StrCat(text, " is not in [0, ", std::numeric_limits<int64_t>::max(), "]");
}

// The flags of both verbs that change weights.
CLI::App* AddWeightsUpdate(CLI::App* weights, const char* name, const std::string& help, bebop::WeightsUpdateFlags* flags) {
  using bebop::v1::InFlight;
  using bebop::v1::WeightComponent;
  static const std::map<std::string, InFlight::Mode> kInFlight = {
      {"keep", InFlight::KEEP}, {"recompute", InFlight::RECOMPUTE}, {"abort", InFlight::ABORT}, {"wait", InFlight::WAIT}};
  static const std::map<std::string, WeightComponent::Type> kComponents = {{"target", WeightComponent::TARGET}, {"draft", WeightComponent::DRAFT}};
  CLI::App* verb = weights->add_subcommand(name, help);
  bebop::WeightUpdateOptions* const options = &flags->options;
  verb->add_option("--step", options->target_step, "Step that the weights will be known by")->required()->check(CLI::Validator(CheckStep, ""));
  verb->add_option_function<std::string>("--components",
                                         [options](const std::string& names) {
                                           for (const absl::string_view component : absl::StrSplit(names, ',')) {
                                             options->components.push_back(kComponents.at(std::string(component)));
                                           }
                                         },
                                         "target, draft, or target,draft; default: all that the model has")
      ->check(CLI::Validator([](std::string& text) {
        const bool known = text == "target" || text == "draft" || text == "target,draft" || text == "draft,target";
        return known ? "" : text + " is not target, draft or target,draft";
      }, ""));
  verb->add_option_function<std::string>("--in-flight", [options](const std::string& mode) { options->in_flight = kInFlight.at(mode); },
                                         "What becomes of running samples: keep, recompute, abort or wait; default: keep")
      ->check(CLI::IsMember({"keep", "recompute", "abort", "wait"}));
  verb->add_option_function<int64_t>("--base-step", [options](int64_t step) { options->base_step = step; }, "Step that must be loaded")
      ->check(CLI::Validator(CheckStep, ""));
  verb->add_option("--label", options->label, "Text that goes with the step");
  verb->add_flag("--rewind", options->rewind, "Allow a step that is not newer than the loaded one");
  return verb;
}

std::string FromEnvironment(const char* name, const std::string& fallback) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : fallback;
}

// The token alone, not a line of the server's file. Empty: the file has none, or cannot be read.
std::string ReadToken(const std::string& path) {
  std::ifstream file(path);
  std::string line, rest;
  std::getline(file, line);
  std::getline(file, rest);
  const std::string token(absl::StripAsciiWhitespace(line));
  return token.find(' ') == std::string::npos && absl::StripAsciiWhitespace(rest).empty() ? token : "";
}

// What is wrong with a command line without a known verb. `rest`: what was not understood.
std::string NoVerb(const std::vector<std::string>& rest) {
  for (const std::string& word : rest) {
    if (word[0] != '-') return absl::StrCat("unknown verb '", word, "' (see bebop --help)");
  }
  return rest.empty() ? "give a verb (see bebop --help)"
                      : absl::StrCat("unknown flag '", rest.front(), "', and no verb (see bebop --help)");
}

// What is wrong with an address that a flag or the environment gave; empty: nothing.
std::string BadAddress(const std::string& names, const std::string& address) {
  const absl::Status status = bebop::CheckAddress(address);
  return status.ok() ? std::string() : absl::StrCat(names, ": ", status.message());
}

// Which of the two ports the user named: flags win over the environment, and at each level the rollout port wins.
bool IsAdminNamed(const CLI::App& app) {
  if (app.count("--server") + app.count("--admin") > 0) return app.count("--server") == 0;
  return FromEnvironment("BEBOP_SERVER", "").empty() && !FromEnvironment("BEBOP_ADMIN", "").empty();
}

}  // namespace

int main(int argc, char** argv) {
  // What fails is said by this program. Before gRPC looks, and before other threads exist.
  setenv("GRPC_VERBOSITY", "NONE", /*overwrite=*/0);
  bebop::GlobalFlags global;
  global.server = FromEnvironment("BEBOP_SERVER", global.server);
  std::string admin = FromEnvironment("BEBOP_ADMIN", "127.0.0.1:50052");
  bebop::GenerateFlags generate;
  bebop::RolloutsFlags rollouts;
  bebop::ScoreFlags score;
  bebop::TokenizeFlags tokenize;
  bebop::DetokenizeFlags detokenize;
  bebop::BenchFlags bench;
  bebop::VerifyFlags verify;
  std::string health_service;
  bebop::WeightsUpdateFlags weights_push, weights_update;
  std::string weights_abort_id;
  bebop::v1::PauseGenerationRequest pause;
  bebop::v1::DrainRequest drain;
  bebop::v1::SpeculationParams speculation;
  std::vector<std::string> tags;

  CLI::App app{"Client of bebop-server.", "bebop"};
  app.require_subcommand(1);
  app.fallthrough();
  app.add_option("--server", global.server, "Rollout port, HOST:PORT (or BEBOP_SERVER)")->capture_default_str();
  app.add_option("--admin", admin, "Admin port, HOST:PORT (or BEBOP_ADMIN); named without --server, info, health and loads ask there")
      ->capture_default_str();
  app.add_option("--timeout", global.timeout_s, "Seconds a call may take; default: no limit")->check(CLI::Range(0.001, 1e9));
  std::string token_file = FromEnvironment("BEBOP_TOKEN_FILE", "");
  app.add_option("--token-file", token_file, "File with the token to show to the server, and nothing else (or BEBOP_TOKEN_FILE)");
  app.add_flag("--json", global.json, "JSON, one object a line");
  CLI::App* generate_verb = AddGenerate(&app, &generate);
  CLI::App* rollouts_verb = AddRollouts(&app, &rollouts);
  CLI::App* score_verb = AddScore(&app, &score);
  CLI::App* tokenize_verb = app.add_subcommand("tokenize", "Text to token ids");
  tokenize_verb->add_option_function<std::string>("TEXT", [&](const std::string& text) { tokenize.text = text; }, "");
  tokenize_verb->add_flag("--parse-special", tokenize.parse_special, "Special tokens written in TEXT become their ids");
  AddBatch(tokenize_verb, &tokenize.batch);
  CLI::App* detokenize_verb = app.add_subcommand("detokenize", "Token ids to text");
  detokenize_verb->add_option("IDS", detokenize.ids, "");
  detokenize_verb->add_flag("--skip-special", detokenize.skip_special, "Leave special tokens out");
  AddBatch(detokenize_verb, &detokenize.batch);
  CLI::App* info_verb = app.add_subcommand("info", "What the server is");
  CLI::App* health_verb = app.add_subcommand("health", "Whether it serves; exit status 0 when it does");
  health_verb->add_option("--service", health_service, "bebop.v1.Rollout or bebop.v1.Info; default: the whole server");
  CLI::App* loads_verb = app.add_subcommand("loads", "What it does");
  CLI::App* bench_verb = AddBench(&app, &bench);
  CLI::App* verify_verb = AddVerify(&app, &verify);
  CLI::App* weights_verb = app.add_subcommand("weights", "New weights, on the admin port");
  weights_verb->require_subcommand(1);
  CLI::App* push_verb = AddWeightsUpdate(weights_verb, "push", "Stream a checkpoint's tensors to the server and swap them in", &weights_push);
  push_verb->add_option("PATHS", weights_push.paths, "The checkpoint's folder, or safetensors files")->required();
  CLI::App* update_verb = AddWeightsUpdate(weights_verb, "update", "Have the server read a checkpoint and swap it in", &weights_update);
  update_verb->add_option("PATH", weights_update.paths, "Folder or safetensors file beneath the server's --weights-root")->required()->expected(1);
  CLI::App* weights_info_verb = weights_verb->add_subcommand("info", "Steps, digests and the open update");
  CLI::App* check_verb = weights_verb->add_subcommand("check", "Hash the resident weights again; exit status 0 when they match");
  CLI::App* abort_verb = weights_verb->add_subcommand("abort", "Forget the open update");
  abort_verb->add_option("UPDATE_ID", weights_abort_id, "Only if it is this one");

  CLI::App* pause_verb = AddPause(&app, &pause);
  CLI::App* resume_verb = app.add_subcommand("resume", "Go on after pause");
  CLI::App* sleep_verb = AddTags(&app, "sleep", "Pause, and give device memory back", &tags);
  CLI::App* wake_up_verb = AddTags(&app, "wake-up", "Take the memory again", &tags);
  CLI::App* flush_verb = app.add_subcommand("flush-cache", "Forget what is cached of paused samples");
  CLI::App* drain_verb = app.add_subcommand("drain", "Refuse new work for good; what runs past the deadline is cut short. The process stays until it gets a signal");
  drain_verb->add_option_function<double>("--deadline", [&drain](double seconds) { drain.set_deadline_seconds(seconds); },
                                          "Seconds until what still runs is cut; default: the server's --drain-timeout");
  CLI::App* spec_verb = AddSpec(&app, &speculation);

  // CLI11 reports by exception; this is the one place that sees them.
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    std::fputs(app.help().c_str(), stdout);  // of the verb that was given, with the whole command in its usage
    return bebop::kExitOk;
  } catch (const CLI::RequiredError& error) {
    return bebop::ReportUsage(app.get_subcommands().empty() ? NoVerb(app.remaining()) : error.what());
  } catch (const CLI::ParseError& error) {
    return bebop::ReportUsage(absl::StrReplaceAll(error.what(), {{"\n", " "}}));
  }

  for (const std::string& bad : {BadAddress("--server or BEBOP_SERVER", global.server), BadAddress("--admin or BEBOP_ADMIN", admin)}) {
    if (!bad.empty()) return bebop::ReportUsage(bad);
  }
  bebop::ClientOptions options;
  const bool is_info = info_verb->parsed() || health_verb->parsed() || loads_verb->parsed();  // what the admin port answers
  options.server = is_info && IsAdminNamed(app) ? admin : global.server;
  if (global.timeout_s > 0.0) options.timeout = absl::Seconds(global.timeout_s);
  if (!token_file.empty()) {  // only ever a file: others on the machine can read flags, and perhaps the environment
    options.token = ReadToken(token_file);
    if (options.token.empty()) return bebop::ReportUsage(absl::StrCat("--token-file or BEBOP_TOKEN_FILE: ", token_file, ": cannot be read, or is not one line with a token"));
  }
  bebop::Client client(options);
  if (generate_verb->parsed()) return bebop::RunGenerate(&client, global, generate);
  if (rollouts_verb->parsed()) return bebop::RunRollouts(&client, global, rollouts);
  if (score_verb->parsed()) return bebop::RunScore(&client, global, score);
  if (tokenize_verb->parsed()) return bebop::RunTokenize(&client, global, tokenize);
  if (detokenize_verb->parsed()) return bebop::RunDetokenize(&client, global, detokenize);
  if (info_verb->parsed()) return bebop::RunInfo(&client, global);
  if (health_verb->parsed()) return bebop::RunHealth(&client, global, health_service);
  if (loads_verb->parsed()) return bebop::RunLoads(&client, global);
  if (bench_verb->parsed()) return bebop::RunBench(&client, global, bench);
  if (verify_verb->parsed()) return bebop::RunVerify(&client, global, verify);
  if (weights_verb->parsed()) {
    bebop::ClientOptions admin_options = options;
    admin_options.server = admin;
    bebop::WeightsClient weights(admin_options);
    if (push_verb->parsed()) return bebop::RunWeightsPush(&weights, global, weights_push);
    if (update_verb->parsed()) return bebop::RunWeightsUpdate(&weights, global, weights_update);
    if (weights_info_verb->parsed()) return bebop::RunWeightsInfo(&weights, global);
    if (check_verb->parsed()) return bebop::RunWeightsCheck(&weights, global);
    if (abort_verb->parsed()) return bebop::RunWeightsAbort(&weights, global, weights_abort_id);
  }
  options.server = admin;
  bebop::ControlClient control(options);
  if (pause_verb->parsed()) return bebop::RunPause(&control, global, pause);
  if (resume_verb->parsed()) return bebop::RunResume(&control, global);
  if (sleep_verb->parsed()) return bebop::RunSleep(&control, global, tags);
  if (wake_up_verb->parsed()) return bebop::RunWakeUp(&control, global, tags);
  if (flush_verb->parsed()) return bebop::RunFlushCache(&control, global);
  if (drain_verb->parsed()) return bebop::RunDrain(&control, global, drain);
  if (spec_verb->parsed()) return bebop::RunSpec(&control, global, speculation);
  return bebop::ReportUsage("no verb");  // unreachable: one is required
}
