// SPDX-License-Identifier: Apache-2.0
#include "server/server_options.h"

#include <yaml-cpp/yaml.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <functional>
#include <limits>
#include <map>
#include <type_traits>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "engine/base/status_macros.h"
#include "engine/runtime/backend.h"

#ifndef BEBOP_VERSION
#error "BEBOP_VERSION comes from CMake"
#endif

namespace bebop {
namespace {

const std::map<std::string, SpeculationMode> kModes = {{"off", SpeculationMode::kOff},
                                                       {"target_only", SpeculationMode::kTargetOnly},
                                                       {"rejection", SpeculationMode::kRejection},
                                                       {"coupled", SpeculationMode::kCoupled}};
const std::map<std::string, bool> kSwitch = {{"on", true}, {"off", false}};
const std::map<std::string, DType> kDTypes = {{"bfloat16", DType::kBFloat16}, {"float32", DType::kFloat32}};

// The engine's own bounds (engine/runtime/engine_memory.cc), checked here before a model is read.
constexpr int32_t kMaxNumSeqs = 4096;
constexpr int32_t kMaxStepTokens = 1 << 20;
constexpr int32_t kMaxQueuedRequests = 1 << 20;
// More than any machine has, and below what CLI11 cuts larger numbers to.
constexpr int64_t kMaxKvCacheBytes = 1'000'000'000'000'000'000;

// Engine options in its messages, and their flags.
constexpr auto kEngineOptionFlags = std::to_array<std::pair<absl::string_view, absl::string_view>>(
    {{"max_model_len", "--max-model-len"},
     {"max_num_seqs", "--max-num-seqs"},
     {"max_step_tokens", "--max-step-tokens"},
     {"kv_cache_bytes", "--kv-cache-bytes"},
     {"gpu_memory_utilization", "--gpu-memory-utilization"},
     {"weight_staging_bytes", "--weight-staging-bytes"},
     {"max_queued_requests", "--max-queued-requests"}});

constexpr char kCheckConfig[] = "--check-config";
constexpr char kConfig[] = "--config";

// One line for `error:`: CLI11 puts some messages on several.
std::string OneLine(absl::string_view text) { return absl::StrReplaceAll(absl::StripAsciiWhitespace(text), {{"\n", " "}}); }

// The flags, bound to one ServerOptions. CLI11 throws; its exceptions stay inside this class.
class FlagParser {
 public:
  explicit FlagParser(ServerOptions* options) : options_(*options) {
    app_.name("bebop-server");
    app_.set_help_flag("-h,--help", "Print this and exit");
    Text("--model,--model-path", &options_.engine.model_path, "Checkpoint directory (Hugging Face layout); required");
    Text("--mtp", &options_.engine.mtp_path, "Safetensors file that supplies or replaces the mtp.* tensors");
    Text("--device", &options_.engine.device, "Where to compute: cpu, or in a build with CUDA also cuda or cuda:N");
    Choice("--dtype", &dtype_, kDTypes, [this] { options_.engine.dtype = kDTypes.at(dtype_); }, "Weights and KV cache: bfloat16 or float32");
    app_.add_option("--load-format", load_format_, "auto, or dummy for seeded random weights (needs config.json only)")
        ->check(CLI::IsMember({"auto", "dummy"}))
        ->take_last();
    Number("--seed", &options_.engine.dummy_seed, "Seed of --load-format dummy");
    Text("--served-model-name", &options_.served_model_name, "Name to report; default: the model directory's");
    Text("--host", &options_.host, "Address to listen on; other than loopback needs --token-file or --insecure-no-auth");
    Number("--port", &options_.port, "Rollout port; 0 picks a free one");
    Number("--admin-port", &options_.admin_port, "Admin port; 0 picks a free one");
    Number("--http-port", &options_.http_port, "Port of probes and metrics over HTTP, which ask for no token; 0 picks a free one, -1: none");
    MetricsCompat();
    Number("--threads", &options_.engine.num_threads, "Compute threads; 0: all processors");
    Number("--max-model-len,--context-length", &options_.engine.max_model_len, "Prompt + output tokens of a sequence; 0: the model's");
    Number("--max-num-seqs,--max-running-requests", &options_.engine.max_num_seqs, "Sequences running at once; 0: for the device");
    Number("--max-step-tokens", &options_.engine.max_step_tokens, "Rows of one step (prefill budget); 0: for the device");
    Number("--kv-cache-bytes", &options_.engine.kv_cache_bytes, "Bytes of KV pages; 0: a share of free memory, on a device all that is left");
    Number("--gpu-memory-utilization,--mem-fraction-static", &options_.engine.gpu_memory_utilization,
           "Share of a device's free memory for weights, caches and buffers");
    Choice("--cuda-graphs", &cuda_graphs_, kSwitch, [this] { options_.engine.cuda_graphs = kSwitch.at(cuda_graphs_); },
           "on, or off: iterations of a device are enqueued kernel by kernel, for comparison; same tokens");
    Switch("--batch-invariant", &options_.engine.batch_invariant, "On a device too, a sequence's numbers do not depend on its batch; slower");
    Number("--max-queued-requests", &options_.engine.max_queued_requests, "Waiting requests; more are RESOURCE_EXHAUSTED");
    Number("--num-speculative-tokens", &options_.num_speculative_tokens, "Draft tokens of requests that leave it unset, 0..8");
    Choice("--speculation", &mode_, kModes, [this] { options_.speculation = kModes.at(mode_); },
           "Mode of requests that leave it unset: off, target_only, rejection or coupled; off also starts without MTP weights");
    Number("--drain-timeout", &options_.drain_timeout_s, "Seconds after SIGTERM until running work is cut short");
    Number("--max-request-seconds", &options_.max_request_s, "Longest wall time of a request");
    Text("--weights-root", &options_.weights_root, "Folder beneath which weight updates may name files; default: no updates from files");
    Number("--weight-staging-bytes", &options_.engine.weight_staging_bytes,
           "Memory an open weight update may hold, besides 16 MiB to keep track of it; 0: as much as the weights, for which a device keeps room. "
           "Less than the weights: no update fits, and no room is kept");
    Switch("--allow-synthetic-acceptance", &options_.allow_synthetic_acceptance, "Serve requests with synthetic_acceptance (not lossless)");
    Switch("--allow-unknown-fields", &options_.allow_unknown_fields, "Ignore request fields this server does not know");
    Text("--token-file", &options_.token_file, "Who may call what: lines `ROLE[,ROLE] TOKEN`, roles rollout, weights, admin");
    Switch("--insecure-no-auth", &options_.insecure_no_auth, "Listen on any address without tokens");
    app_.add_option(kConfig, config_path_, "YAML file with the flags' names as keys; environment and flags win over it")->take_last();
    app_.add_flag(kCheckConfig, check_config_, "Check the options, print them, and exit");
    app_.add_flag("--version", version_, "Print the version and exit");
    app_.footer(
        "SIGTERM or SIGINT drains and exits with 0; another one stops at once with 128 + its number.\n"
        "A bad flag, file or model exits with 2.");
  }

  // Applies `arguments` on top of what is set; options that do not occur keep their value. `source` opens an error's message.
  absl::Status Apply(std::vector<std::string> arguments, absl::string_view source) {
    std::reverse(arguments.begin(), arguments.end());  // CLI11 pops from the back
    try {
      app_.parse(arguments);
    } catch (const CLI::CallForHelp&) {
      help_ = true;
      return absl::OkStatus();
    } catch (const CLI::ParseError& error) {
      return absl::InvalidArgumentError(absl::StrCat(source, OneLine(error.what())));
    }
    for (const auto& apply : choices_) apply();
    options_.engine.load_dummy = load_format_ == "dummy";
    return absl::OkStatus();
  }

  // Long flag names without dashes, and whether they take a value.
  std::map<std::string, bool> Names() const {
    std::map<std::string, bool> names;
    for (const CLI::Option* option : app_.get_options()) {
      for (const std::string& name : option->get_lnames()) names[name] = option->get_expected_max() > 0;
    }
    return names;
  }

  std::string Help() const { return app_.help(); }
  bool help() const { return help_; }
  bool version() const { return version_; }
  bool check_config() const { return check_config_; }
  const std::string& config_path() const { return config_path_; }

 private:
  void Text(const std::string& names, std::string* value, const std::string& help) {
    app_.add_option(names, *value, help)->take_last()->check(CLI::Validator([](std::string& text) {
      return text.empty() ? std::string("needs a value") : std::string();
    }, ""));
  }
  template <typename T>
  void Number(const std::string& names, T* value, const std::string& help) {
    CLI::Option* option = app_.add_option(names, *value, help)->take_last()->capture_default_str();
    if constexpr (std::is_unsigned_v<T>) {
      // CLI11 wraps negative numbers around and cuts large ones.
      option->transform(CLI::Validator([](std::string& text) {
        uint64_t number = 0;
        if (!absl::SimpleAtoi(text, &number)) {
          return absl::StrCat(text, " is not in [0, ", std::numeric_limits<uint64_t>::max(), "]");
        }
        text = absl::StrCat(number);
        return std::string();
      }, ""));
    }
  }
  void Switch(const std::string& name, bool* value, const std::string& help) {
    app_.add_flag(name, *value, help)->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  }
  template <typename T>
  void Choice(const std::string& name, std::string* value, const std::map<std::string, T>& choices, std::function<void()> apply,
              const std::string& help) {
    std::vector<std::string> keys;
    for (const auto& [key, unused] : choices) keys.push_back(key);
    app_.add_option(name, *value, help)->take_last()->check(CLI::IsMember(keys));
    choices_.push_back(std::move(apply));
  }

  void MetricsCompat() {
    app_.add_option("--metrics-compat", metrics_compat_, "Metrics under other servers' names, too: vllm, sglang, or both with a comma")
        ->take_last()
        ->check(CLI::Validator([](std::string& text) {
          for (const absl::string_view name : absl::StrSplit(text, ',')) {
            if (name != "vllm" && name != "sglang") return absl::StrCat("'", name, "' is not vllm or sglang");
          }
          return std::string();
        }, ""));
    choices_.push_back([this] {
      options_.vllm_metrics = absl::StrContains(metrics_compat_, "vllm");
      options_.sglang_metrics = absl::StrContains(metrics_compat_, "sglang");
    });
  }

  ServerOptions& options_;
  CLI::App app_{"Serves rollouts of a Qwen3.5-family model over gRPC."};
  std::string dtype_ = "bfloat16", mode_ = "rejection", load_format_ = "auto", cuda_graphs_ = "on", config_path_, metrics_compat_;
  std::vector<std::function<void()>> choices_;
  bool check_config_ = false, version_ = false, help_ = false;
};

// A YAML file or environment as flags; keys that are no flag are an error for the file.
absl::StatusOr<std::vector<std::string>> ReadConfigFile(const std::string& path, const std::map<std::string, bool>& names) {
  YAML::Node root;
  try {
    root = YAML::LoadFile(path);
  } catch (const YAML::BadFile&) {
    return absl::InvalidArgumentError(absl::StrCat("--config: cannot read ", path));
  } catch (const YAML::Exception& error) {
    return absl::InvalidArgumentError(absl::StrCat("--config: ", path, ": ", OneLine(error.what())));
  }
  std::vector<std::string> arguments;
  if (root.IsNull()) return arguments;
  if (!root.IsMap()) return absl::InvalidArgumentError(absl::StrCat("--config: ", path, ": not a map of option: value"));
  for (const auto& entry : root) {
    if (!entry.first.IsScalar() || !entry.second.IsScalar()) {
      return absl::InvalidArgumentError(absl::StrCat("--config: ", path, ": line ", entry.first.Mark().line + 1, ": not `option: value`"));
    }
    const std::string name = absl::StrReplaceAll(entry.first.Scalar(), {{"_", "-"}});
    const bool is_known = names.count(name) > 0 && name != "config" && name != "help" && name != "version" && name != "check-config";
    if (!is_known) return absl::InvalidArgumentError(absl::StrCat("--config: ", path, ": unknown option ", entry.first.Scalar()));
    arguments.push_back(absl::StrCat("--", name, "=", entry.second.Scalar()));
  }
  return arguments;
}

// Written so that NaN is out of every range. A range up to kAny<T> has only a lower limit.
template <typename T>
constexpr T kAny = std::numeric_limits<T>::max();

template <typename T>
absl::Status CheckRange(const char* flag, T value, std::common_type_t<T> low, std::common_type_t<T> high) {
  if (value >= low && value <= high) return absl::OkStatus();
  const std::string limit = high == kAny<T> ? absl::StrCat(">= ", low) : absl::StrCat("in [", low, ", ", high, "]");
  return absl::InvalidArgumentError(absl::StrCat(flag, ": ", value, " is not ", limit));
}

}  // namespace

bool IsLoopback(const std::string& host) {
  return host == "localhost" || host == "::1" || (absl::StartsWith(host, "127.") && host.find_first_not_of("0123456789.") == std::string::npos);
}

absl::Status Validate(const ServerOptions& options) {
  const EngineOptions& engine = options.engine;
  if (engine.model_path.empty()) return absl::InvalidArgumentError("--model: missing; give the checkpoint directory");
  if (engine.load_dummy && !engine.mtp_path.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--mtp: ", engine.mtp_path, " would not be read with --load-format dummy, which makes all weights up; drop one of the two"));
  }
  if (const absl::Status status = CheckDeviceName(engine.device); !status.ok()) return NameFlags(status);
  BEBOP_RETURN_IF_ERROR(CheckRange("--port", options.port, 0, 65535));
  BEBOP_RETURN_IF_ERROR(CheckRange("--admin-port", options.admin_port, 0, 65535));
  if (options.port != 0 && options.port == options.admin_port) {
    return absl::InvalidArgumentError(absl::StrCat("--admin-port: ", options.admin_port, " is also --port; they are two listeners"));
  }
  BEBOP_RETURN_IF_ERROR(CheckRange("--http-port", options.http_port, -1, 65535));
  if (options.http_port > 0 && (options.http_port == options.port || options.http_port == options.admin_port)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--http-port: ", options.http_port, " is also ", options.http_port == options.port ? "--port" : "--admin-port"));
  }
  BEBOP_RETURN_IF_ERROR(CheckRange("--threads", engine.num_threads, 0, 1024));
  if (engine.max_model_len != 0) BEBOP_RETURN_IF_ERROR(CheckRange("--max-model-len", engine.max_model_len, 2, kAny<int32_t>));
  BEBOP_RETURN_IF_ERROR(CheckRange("--max-num-seqs", engine.max_num_seqs, 0, kMaxNumSeqs));
  BEBOP_RETURN_IF_ERROR(CheckRange("--max-step-tokens", engine.max_step_tokens, 0, kMaxStepTokens));
  BEBOP_RETURN_IF_ERROR(CheckRange("--kv-cache-bytes", engine.kv_cache_bytes, 0, kMaxKvCacheBytes));
  // The engine says (0, 1], too; here it is said before a model is read.
  if (!(engine.gpu_memory_utilization > 0.0 && engine.gpu_memory_utilization <= 1.0)) {
    return absl::InvalidArgumentError(absl::StrCat("--gpu-memory-utilization: ", engine.gpu_memory_utilization, " is not in (0, 1]"));
  }
  BEBOP_RETURN_IF_ERROR(CheckRange("--max-queued-requests", engine.max_queued_requests, 1, kMaxQueuedRequests));
  BEBOP_RETURN_IF_ERROR(CheckRange("--num-speculative-tokens", options.num_speculative_tokens, 0, kMaxDraftTokens));
  BEBOP_RETURN_IF_ERROR(CheckRange("--drain-timeout", options.drain_timeout_s, 0, 86400));
  BEBOP_RETURN_IF_ERROR(CheckRange("--max-request-seconds", options.max_request_s, 1, 30 * 86400));
  BEBOP_RETURN_IF_ERROR(CheckRange("--weight-staging-bytes", engine.weight_staging_bytes, 0, kMaxKvCacheBytes));
  if (options.served_model_name.size() > 256) return absl::InvalidArgumentError("--served-model-name: longer than 256 bytes");
  if (!options.token_file.empty() && options.insecure_no_auth) {
    return absl::InvalidArgumentError(absl::StrCat("--insecure-no-auth: --token-file: ", options.token_file, " is given, too; drop one of the two"));
  }
  if (!IsLoopback(options.host) && options.token_file.empty() && !options.insecure_no_auth) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--host: ", options.host, " is not a loopback address: give --token-file, or --insecure-no-auth to let everybody in who reaches it"));
  }
  return absl::OkStatus();
}

absl::Status NameFlags(const absl::Status& status) {
  const absl::string_view message = status.message();
  if (absl::StartsWith(message, "device:")) return absl::Status(status.code(), absl::StrCat("--", message));
  const bool is_option = std::any_of(std::begin(kEngineOptionFlags), std::end(kEngineOptionFlags),
                                     [message](const auto& entry) { return absl::StartsWith(message, absl::StrCat(entry.first, ":")); });
  return is_option ? absl::Status(status.code(), absl::StrReplaceAll(message, kEngineOptionFlags)) : status;
}

std::string ToYaml(const ServerOptions& options) {
  const auto name_of = [](const auto& choices, auto value) {
    for (const auto& [name, choice] : choices) {
      if (choice == value) return name;
    }
    return std::string();
  };
  const EngineOptions& engine = options.engine;
  YAML::Emitter out;
  out << YAML::BeginMap;
  const auto add = [&out](const char* key, const auto& value) { out << YAML::Key << key << YAML::Value << value; };
  add("model", engine.model_path);
  if (!engine.mtp_path.empty()) add("mtp", engine.mtp_path);
  add("device", engine.device);
  add("dtype", name_of(kDTypes, engine.dtype));
  add("load-format", engine.load_dummy ? "dummy" : "auto");
  add("seed", engine.dummy_seed);
  if (!options.served_model_name.empty()) add("served-model-name", options.served_model_name);
  add("host", options.host);
  add("port", options.port);
  add("admin-port", options.admin_port);
  add("http-port", options.http_port);
  if (options.vllm_metrics || options.sglang_metrics) {
    add("metrics-compat", absl::StrCat(options.vllm_metrics ? "vllm" : "", options.vllm_metrics && options.sglang_metrics ? "," : "",
                                       options.sglang_metrics ? "sglang" : ""));
  }
  add("threads", engine.num_threads);
  add("max-model-len", engine.max_model_len);
  add("max-num-seqs", engine.max_num_seqs);
  add("max-step-tokens", engine.max_step_tokens);
  add("kv-cache-bytes", engine.kv_cache_bytes);
  add("gpu-memory-utilization", engine.gpu_memory_utilization);
  add("cuda-graphs", engine.cuda_graphs ? "on" : "off");
  add("batch-invariant", engine.batch_invariant);
  add("max-queued-requests", engine.max_queued_requests);
  add("num-speculative-tokens", options.num_speculative_tokens);
  add("speculation", name_of(kModes, options.speculation));
  add("drain-timeout", options.drain_timeout_s);
  add("max-request-seconds", options.max_request_s);
  if (!options.weights_root.empty()) add("weights-root", options.weights_root);
  add("weight-staging-bytes", engine.weight_staging_bytes);
  add("allow-synthetic-acceptance", options.allow_synthetic_acceptance);
  add("allow-unknown-fields", options.allow_unknown_fields);
  if (!options.token_file.empty()) add("token-file", options.token_file);
  add("insecure-no-auth", options.insecure_no_auth);
  out << YAML::EndMap;
  return absl::StrCat(out.c_str(), "\n");
}

absl::StatusOr<ServerCommand> ParseServerCommand(const std::vector<std::string>& arguments,
                                                 const std::vector<std::pair<std::string, std::string>>& environment) {
  ServerCommand command;
  // A first pass over the flags alone finds --help, --version and --config, and every error in them.
  ServerOptions unused;
  FlagParser first(&unused);
  BEBOP_RETURN_IF_ERROR(first.Apply(arguments, ""));
  if (first.help() || first.version()) {
    command.action = ServerAction::kPrintAndExit;
    command.text = first.help() ? first.Help() : std::string("bebop-server " BEBOP_VERSION "\n");
    return command;
  }
  FlagParser flags(&command.options);
  const std::map<std::string, bool> names = flags.Names();
  std::string config_path = first.config_path();
  for (const auto& [name, value] : environment) {
    if (name == "BEBOP_CONFIG" && config_path.empty()) config_path = value;
  }
  if (!config_path.empty()) {
    BEBOP_ASSIGN_OR_RETURN(const std::vector<std::string> lines, ReadConfigFile(config_path, names));
    BEBOP_RETURN_IF_ERROR(flags.Apply(lines, absl::StrCat("--config: ", config_path, ": ")));
  }
  for (const auto& [name, value] : environment) {
    if (!absl::StartsWith(name, "BEBOP_")) continue;
    const std::string flag = absl::StrReplaceAll(absl::AsciiStrToLower(absl::StripPrefix(name, "BEBOP_")), {{"_", "-"}});
    if (names.count(flag) == 0 || flag == "config" || flag == "help" || flag == "version" || flag == "check-config") continue;
    BEBOP_RETURN_IF_ERROR(flags.Apply({absl::StrCat("--", flag, "=", value)}, absl::StrCat(name, ": ")));
  }
  BEBOP_RETURN_IF_ERROR(flags.Apply(arguments, ""));
  command.options.engine.needs_mtp = command.options.speculation != SpeculationMode::kOff;
  BEBOP_RETURN_IF_ERROR(Validate(command.options));
  if (flags.check_config()) command.action = ServerAction::kCheckConfig;
  return command;
}

}  // namespace bebop
