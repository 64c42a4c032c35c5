// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "engine/base/clock.h"
#include "engine/config/model_config.h"
#include "engine/memory/model_state.h"
#include "engine/model/model.h"
#include "engine/runtime/model_executor.h"
#include "engine/schedule/engine_core.h"
#include "engine/weights/model_weights.h"
#include "kernels/common/thread_pool.h"

namespace bebop::test {

// Of the engines below.
inline constexpr int32_t kMaxModelLen = 256;

// A small hybrid model: 2 linear and 1 full layer, GQA 2, grouped value heads, key width != value width, V = 97, one MTP layer.
ModelConfig SmallConfig();

// Writes a checkpoint folder with SmallConfig's config.json (weights by load_dummy). Returns its path.
std::string WriteSmallConfigFolder();

// Collects what a request is told. `finished` after OnDone.
class Collector final : public GenerateObserver {
 public:
  void OnSample(const std::shared_ptr<const SampleResult>& sample) override { samples[sample->sample_index] = *sample; }
  void OnDone(const absl::Status& status) override {
    done = status;
    finished = true;
  }
  std::map<int32_t, SampleResult> samples;
  absl::Status done;
  bool finished = false;
};

class ScoreCollector final : public ScoreObserver {
 public:
  void OnScore(const absl::Status& status, ScoreResult score) override {
    done = status;
    result = std::move(score);
    finished = true;
  }
  ScoreResult result;
  absl::Status done;
  bool finished = false;
};

// The whole engine without its thread: dummy weights, real kernels, EngineCore over an executor, stepped by hand.
class SteppedEngine {
 public:
  struct Options {
    DType dtype = DType::kFloat32;
    int32_t num_threads = 2;
    int32_t max_num_seqs = 8;
    int32_t max_step_tokens = 96;
    int32_t num_pages = 256;
    int32_t page_tokens = 4;
    int32_t max_draft_tokens = kMaxDraftTokens;
    uint64_t weight_seed = 1;
    int32_t lookahead_tokens = 0;
    int32_t prefill_cut_tokens = 1;
    int32_t linear_head_dim = 0;  // of keys and values, in place of SmallConfig's
    std::function<std::string_view(uint32_t)> token_bytes;
  };
  // A backend other than the CPU.
  struct Backend {
    std::unique_ptr<DeviceMemory> memory;
    std::unique_ptr<Ops> ops;
    DType activation_dtype = DType::kFloat32;
    std::function<absl::StatusOr<std::unique_ptr<Executor>>(const ModelConfig&, const ModelExecutorOptions&, Model*, ModelStateStorage*,
                                                            DeviceMemory*, ThreadPool*)>
        make_executor;
  };
  explicit SteppedEngine(const Options& options);  // on the CPU
  SteppedEngine(const Options& options, Backend backend);

  EngineCore& core() { return *core_; }
  ModelWeights& weights() { return *weights_; }
  const ModelStateStorage& storage() { return *storage_; }
  DeviceMemory& memory() { return *backend_.memory; }
  // One step; false when there was nothing to do.
  absl::StatusOr<bool> Step();
  // Steps until nothing is left to do. Fails the test after far too many steps.
  void RunToEnd();
  // Submits, runs to the end, returns the samples by index.
  std::map<int32_t, SampleResult> Generate(const GenerateRequest& request);
  ScoreResult Score(const ScoreRequest& request);

 private:
  class ManualClock final : public Clock {
   public:
    absl::Time Now() const override { return now; }
    absl::Time now = absl::UnixEpoch();
  };
  const ModelConfig config_;
  ManualClock clock_;
  std::unique_ptr<ThreadPool> pool_;
  Backend backend_;
  std::unique_ptr<ModelWeights> weights_;
  std::unique_ptr<ModelStateStorage> storage_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<Executor> executor_;
  std::unique_ptr<EngineCore> core_;
};

// A request with everything reported. `id` must be new to the engine.
GenerateRequest Request(const std::string& id, std::vector<uint32_t> prompt, int32_t max_new_tokens);

}  // namespace bebop::test
