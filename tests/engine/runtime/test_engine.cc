// SPDX-License-Identifier: Apache-2.0
#include "tests/engine/runtime/test_engine.h"

#include <filesystem>
#include <fstream>
#include <functional>
#include <utility>

#include <unistd.h>

#include "engine/weights/dummy_weights.h"
#include "kernels/common/check.h"

namespace bebop::test {
namespace {

constexpr char kSmallConfigJson[] = R"({
  "model_type": "qwen3_5_text", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
  "layer_types": ["linear_attention", "full_attention", "linear_attention"],
  "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "vocab_size": 97,
  "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 24,
  "linear_conv_kernel_dim": 4, "hidden_act": "silu", "attention_bias": false, "max_position_embeddings": 512,
  "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
  "mtp_num_hidden_layers": 1, "tie_word_embeddings": true, "eos_token_id": 96})";

ModelConfig ConfigOf(const SteppedEngine::Options& options) {
  ModelConfig config = SmallConfig();
  if (options.linear_head_dim > 0) config.linear_key_head_dim = config.linear_value_head_dim = options.linear_head_dim;
  return config;
}

}  // namespace

ModelConfig SmallConfig() {
  absl::StatusOr<ModelConfig> config = ParseModelConfig(kSmallConfigJson);
  BEBOP_CHECK(config.ok());
  return *std::move(config);
}

std::string WriteSmallConfigFolder() {
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("bebop-small-" + std::to_string(getpid()));
  std::filesystem::create_directories(folder);
  std::ofstream(folder / "config.json") << kSmallConfigJson;
  return folder;
}

SteppedEngine::SteppedEngine(const Options& options) : SteppedEngine(options, Backend{}) {}

SteppedEngine::SteppedEngine(const Options& options, Backend backend) : config_(ConfigOf(options)), backend_(std::move(backend)) {
  pool_ = std::make_unique<ThreadPool>(options.num_threads);
  if (backend_.make_executor == nullptr) {
    backend_.memory = MakeHostMemory();
    backend_.ops = MakeCpuOps(pool_.get());
    backend_.make_executor = [](const ModelConfig& config, const ModelExecutorOptions& executor, Model* model, ModelStateStorage* storage,
                                DeviceMemory* memory, ThreadPool* pool) -> absl::StatusOr<std::unique_ptr<Executor>> {
      return std::make_unique<ModelExecutor>(config, executor, model, storage, memory, pool);
    };
  }
  DeviceMemory* const memory = backend_.memory.get();
  auto weights = MakeDummyWeights(config_, options.dtype, options.weight_seed, *pool_, memory);
  BEBOP_CHECK(weights.ok());
  weights_ = *std::move(weights);
  ModelStateOptions state;
  state.kv_dtype = options.dtype;
  state.num_pages = options.num_pages;
  state.page_tokens = options.page_tokens;
  state.num_slots = options.max_num_seqs + 2;
  state.window = options.max_draft_tokens;
  state.input_dtype = backend_.activation_dtype;
  auto storage = ModelStateStorage::Create(config_, state, memory);
  BEBOP_CHECK(storage.ok());
  storage_ = *std::move(storage);
  auto model = Model::Create(config_, options.max_step_tokens, backend_.activation_dtype, backend_.ops.get(), memory);
  BEBOP_CHECK(model.ok());
  model_ = *std::move(model);
  model_->SetWeights(weights_.get());
  ModelExecutorOptions executor;
  executor.max_num_seqs = options.max_num_seqs;
  executor.max_step_tokens = options.max_step_tokens;
  executor.page_table_entries = 4 * options.num_pages;
  executor.max_draft_tokens = options.max_draft_tokens;
  auto made = backend_.make_executor(config_, executor, model_.get(), storage_.get(), memory, pool_.get());
  BEBOP_CHECK(made.ok());
  executor_ = *std::move(made);
  EngineCoreOptions core;
  core.scheduler.max_num_seqs = options.max_num_seqs;
  core.scheduler.max_model_len = kMaxModelLen;
  core.scheduler.lookahead_tokens = options.lookahead_tokens;
  core.scheduler.prefill_cut_tokens = options.prefill_cut_tokens;
  core.scheduler.max_step_tokens = options.max_step_tokens;
  core.scheduler.num_pages = options.num_pages;
  core.scheduler.page_tokens = options.page_tokens;
  core.scheduler.num_state_slots = state.num_slots;
  core.scheduler.score_bytes_per_token = config_.hidden_size * 4;
  core.vocab_size = config_.vocab_size;
  core.max_draft_tokens = options.max_draft_tokens;
  core.eos_token_ids = config_.eos_token_ids;
  core.token_bytes = options.token_bytes;
  core_ = std::make_unique<EngineCore>(std::move(core), &clock_, executor_.get());
}

absl::StatusOr<bool> SteppedEngine::Step() {
  clock_.now += absl::Milliseconds(1);
  return core_->Step();
}

void SteppedEngine::RunToEnd() {
  for (int step = 0; step < 100000; ++step) {
    const absl::StatusOr<bool> worked = Step();
    BEBOP_CHECK(worked.ok());
    if (!*worked) {
      BEBOP_CHECK(core_->Idle());
      BEBOP_CHECK(core_->Audit().ok());
      return;
    }
  }
  BEBOP_CHECK(false);  // does not end
}

std::map<int32_t, SampleResult> SteppedEngine::Generate(const GenerateRequest& request) {
  auto collector = std::make_shared<Collector>();
  const absl::Status status = core_->Submit(request, collector);
  BEBOP_CHECK(status.ok());
  RunToEnd();
  BEBOP_CHECK(collector->finished && collector->done.ok());
  return collector->samples;
}

ScoreResult SteppedEngine::Score(const ScoreRequest& request) {
  auto collector = std::make_shared<ScoreCollector>();
  uint64_t handle = 0;
  const absl::Status status = core_->SubmitScore(request, collector, &handle);
  BEBOP_CHECK(status.ok());
  RunToEnd();
  BEBOP_CHECK(collector->finished && collector->done.ok());
  return collector->result;
}

GenerateRequest Request(const std::string& id, std::vector<uint32_t> prompt, int32_t max_new_tokens) {
  GenerateRequest request;
  request.request_id = id;
  request.body_hash = std::hash<std::string>()(id);
  request.prompt = std::move(prompt);
  request.stopping.max_new_tokens = max_new_tokens;
  request.stopping.ignore_eos = true;
  request.sampling.seed = 11;
  request.output = {true, true, true, true, true, true};
  return request;
}

}  // namespace bebop::test
