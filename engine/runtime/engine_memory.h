// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>

#include "absl/status/statusor.h"
#include "engine/config/model_config.h"
#include "engine/memory/model_state.h"
#include "engine/runtime/engine.h"
#include "engine/schedule/scheduler_options.h"

namespace bebop {

// The sizes an engine runs with, resolved from options, model and free memory.
struct EngineSizes {
  SchedulerOptions scheduler;
  ModelStateOptions state;
  int32_t max_draft_tokens = 0;  // 0 without an MTP layer
  int64_t page_table_entries = 0;  // of all sequences of a step
  int64_t activation_bytes = 0;  // what the executor and the model allocate at start
};

// The CPU's sizes: resolves defaults and checks that everything fits `available_bytes` (memory left after the weights). INVALID_ARGUMENT names
// the option and both values; RESOURCE_EXHAUSTED lists the parts in bytes and what to lower.
absl::StatusOr<EngineSizes> ResolveSizes(const EngineOptions& options, const ModelConfig& config, int64_t available_bytes);

// What a device has, and the parts of it that do not follow from options and model.
struct DeviceBudget {
  int64_t free_bytes = 0;       // before the engine takes anything
  int64_t weight_bytes = 0;
  int64_t staging_bytes = 0;    // kept for the weights of an update
  int64_t workspace_bytes = 0;  // of the stream
  int64_t graph_bytes = 0;      // kept for captured iterations
  int32_t lookahead_tokens = 0;
  DType activation_dtype = DType::kBFloat16;
  std::function<int64_t(const EngineSizes&)> executor_bytes;  // asked before the number of pages is known
};

// What a device should keep for updates of weights that take `weight_bytes`.
int64_t StagingBytes(const EngineOptions& options, int64_t weight_bytes);

// A device's sizes: KV pages take what gpu_memory_utilization of the free bytes leaves after everything else. Errors as above.
absl::StatusOr<EngineSizes> ResolveDeviceSizes(const EngineOptions& options, const ModelConfig& config, const DeviceBudget& budget);

}  // namespace bebop
