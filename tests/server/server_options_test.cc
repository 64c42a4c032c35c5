// SPDX-License-Identifier: Apache-2.0
#include "server/server_options.h"

#include <gtest/gtest.h>

#include <fstream>
#include <string>
#include <tuple>
#include <vector>

namespace bebop {
namespace {

using Environment = std::vector<std::pair<std::string, std::string>>;

std::string WriteFile(const std::string& name, const std::string& text) {
  const std::string path = ::testing::TempDir() + "/" + name;
  std::ofstream(path) << text;
  return path;
}

TEST(ServerOptions, Defaults) {
  const auto command = ParseServerCommand({"--model", "dir"}, {});
  ASSERT_TRUE(command.ok()) << command.status();
  const ServerOptions& options = command->options;
  EXPECT_EQ(command->action, ServerAction::kServe);
  EXPECT_EQ(options.engine.model_path, "dir");
  EXPECT_EQ(options.engine.dtype, DType::kBFloat16);
  EXPECT_FALSE(options.engine.load_dummy);
  EXPECT_TRUE(options.engine.needs_mtp);
  EXPECT_EQ(options.host, "127.0.0.1");
  EXPECT_EQ(options.port, 50051);
  EXPECT_EQ(options.admin_port, 50052);
  EXPECT_EQ(options.speculation, SpeculationMode::kRejection);
  EXPECT_EQ(options.num_speculative_tokens, 3);
  EXPECT_FALSE(options.allow_synthetic_acceptance);
  EXPECT_FALSE(options.insecure_no_auth);
  EXPECT_EQ(options.engine.device, "cpu");
  EXPECT_EQ(options.engine.gpu_memory_utilization, 0.9);
  EXPECT_TRUE(options.engine.cuda_graphs);
  EXPECT_FALSE(options.engine.batch_invariant);
}

TEST(ServerOptions, MetricsUnderOtherNames) {
  for (const auto& [text, vllm, sglang] : {std::tuple("vllm", true, false), std::tuple("sglang", false, true), std::tuple("sglang,vllm", true, true)}) {
    const auto command = ParseServerCommand({"--model", "m", "--http-port", "0"}, {{"BEBOP_METRICS_COMPAT", text}});
    ASSERT_TRUE(command.ok()) << command.status();
    EXPECT_EQ(command->options.vllm_metrics, vllm) << text;
    EXPECT_EQ(command->options.sglang_metrics, sglang) << text;
    EXPECT_EQ(command->options.http_port, 0);
  }
}

TEST(ServerOptions, BothSpellings) {
  const auto command = ParseServerCommand({"--model-path=dir", "--context-length", "512", "--max-running-requests=9"}, {});
  ASSERT_TRUE(command.ok()) << command.status();
  EXPECT_EQ(command->options.engine.model_path, "dir");
  EXPECT_EQ(command->options.engine.max_model_len, 512);
  EXPECT_EQ(command->options.engine.max_num_seqs, 9);
}

TEST(ServerOptions, EveryFlag) {
  const auto command = ParseServerCommand(
      {"--model", "m", "--mtp", "x.safetensors", "--device", "cpu", "--dtype", "float32", "--load-format", "auto", "--seed", "18446744073709551615",
       "--served-model-name", "name", "--host", "0.0.0.0", "--port", "1", "--admin-port", "2", "--threads", "3", "--max-model-len", "4",
       "--max-num-seqs", "5", "--max-step-tokens", "6", "--kv-cache-bytes", "7000000000", "--max-queued-requests", "8", "--num-speculative-tokens",
       "0", "--speculation", "off", "--drain-timeout", "1.5", "--max-request-seconds", "60", "--allow-synthetic-acceptance",
       "--allow-unknown-fields", "--insecure-no-auth", "--gpu-memory-utilization", "0.5", "--cuda-graphs", "off", "--batch-invariant", "--check-config"},
      {});
  ASSERT_TRUE(command.ok()) << command.status();
  const ServerOptions& options = command->options;
  EXPECT_EQ(command->action, ServerAction::kCheckConfig);
  EXPECT_EQ(options.engine.mtp_path, "x.safetensors");
  EXPECT_EQ(options.engine.device, "cpu");
  EXPECT_EQ(options.engine.dtype, DType::kFloat32);
  EXPECT_EQ(options.engine.dummy_seed, UINT64_MAX);
  EXPECT_EQ(options.served_model_name, "name");
  EXPECT_EQ(options.host, "0.0.0.0");
  EXPECT_EQ(options.port, 1);
  EXPECT_EQ(options.admin_port, 2);
  EXPECT_EQ(options.engine.num_threads, 3);
  EXPECT_EQ(options.engine.max_model_len, 4);
  EXPECT_EQ(options.engine.max_num_seqs, 5);
  EXPECT_EQ(options.engine.max_step_tokens, 6);
  EXPECT_EQ(options.engine.kv_cache_bytes, 7000000000);
  EXPECT_EQ(options.engine.max_queued_requests, 8);
  EXPECT_EQ(options.num_speculative_tokens, 0);
  EXPECT_EQ(options.speculation, SpeculationMode::kOff);
  EXPECT_FALSE(options.engine.needs_mtp);
  EXPECT_EQ(options.drain_timeout_s, 1.5);
  EXPECT_EQ(options.max_request_s, 60.0);
  EXPECT_TRUE(options.allow_synthetic_acceptance);
  EXPECT_TRUE(options.allow_unknown_fields);
  EXPECT_TRUE(options.insecure_no_auth);
  EXPECT_EQ(options.engine.gpu_memory_utilization, 0.5);
  EXPECT_FALSE(options.engine.cuda_graphs);
  EXPECT_TRUE(options.engine.batch_invariant);

  // The resolved options, written and read back, say the same.
  const std::string path = WriteFile("resolved.yaml", ToYaml(options));
  const auto again = ParseServerCommand({"--config", path}, {});
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(ToYaml(again->options), ToYaml(options));
}

TEST(ServerOptions, DummyWeights) {
  const auto command = ParseServerCommand({"--model", "m", "--load-format", "dummy", "--seed", "010"}, {});
  ASSERT_TRUE(command.ok()) << command.status();
  EXPECT_TRUE(command->options.engine.load_dummy);
  EXPECT_EQ(command->options.engine.dummy_seed, 10u);  // decimal
  EXPECT_NE(ToYaml(command->options).find("load-format: dummy"), std::string::npos);
}

TEST(ServerOptions, EngineErrorsNameFlags) {
  const absl::Status status = NameFlags(absl::ResourceExhaustedError("kv_cache_bytes: 5 bytes are few: lower max_model_len or max_num_seqs"));
  EXPECT_EQ(status, absl::ResourceExhaustedError("--kv-cache-bytes: 5 bytes are few: lower --max-model-len or --max-num-seqs"));
  EXPECT_EQ(NameFlags(absl::InvalidArgumentError("max_model_len: 100000 is outside [0, 2048]")).message(),
            "--max-model-len: 100000 is outside [0, 2048]");
  EXPECT_EQ(NameFlags(absl::InvalidArgumentError("device: cuda:9 is not in this machine")).message(), "--device: cuda:9 is not in this machine");
  EXPECT_EQ(NameFlags(absl::InternalError("device error: no kernel image")).message(), "device error: no kernel image");
  const absl::Status other = absl::InvalidArgumentError("m/max_model_len: 3: no such file");
  EXPECT_EQ(NameFlags(other), other);
}

TEST(ServerOptions, FileThenEnvironmentThenFlags) {
  const std::string path = WriteFile("layers.yaml", "model: from_file\nmax_num_seqs: 1\nmax-model-len: 100\nport: 11\nallow-unknown-fields: true\n");
  const Environment environment = {{"BEBOP_MAX_MODEL_LEN", "200"}, {"BEBOP_PORT", "22"}, {"BEBOP_SERVER", "ignored:1"}, {"HOME", "/x"}};
  const auto command = ParseServerCommand({"--config", path, "--port", "33"}, environment);
  ASSERT_TRUE(command.ok()) << command.status();
  EXPECT_EQ(command->options.engine.model_path, "from_file");
  EXPECT_EQ(command->options.engine.max_num_seqs, 1);
  EXPECT_EQ(command->options.engine.max_model_len, 200);
  EXPECT_EQ(command->options.port, 33);
  EXPECT_TRUE(command->options.allow_unknown_fields);
  const auto by_environment = ParseServerCommand({}, {{"BEBOP_CONFIG", path}});
  ASSERT_TRUE(by_environment.ok());
  EXPECT_EQ(by_environment->options.port, 11);
}

TEST(ServerOptions, ErrorsNameFlagValueAndLimit) {
  struct Case {
    std::vector<std::string> arguments;
    Environment environment;
    std::vector<std::string> words;  // that the message must hold
  };
  const std::string unknown_key = WriteFile("unknown.yaml", "model: m\nprot: 1\n");
  const std::string bad_value = WriteFile("bad.yaml", "model: m\nport: many\n");
  const std::string no_map = WriteFile("list.yaml", "- a\n- b\n");
  const std::string broken = WriteFile("broken.yaml", "a: [1,\n");
  const std::vector<Case> cases = {
      {{}, {}, {"--model"}},
      {{"--model", "m", "--prot", "1"}, {}, {"--prot"}},
      {{"--model", "m", "stray"}, {}, {"stray"}},
      {{"--model", "m", "--port", "x"}, {}, {"--port", "x"}},
      {{"--model", "m", "--port"}, {}, {"--port"}},
      {{"--model", "m", "--port", "65536"}, {}, {"--port", "65536", "65535"}},
      {{"--model", "m", "--port", "-1"}, {}, {"--port", "-1"}},
      {{"--model", "m", "--admin-port", "99999999999"}, {}, {"--admin-port", "99999999999"}},
      {{"--model", "m", "--port", "5", "--admin-port", "5"}, {}, {"--port", "--admin-port", "5"}},
      {{"--model", "m", "--device", "tpu"}, {}, {"--device", "tpu", "cpu"}},
      {{"--model", "m", "--gpu-memory-utilization", "0"}, {}, {"--gpu-memory-utilization", "0", "(0, 1]"}},
      {{"--model", "m", "--mem-fraction-static", "1.5"}, {}, {"--gpu-memory-utilization", "1.5", "(0, 1]"}},
      {{"--model", "m", "--gpu-memory-utilization", "nan"}, {}, {"--gpu-memory-utilization", "nan", "(0, 1]"}},
      {{"--model", "m", "--cuda-graphs", "maybe"}, {}, {"--cuda-graphs", "maybe", "on", "off"}},
      {{"--model", "m", "--dtype", "float16"}, {}, {"--dtype", "float16", "bfloat16", "float32"}},
      {{"--model", "m", "--load-format", "gguf"}, {}, {"--load-format", "gguf", "dummy"}},
      {{"--model", "m", "--speculation", "eagle"}, {}, {"--speculation", "eagle", "coupled"}},
      {{"--model", "m", "--num-speculative-tokens", "9"}, {}, {"--num-speculative-tokens", "9", "8"}},
      {{"--model", "m", "--num-speculative-tokens", "-1"}, {}, {"--num-speculative-tokens", "-1"}},
      {{"--model", "m", "--threads", "-1"}, {}, {"--threads", "-1"}},
      {{"--model", "m", "--max-model-len", "1"}, {}, {"--max-model-len", "1", "2"}},
      {{"--model", "m", "--max-num-seqs", "-5"}, {}, {"--max-num-seqs", "-5"}},
      {{"--model", "m", "--max-num-seqs", "4097"}, {}, {"--max-num-seqs", "4097", "4096"}},
      {{"--model", "m", "--max-step-tokens", "-5"}, {}, {"--max-step-tokens", "-5"}},
      {{"--model", "m", "--max-step-tokens", "1048577"}, {}, {"--max-step-tokens", "1048577", "1048576"}},
      {{"--model", "m", "--kv-cache-bytes", "-5"}, {}, {"--kv-cache-bytes", "-5"}},
      {{"--model", "m", "--kv-cache-bytes", "99999999999999999999"}, {}, {"--kv-cache-bytes", "1000000000000000000"}},
      {{"--model", "m", "--max-queued-requests", "0"}, {}, {"--max-queued-requests", "0"}},
      {{"--model", "m", "--max-queued-requests", "1048577"}, {}, {"--max-queued-requests", "1048577", "1048576"}},
      {{"--model", "m", "--seed", "-1"}, {}, {"--seed", "-1", "18446744073709551615"}},
      {{"--model", "m", "--seed", "18446744073709551616"}, {}, {"--seed", "18446744073709551616", "18446744073709551615"}},
      {{"--model", "m", "--seed", "1.5"}, {}, {"--seed", "1.5"}},
      {{"--model", "m"}, {{"BEBOP_SEED", "-1"}}, {"BEBOP_SEED", "-1"}},
      {{"--model", "m", "--load-format", "dummy", "--mtp", "x.safetensors"}, {}, {"--mtp", "x.safetensors", "--load-format dummy"}},
      {{"--model", "m", "--drain-timeout", "-1"}, {}, {"--drain-timeout", "-1"}},
      {{"--model", "m", "--drain-timeout", "nan"}, {}, {"--drain-timeout", "nan"}},
      {{"--model", "m", "--max-request-seconds", "0"}, {}, {"--max-request-seconds", "0"}},
      {{"--model", "m", "--host", "0.0.0.0"}, {}, {"--host", "0.0.0.0", "--token-file", "--insecure-no-auth"}},
      {{"--model", "m", "--token-file", "t", "--insecure-no-auth"}, {}, {"--token-file", "t", "--insecure-no-auth"}},
      {{"--model", "m", "--host", "10.0.0.1"}, {}, {"10.0.0.1"}},
      {{"--model", "m", "--http-port", "-2"}, {}, {"--http-port", "-2", "65535"}},
      {{"--model", "m", "--http-port", "50052"}, {}, {"--http-port", "50052", "--admin-port"}},
      {{"--model", "m", "--metrics-compat", "vllm,tgi"}, {}, {"--metrics-compat", "tgi", "sglang"}},
      {{"--model", "m", "--host", "127.evil.example"}, {}, {"127.evil.example"}},
      {{"--model", "m", "--host", "::"}, {}, {"--host"}},
      {{"--model", "m"}, {{"BEBOP_PORT", "many"}}, {"BEBOP_PORT", "many"}},
      {{"--config", unknown_key}, {}, {"unknown.yaml", "prot"}},
      {{"--config", bad_value}, {}, {"bad.yaml", "port", "many"}},
      {{"--config", no_map}, {}, {"list.yaml"}},
      {{"--config", broken}, {}, {"broken.yaml"}},
      {{"--config", "/nowhere/at/all.yaml"}, {}, {"/nowhere/at/all.yaml"}},
  };
  for (const Case& c : cases) {
    const auto command = ParseServerCommand(c.arguments, c.environment);
    const std::string shown = c.words.front();
    ASSERT_FALSE(command.ok()) << shown;
    EXPECT_EQ(command.status().code(), absl::StatusCode::kInvalidArgument) << shown;
    const std::string message(command.status().message());
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    for (const std::string& word : c.words) EXPECT_NE(message.find(word), std::string::npos) << "`" << message << "` lacks " << word;
  }
}

TEST(ServerOptions, LoopbackNeedsNoOverride) {
  for (const char* host : {"127.0.0.1", "127.1.2.3", "localhost", "::1"}) {
    EXPECT_TRUE(ParseServerCommand({"--model", "m", "--host", host}, {}).ok()) << host;
    EXPECT_TRUE(IsLoopback(host));
  }
  EXPECT_TRUE(ParseServerCommand({"--model", "m", "--host", "0.0.0.0", "--insecure-no-auth"}, {}).ok());
  const auto with_tokens = ParseServerCommand({"--model", "m", "--host", "0.0.0.0", "--token-file", "tokens"}, {});
  ASSERT_TRUE(with_tokens.ok()) << with_tokens.status();
  EXPECT_EQ(with_tokens->options.token_file, "tokens");
  EXPECT_NE(ToYaml(with_tokens->options).find("token-file: tokens"), std::string::npos);
  for (const char* host : {"0.0.0.0", "::", "128.0.0.1", "localhost.example", "127.0.0.1.example"}) EXPECT_FALSE(IsLoopback(host)) << host;
}

TEST(ServerOptions, HelpAndVersionNeedNothingElse) {
  for (const char* flag : {"--help", "-h", "--version"}) {
    const auto command = ParseServerCommand({flag}, {});
    ASSERT_TRUE(command.ok()) << command.status();
    EXPECT_EQ(command->action, ServerAction::kPrintAndExit);
    EXPECT_FALSE(command->text.empty());
  }
}

}  // namespace
}  // namespace bebop
