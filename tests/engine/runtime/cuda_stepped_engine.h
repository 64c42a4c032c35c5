// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "engine/model/ops.h"
#include "engine/runtime/cuda_executor.h"
#include "kernels/common/cuda_stream.h"
#include "tests/engine/runtime/test_engine.h"

// What tests of the device's executor share.
namespace bebop::test {

// Of log-probabilities, between two orders of float32 addition in the small model.
inline constexpr float kTolerance = 2e-4f;

inline std::vector<uint32_t> Prompt(int32_t length, uint32_t start = 3) {
  std::vector<uint32_t> prompt(static_cast<size_t>(length));
  for (int32_t i = 0; i < length; ++i) prompt[static_cast<size_t>(i)] = (start + 7 * i * i + 5 * i) % 96;
  return prompt;
}

inline GenerateRequest With(GenerateRequest request, SpeculationMode mode, int32_t num_draft_tokens) {
  request.speculation.mode = mode;
  request.speculation.num_draft_tokens = num_draft_tokens;
  return request;
}

struct DeviceOptions : SteppedEngine::Options {
  bool graphs = true;
  int32_t shortest_class = 1024;
  bool batch_invariant = false;
  // Goes around the executor, which runs in these options, model, storage and memory.
  std::function<std::unique_ptr<Executor>(std::unique_ptr<Executor>, const ModelConfig&, const ModelExecutorOptions&, ModelStateStorage*,
                                          DeviceMemory*)>
      wrap;
};

// An engine on the device, with the stream it runs on.
class DeviceEngine {
 public:
  explicit DeviceEngine(DeviceOptions options = DeviceOptions()) {
    if (options.lookahead_tokens == 0) options.lookahead_tokens = CudaLookaheadTokens(options.max_draft_tokens);
    if (options.lookahead_tokens < 0) options.lookahead_tokens = 0;
    stream_ = std::make_unique<cuda::Stream>(cuda::StreamOptions{.batch_invariant = options.batch_invariant, .workspace_bytes = 64 << 20});
    SteppedEngine::Backend backend;
    backend.memory = MakeCudaMemory(stream_.get());
    backend.ops = MakeCudaOps(stream_.get());
    backend.activation_dtype = options.dtype;
    backend.make_executor = [this, options](const ModelConfig& config, const ModelExecutorOptions& executor, Model* model,
                                            ModelStateStorage* storage, DeviceMemory* memory,
                                            ThreadPool* pool) -> absl::StatusOr<std::unique_ptr<Executor>> {
      CudaExecutorOptions cuda;
      static_cast<ModelExecutorOptions&>(cuda) = executor;
      cuda.page_tokens = options.page_tokens;
      cuda.max_model_len = kMaxModelLen;
      cuda.graphs = options.graphs;
      cuda.shortest_class = options.shortest_class;
      cuda.pool = pool;
      auto made = MakeCudaExecutor(config, cuda, model, storage, memory, stream_.get());
      if (!made.ok() || options.wrap == nullptr) return made;
      return options.wrap(*std::move(made), config, executor, storage, memory);
    };
    engine_ = std::make_unique<SteppedEngine>(options, std::move(backend));
  }
  SteppedEngine* operator->() { return engine_.get(); }
  SteppedEngine& operator*() { return *engine_; }
  cuda::Stream& stream() { return *stream_; }

 private:
  std::unique_ptr<cuda::Stream> stream_;
  std::unique_ptr<SteppedEngine> engine_;
};

// A reader that can be full.
class Reader final : public GenerateObserver {
 public:
  void OnSample(const std::shared_ptr<const SampleResult>& sample) override { samples[sample->sample_index] = *sample; }
  void OnDone(const absl::Status& status) override {
    done = status;
    finished = true;
  }
  bool HasRoom() const override { return room; }
  std::map<int32_t, SampleResult> samples;
  absl::Status done;
  bool finished = false, room = true;
};

class CudaEngineTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
      GTEST_SKIP() << "no CUDA device: " << (error != cudaSuccess ? cudaGetErrorString(error) : "none found");
    }
  }
};

}  // namespace bebop::test
