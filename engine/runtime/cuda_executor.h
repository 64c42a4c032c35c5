// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/config/model_config.h"
#include "engine/memory/device_memory.h"
#include "engine/memory/model_state.h"
#include "engine/model/model.h"
#include "engine/runtime/model_executor.h"
#include "engine/schedule/step_plan.h"
#include "kernels/common/stream.h"
#include "kernels/common/thread_pool.h"

// Runs StepPlans on a CUDA device. What comes out is what ModelExecutor's contract says; how it is done is ADR 5: sequences live
// in slots in device memory, a whole draft-verify iteration is one CUDA graph, and the next iteration is enqueued before the
// results of the last one are read. Only in builds with CUDA.
namespace bebop {

struct CudaExecutorOptions : ModelExecutorOptions {
  int32_t page_tokens = 16;       // of the KV pages
  int32_t max_model_len = 0;      // most prompt + output tokens of a sequence: sizes the page tables
  bool graphs = true;             // false: iterations are enqueued kernel by kernel, for comparison; tokens are the same
  int32_t shortest_class = 1024;  // positions of the shortest length class that iterations are captured for (iteration_graphs.h)
  ThreadPool* pool = nullptr;     // for the host's part of scoring; must outlive the executor. Null: the engine thread alone
};

// Positions that SchedulerOptions::lookahead_tokens should be, so that a run-ahead iteration never lacks pages: what two
// iterations can write beyond the first one's own need.
inline constexpr int32_t CudaLookaheadTokens(int32_t max_draft_tokens) { return 2 * (max_draft_tokens + 1); }

// Device bytes that MakeCudaExecutor will allocate, at most: logits, draft distributions, hidden states between the model's calls
// (counted as float32), arrays. The model's own memory and Scorer::DeviceBytes come on top.
int64_t CudaExecutorBytes(const ModelConfig& config, const CudaExecutorOptions& options);

// What MakeCudaExecutor checks first, for callers who would rather know before weights are loaded: INVALID_ARGUMENT for an option
// out of range, RESOURCE_EXHAUSTED when verification does not fit into the stream's workspace.
absl::Status CheckCudaExecutorOptions(const ModelConfig& config, const CudaExecutorOptions& options, int64_t workspace_bytes);

// All pointers must outlive the executor. Everything a generation step touches is allocated here. INVALID_ARGUMENT names an
// option out of range, RESOURCE_EXHAUSTED what did not fit, INTERNAL a device error.
// REQUIRES: storage's window >= options.max_draft_tokens; the model's rows >= options.max_step_tokens >= max_num_seqs *
// (max_draft_tokens + 1).
absl::StatusOr<std::unique_ptr<Executor>> MakeCudaExecutor(const ModelConfig& config, const CudaExecutorOptions& options,
                                                           Model* model, ModelStateStorage* storage, DeviceMemory* memory,
                                                           cuda::Stream* stream);

}  // namespace bebop
