// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/runtime/engine_interface.h"
#include "engine/schedule/step_plan.h"
#include "kernels/common/dtype.h"

namespace bebop {

// How to build an engine. Everything is validated by Engine::Create, which names the offending field.
struct EngineOptions {
  std::string model_path;      // checkpoint directory
  std::string mtp_path;        // optional safetensors with the mtp.* tensors
  bool load_dummy = false;     // seeded random weights instead of the checkpoint's (needs config.json only)
  uint64_t dummy_seed = 0;
  DType dtype = DType::kBFloat16;
  std::string device = "cpu";  // or, in a build with CUDA, "cuda" or "cuda:N" (in the emulated build "emulated")
  int32_t num_threads = 0;     // 0: all processors
  int32_t max_model_len = 0;   // 0: the model's, capped at 32768
  int32_t max_num_seqs = 0;    // 0: a default for the device
  int32_t max_step_tokens = 0; // 0: a default for the device
  int32_t max_draft_tokens = kMaxDraftTokens;  // most drafts a request may ask for (sizes windows and buffers)
  bool needs_mtp = true;       // false with `--speculation off`: a checkpoint without MTP tensors is then fine
  int64_t kv_cache_bytes = 0;  // 0: a share of free memory on the CPU, what is left on a device
  double gpu_memory_utilization = 0.9;  // share of a device's free memory that the engine may take
  // Most that an open weight update may hold; 0: as much as the weights. A device keeps room for a second set of weights, out of its share and before KV
  // pages, unless this is less than the weights: then no update fits anyway.
  int64_t weight_staging_bytes = 0;
  bool cuda_graphs = true;     // false: iterations are enqueued kernel by kernel, for comparison
  bool batch_invariant = false;  // a device's kernels make rows independent of their batch (the CPU's always do)
  int32_t max_queued_requests = 1024;
  absl::Duration result_ttl = absl::Minutes(10);
};

// Thread-safe façade over one engine thread that runs the step loop. Results come through observers (request.h).
//
// Every accepted request ends exactly once: OnDone is called for it even when the engine fails or shuts down.
// The methods are documented at EngineInterface.
class Engine final : public EngineInterface {
 public:
  // Loads the model and starts the engine thread. Errors: INVALID_ARGUMENT (options, config, tensors), NOT_FOUND, RESOURCE_EXHAUSTED,
  // INTERNAL (the device failed).
  // `wrap`, when set, may put something around the executor: tests inject faults there.
  using ExecutorWrapper = std::function<std::unique_ptr<Executor>(std::unique_ptr<Executor>)>;
  static absl::StatusOr<std::unique_ptr<Engine>> Create(const EngineOptions& options, const ExecutorWrapper& wrap = nullptr);
  ~Engine() override;  // Shutdown(), then joins

  absl::Status Submit(GenerateRequest request, std::shared_ptr<GenerateObserver> observer) override;
  absl::Status SubmitScore(ScoreRequest request, std::shared_ptr<ScoreObserver> observer, uint64_t* handle) override;
  void Detach(const std::string& request_id, const GenerateObserver* observer) override;
  void CancelScore(uint64_t handle) override;
  void ListenToSampleEnds(std::function<void(const SampleResult&)> listener) override;
  bool Abort(const std::string& request_id) override;
  void Wake() override;
  void Drain(absl::Duration deadline) override;

  std::shared_ptr<const ModelWeights> weights() const override;
  WeightVersion weight_version() const override;
  absl::StatusOr<std::unique_ptr<WeightUpdate>> StartWeightUpdate(WeightUpdateSpec spec, int64_t limit_bytes) override;
  absl::StatusOr<CommitResult> CommitWeights(std::unique_ptr<ModelWeights> weights, InFlight in_flight, absl::Duration deadline) override;
  absl::StatusOr<WeightVersion> RehashWeights() const override;

  absl::StatusOr<int32_t> Pause(PauseMode mode, bool clear_cache, absl::Duration deadline) override;
  absl::Status Resume() override;
  absl::Status Sleep(SleepTags tags) override;
  absl::Status WakeUp(SleepTags tags) override;
  absl::Status FlushCache() override;
  EngineControl control() const override;

  const EngineInfo& info() const override;
  const Tokenizer* tokenizer() const override;
  EngineLoads GetLoads() const override;
  absl::Status health() const override;
  absl::Duration SinceHeartbeat() const override;

 private:
  struct Impl;
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace bebop
