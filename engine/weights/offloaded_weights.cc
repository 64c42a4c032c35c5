// SPDX-License-Identifier: Apache-2.0
#include "engine/weights/offloaded_weights.h"

#include <utility>

#include "engine/base/status_macros.h"
#include "engine/formats/strings.h"
#include "engine/weights/weight_layout.h"
#include "kernels/common/check.h"

namespace bebop {

OffloadedWeights::OffloadedWeights(const ModelConfig& config, const ModelWeights& weights)
    : config_(config),
      version_(weights.version),
      dtype_(weights.embedding.dtype),
      with_mtp_(weights.mtp.has_value()),
      num_bytes_(weights.storage_bytes) {}

absl::StatusOr<std::unique_ptr<OffloadedWeights>> OffloadedWeights::Create(const ModelConfig& config, const ModelWeights& weights,
                                                                           DeviceMemory* memory) {
  std::unique_ptr<OffloadedWeights> offloaded(new OffloadedWeights(config, weights));
  const std::unique_ptr<DeviceMemory> host = MakeHostMemory();
  // The host gives out more than it has, and would end the process when the copy fills it.
  const int64_t available_bytes = host->available_bytes();
  if (weights.storage_bytes > available_bytes) {
    return absl::ResourceExhaustedError(
        StrCat("weights in host memory: expected ", weights.storage_bytes, " bytes of memory, ", available_bytes, " are free"));
  }
  BEBOP_ASSIGN_OR_RETURN(offloaded->bytes_, host->Allocate(weights.storage_bytes, "weights in host memory"));
  memory->CopyOut(offloaded->bytes_.get(), weights.storage.get(), weights.storage_bytes);
  BEBOP_RETURN_IF_ERROR(memory->status());
  return offloaded;
}

absl::StatusOr<std::unique_ptr<ModelWeights>> OffloadedWeights::Restore(DeviceMemory* memory) const {
  BEBOP_ASSIGN_OR_RETURN(WeightLayout layout, AllocateWeights(config_, dtype_, with_mtp_, memory));
  BEBOP_CHECK(layout.weights->storage_bytes == num_bytes_);  // the same kind of memory as at first
  // Nobody else has the new arena yet.
  memory->CopyIn(const_cast<void*>(layout.weights->storage.get()), bytes_.get(), num_bytes_);
  BEBOP_RETURN_IF_ERROR(memory->status());
  layout.weights->version = version_;
  return std::move(layout.weights);
}

}  // namespace bebop
