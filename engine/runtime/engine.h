// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/config/model_config.h"
#include "engine/schedule/request.h"
#include "engine/schedule/scheduler_options.h"
#include "engine/tokenizer/tokenizer.h"
#include "kernels/common/dtype.h"

namespace bebop {

// How to build an engine. Everything is validated by Engine::Create, which names the offending field.
struct EngineOptions {
  std::string model_path;      // checkpoint directory
  std::string mtp_path;        // optional safetensors with the mtp.* tensors
  bool load_dummy = false;     // seeded random weights instead of the checkpoint's (needs config.json only)
  uint64_t dummy_seed = 0;
  DType dtype = DType::kBFloat16;
  int32_t num_threads = 0;     // 0: all processors
  int32_t max_model_len = 0;   // 0: the model's, capped at 32768
  int32_t max_num_seqs = 0;    // 0: a default for the device
  int32_t max_step_tokens = 0; // 0: a default for the device
  int32_t max_draft_tokens = kMaxDraftTokens;  // most drafts a request may ask for (sizes windows and buffers)
  bool needs_mtp = true;       // false with `--speculation off`: a checkpoint without MTP tensors is then fine
  int64_t kv_cache_bytes = 0;  // 0: a share of free memory
  int32_t max_queued_requests = 1024;
  absl::Duration result_ttl = absl::Minutes(10);
};

// Snapshot of what the engine does (Info.GetLoads, metrics). Counters since start satisfy
// submitted = finished + cancelled + failed + running + waiting (I26).
struct EngineLoads {
  int32_t running_requests = 0, waiting_requests = 0;
  int32_t running_sequences = 0, max_num_seqs = 0;
  int32_t used_pages = 0, total_pages = 0, used_state_slots = 0, total_state_slots = 0;
  int64_t queued_bytes = 0, retained_bytes = 0;
  int64_t submitted = 0, finished = 0, cancelled = 0, failed = 0, refused = 0;
  int64_t steps = 0, prompt_tokens = 0, generated_tokens = 0, preemptions = 0;
  SpecCounts spec;  // summed over all samples
};

struct EngineInfo {
  ModelConfig config;
  std::string model_name;           // last path component
  DType dtype = DType::kBFloat16;
  std::string device;               // "cpu"
  std::string instruction_set;      // of the CPU kernels
  int32_t num_threads = 0;
  int32_t max_model_len = 0, max_num_seqs = 0, max_step_tokens = 0, max_draft_tokens = 0;
  bool has_mtp = false, dummy_weights = false;
  int64_t weight_step = 0;
  int64_t weight_bytes = 0, kv_cache_bytes = 0, state_bytes = 0;
  // Bytes one target pass / one lm_head product / one MTP step streams (for effective bandwidth).
  int64_t layer_bytes = 0, lm_head_bytes = 0, mtp_bytes = 0;
};

// Thread-safe façade over one engine thread that runs the step loop. All results come through observers on that thread.
//
// Every accepted request ends exactly once: OnDone is called for it even when the engine fails or shuts down.
class Engine {
 public:
  // Loads the model and starts the engine thread. Errors: INVALID_ARGUMENT (config, tensors), NOT_FOUND, RESOURCE_EXHAUSTED.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(const EngineOptions& options);
  ~Engine();  // Shutdown(), then joins

  // Queues a group, or attaches to the running or retained one with the same id and body hash (its samples so far are delivered
  // to the new observer, too). `request` is complete: defaults resolved, fields in range (the server validates against info()).
  // ALREADY_EXISTS: id in use with another hash. RESOURCE_EXHAUSTED: queue full, or it can never fit (message says which).
  // INVALID_ARGUMENT: prompt + max_new_tokens > max_model_len, token id >= vocab_size. UNAVAILABLE: draining. INTERNAL: engine failed.
  // On an error no observer method is called.
  absl::Status Submit(GenerateRequest request, std::shared_ptr<GenerateObserver> observer);
  absl::Status SubmitScore(ScoreRequest request, std::shared_ptr<ScoreObserver> observer, uint64_t* handle);

  // Detaches `observer` (no further call to it after the next step); the request is cancelled when it was the last one.
  void Detach(const std::string& request_id, const GenerateObserver* observer);
  void CancelScore(uint64_t handle);
  // Ends a request for all observers with the tokens so far as data (finish kAborted). False: unknown or already ended.
  bool Abort(const std::string& request_id);
  int32_t AbortAll();

  // Refuses new work and lets running work finish until `deadline`, then ends the rest as kDrained with partial tokens. Blocks.
  void Drain(absl::Duration deadline);

  const EngineInfo& info() const;
  const Tokenizer* tokenizer() const;  // null: the checkpoint has none
  EngineLoads GetLoads() const;
  // Not OK after a failure of the executor; health follows it.
  absl::Status health() const;
  // Time since the engine thread last went round its loop (heartbeat).
  absl::Duration SinceHeartbeat() const;

 private:
  struct Impl;
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace bebop
