// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "engine/config/model_config.h"
#include "engine/memory/device_memory.h"
#include "engine/weights/model_weights.h"
#include "kernels/common/dtype.h"

namespace bebop {

// Weights that wait in host memory, byte for byte as the device had them, until they are wanted there again: what sleeping weights are.
// The result of Restore has the version, and every digest, of what went in. Immutable; one thread at a time.
//
// Example:
//   BEBOP_ASSIGN_OR_RETURN(auto asleep, OffloadedWeights::Create(config, *weights, backend->memory()));
//   weights.reset();  // the device's memory is free with the last reference to it
//   ...
//   BEBOP_ASSIGN_OR_RETURN(weights, asleep->Restore(backend->memory()));
class OffloadedWeights {
 public:
  // Copies `weights` of `config`, as AllocateWeights laid them out, from `memory`; they stay the caller's. Waits for the copy, so that they may
  // be dropped at once; passes that were enqueued before must be done by then (Executor::Quiesce). RESOURCE_EXHAUSTED, naming the
  // bytes, when the host has too little memory; INTERNAL: the device failed.
  static absl::StatusOr<std::unique_ptr<OffloadedWeights>> Create(const ModelConfig& config, const ModelWeights& weights, DeviceMemory* memory);

  // The weights, in `memory` again; this copy stays as it is. RESOURCE_EXHAUSTED, naming the bytes: may be tried again; INTERNAL: the device failed.
  absl::StatusOr<std::unique_ptr<ModelWeights>> Restore(DeviceMemory* memory) const;

  const WeightVersion& version() const { return version_; }

 private:
  OffloadedWeights(const ModelConfig& config, const ModelWeights& weights);

  const ModelConfig config_;
  const WeightVersion version_;
  const DType dtype_;
  const bool with_mtp_;
  const int64_t num_bytes_;
  std::shared_ptr<void> bytes_;  // of the arena
};

}  // namespace bebop
