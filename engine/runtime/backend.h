// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/config/model_config.h"
#include "engine/memory/device_memory.h"
#include "engine/memory/model_state.h"
#include "engine/model/model.h"
#include "engine/model/ops.h"
#include "engine/runtime/engine.h"
#include "engine/runtime/engine_memory.h"
#include "engine/schedule/step_plan.h"
#include "kernels/common/stream.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

// Where an engine computes: memory, operators and executor that belong together, chosen once, at start. There is one factory file a build:
// backend_cpu_only.cc or backend_cuda.cc.
class Backend {
 public:
  virtual ~Backend() = default;

  // For people: "cpu", "cuda:0 (NVIDIA H200)".
  virtual const std::string& name() const = 0;
  virtual DeviceMemory* memory() = 0;  // of the engine thread, and before it starts of the loading one
  // Another memory of the same device, for a thread beside the engine's: an update of weights is staged in it, loaded weights are hashed
  // through it. On a device it has a stream of its own, so that its copies neither wait for iterations nor hold them up. May be used by any
  // thread, one at a time, without EnterThread. What it allocated may outlive it, and so may become the engine's. Both must end before the
  // backend. INTERNAL: the device failed.
  virtual absl::StatusOr<std::unique_ptr<DeviceMemory>> NewMemory() = 0;
  virtual Ops* ops() = 0;
  // The queue of its operators and copies, for operators beside ops(); null on the CPU.
  virtual cuda::Stream* stream() = 0;
  // Of activations beside the residual stream, with weights of `weight_dtype`.
  virtual DType activation_dtype(DType weight_dtype) const = 0;
  // OK when the kernels take this model's shapes; else INVALID_ARGUMENT names the config's key, its value and what is needed.
  virtual absl::Status CheckShapes(const ModelConfig& config, DType dtype) const = 0;
  // The sizes to run with. `weight_bytes`: of the weights, whether loaded or not yet. Errors: see engine_memory.h.
  virtual absl::StatusOr<EngineSizes> Sizes(const EngineOptions& options, const ModelConfig& config, int64_t weight_bytes) = 0;
  // All pointers must outlive the executor, and the backend too.
  virtual absl::StatusOr<std::unique_ptr<Executor>> MakeExecutor(const EngineOptions& options, const ModelConfig& config, const EngineSizes& sizes,
                                                                 Model* model, ModelStateStorage* storage) = 0;
  // To be called once by each thread that will use the backend (the current device belongs to the thread).
  virtual void EnterThread() = 0;
};

// The backend that options.device names. INVALID_ARGUMENT ("device: ...") when this build or machine has it not. `pool` must outlive it.
absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const EngineOptions& options, ThreadPool* pool);

// OK when this build has the device, whether or not the machine has one; else INVALID_ARGUMENT, "device: cuda is not in this build; it has: cpu".
absl::Status CheckDeviceName(const std::string& device);

std::unique_ptr<Backend> MakeCpuBackend(ThreadPool* pool);

}  // namespace bebop
