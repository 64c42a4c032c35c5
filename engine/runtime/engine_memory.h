// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

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
  int64_t activation_bytes = 0;  // what ModelExecutor and Model allocate at start
};

// Resolves defaults and checks that everything fits `available_bytes` (memory left after the weights). INVALID_ARGUMENT names the option and both
// values; RESOURCE_EXHAUSTED lists the parts in bytes and what to lower.
absl::StatusOr<EngineSizes> ResolveSizes(const EngineOptions& options, const ModelConfig& config, int64_t available_bytes);

}  // namespace bebop
