// SPDX-License-Identifier: Apache-2.0
// bebop-train-mtp: trains the MTP layer of a checkpoint against its frozen target.
#include <signal.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <cstdio>
#include <limits>
#include <map>
#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "engine/tools/train_options.h"
#include "engine/tools/training_run.h"

#ifndef BEBOP_VERSION
#error "BEBOP_VERSION comes from CMake"
#endif

namespace {

// Exit statuses (docs/training.md). A signal that stopped the run: 128 + its number.
enum ExitCode { kExitOk = 0, kExitFailed = 1, kExitUsage = 2 };

const std::map<std::string, bebop::DraftLoss> kLosses = {{"ce", bebop::DraftLoss::kCrossEntropy},
                                                         {"kl", bebop::DraftLoss::kKl},
                                                         {"reverse_kl", bebop::DraftLoss::kReverseKl},
                                                         {"tv", bebop::DraftLoss::kTotalVariation},
                                                         {"e2e_tv", bebop::DraftLoss::kEndToEndTotalVariation},
                                                         {"lk", bebop::DraftLoss::kLk}};
const std::map<std::string, bebop::RateDecay> kDecays = {
    {"none", bebop::RateDecay::kNone}, {"linear", bebop::RateDecay::kLinear}, {"cosine", bebop::RateDecay::kCosine}};
const std::map<std::string, bebop::DType> kDTypes = {{"bfloat16", bebop::DType::kBFloat16}, {"float32", bebop::DType::kFloat32}};

std::atomic<int> stop_signal{0};
static_assert(std::atomic<int>::is_always_lock_free);  // a signal handler may write it

extern "C" void OnSignal(int number) { stop_signal.store(number); }

std::string OneLine(std::string text) {
  for (char& c : text) {
    if (c == '\n') c = ' ';
  }
  return text;
}

int Fail(const absl::Status& status, int exit_code) {
  std::fprintf(stderr, "error: %s\n", OneLine(std::string(status.message())).c_str());
  return exit_code;
}

// CLI11 wraps negative numbers around and cuts large ones.
std::string CheckUnsigned(std::string& text) {
  uint64_t number = 0;
  if (!absl::SimpleAtoi(text, &number)) return absl::StrCat(text, " is not in [0, ", std::numeric_limits<uint64_t>::max(), "]");
  text = absl::StrCat(number);
  return "";
}

template <typename T>
void AddChoice(CLI::App* app, const std::string& name, const std::map<std::string, T>& choices, T* value,
               const std::string& help) {
  std::vector<std::string> names;
  for (const auto& [key, unused] : choices) names.push_back(key);
  app->add_option_function<std::string>(
         name, [&choices, value](const std::string& key) { *value = choices.at(key); }, help)
      ->check(CLI::IsMember(names));
}

void AddFlags(CLI::App* app, bebop::TrainOptions* options) {
  app->option_defaults()->take_last();  // a script may add to a command
  app->add_option("--model", options->model, "Checkpoint directory (Hugging Face layout): the frozen target; required");
  app->add_option("--data", options->data, "JSON lines of documents, as `bebop rollouts` writes them; required");
  app->add_option("--out", options->out,
                  "Safetensors file to write: what --mtp of bebop-server and `bebop weights push` take. It may be the file of --mtp, "
                  "and none else that is read; required");
  app->add_option("--mtp", options->mtp, "Begin from the mtp.* tensors of this file or folder; default: the model's");
  app->add_flag("--init-mtp", options->init_mtp, "Begin from random weights that --seed decides");
  AddChoice(app, "--loss", kLosses, &options->loss, "ce, kl, reverse_kl, tv, e2e_tv or lk; default: e2e_tv");
  const auto number = [app](const char* name, auto* value, const char* help) {
    app->add_option(name, *value, help)->capture_default_str();
  };
  number("--num-steps-ahead", &options->num_steps_ahead, "Steps of the chain to train through, 1..8");
  number("--lr", &options->learning_rate, "Learning rate");
  number("--warmup-ratio", &options->warmup_ratio, "Share of the steps on which the rate rises to --lr");
  AddChoice(app, "--decay", kDecays, &options->decay,
            "What the rate does afterwards: none, linear or cosine (to 0); default: none");
  number("--weight-decay", &options->weight_decay, "AdamW's, of matrices");
  number("--clip-norm", &options->clip_norm, "Gradients of a larger norm are scaled down to it; 0: never");
  number("--epochs", &options->epochs, "Passes over the data");
  number("--max-steps", &options->max_steps, "Ends after so many steps; 0: all epochs");
  number("--batch-tokens", &options->batch_tokens, "Most tokens of a batch; one batch is one step");
  number("--max-seq-len", &options->max_seq_len,
         "Longer documents lose their end; 0: --batch-tokens, or the model's limit if that is less");
  app->add_option("--seed", options->seed, "Of the order of the documents, and of --init-mtp")
      ->transform(CLI::Validator(CheckUnsigned, ""))
      ->capture_default_str();
  number("--truncate-top-k", &options->truncate_top_k,
         "An experiment, not for use: losses, and all numbers of log and evaluation, over the target's K largest logits alone, "
         "so that alpha comes out too high; 0: all");
  app->add_flag("--resume", options->resume, "Go on with the run whose checkpoints are there");
  app->add_option("--checkpoints", options->checkpoints,
                  "Folder of checkpoints; default: OUT.checkpoints. It is removed when OUT is written");
  number("--checkpoint-every", &options->checkpoint_every, "Steps between two checkpoints");
  app->add_option("--eval-data", options->eval_data, "JSON lines to evaluate on, before the first step and after the last");
  number("--eval-every", &options->eval_every,
         "Steps between two evaluations, with a checkpoint before each; 0: none in between");
  number("--log-every", &options->log_every, "Steps between two lines of the log, which has their means");
  app->add_flag("--json", options->json, "The log as one JSON object a line");
  app->add_option("--device", options->device, "Where to compute: cpu, or in a build with CUDA also cuda or cuda:N")
      ->capture_default_str();
  AddChoice(app, "--dtype", kDTypes, &options->dtype,
            "Of the target's weights, as it is served: bfloat16 or float32; default: bfloat16");
  number("--threads", &options->num_threads, "Compute threads; 0: all processors");
  app->set_help_flag("-h,--help", "Print this and exit");
  app->set_version_flag("--version", "bebop-train-mtp " BEBOP_VERSION);
  app->footer(
      "SIGINT or SIGTERM saves a checkpoint after the batch that runs, of a step or an evaluation, and exits with 128 + its "
      "number; a second one ends at once.\n"
      "Exit status 0: OUT is written; 1: training failed; 2: a bad flag, model or data file.");
}

// The first signal asks for a checkpoint, the second one has its usual effect.
void HandleSignals() {
  struct sigaction action = {};
  action.sa_handler = OnSignal;
  action.sa_flags = SA_RESTART | SA_RESETHAND;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  signal(SIGXFSZ, SIG_IGN);  // a limit on file sizes is an error like a full disk
}

}  // namespace

int main(int argc, char** argv) {
  bebop::TrainOptions options;
  CLI::App app{"Trains the MTP layer of a Qwen3.5-family checkpoint against its frozen target.", "bebop-train-mtp"};
  AddFlags(&app, &options);
  // CLI11 reports by exception; this is the one place that sees them.
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    std::fputs(app.help().c_str(), stdout);
    return kExitOk;
  } catch (const CLI::CallForVersion& version) {
    std::printf("%s\n", version.what());
    return kExitOk;
  } catch (const CLI::ConversionError& error) {
    // CLI11's words: "Could not convert: --lr = abc".
    const std::string text = absl::StrReplaceAll(error.what(), {{"Could not convert: ", ""}});
    const size_t separator = text.find(" = ");
    if (separator == std::string::npos) return Fail(absl::InvalidArgumentError(text), kExitUsage);
    return Fail(absl::InvalidArgumentError(
                    absl::StrCat(text.substr(0, separator), ": expected a number, got \"", text.substr(separator + 3), "\"")),
                kExitUsage);
  } catch (const CLI::ParseError& error) {
    return Fail(absl::InvalidArgumentError(error.what()), kExitUsage);
  }

  HandleSignals();
  auto run = bebop::TrainingRun::Prepare(options);
  if (!run.ok()) return Fail(run.status(), kExitUsage);
  if (stop_signal.load() != 0) return 128 + stop_signal.load();  // there is nothing to save yet
  absl::StatusOr<bool> finished = (*run)->Train(stop_signal);
  if (finished.ok() && *finished) finished = (*run)->Finish(stop_signal);
  const absl::Status status = finished.status();
  if (status.ok() && !*finished) {
    std::fprintf(stderr, "stopped at step %lld: %s\n", static_cast<long long>((*run)->step()), (*run)->HowToGoOn(status).c_str());
    return 128 + stop_signal.load();
  }
  if (status.ok()) return kExitOk;
  return Fail(absl::Status(status.code(), absl::StrCat(status.message(), "; ", (*run)->HowToGoOn(status))), kExitFailed);
}
