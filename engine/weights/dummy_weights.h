// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "engine/config/model_config.h"
#include "engine/memory/device_memory.h"
#include "engine/weights/model_weights.h"
#include "kernels/common/dtype.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

// Seeded random weights for any config, with an MTP layer when config.num_mtp_layers is 1 (`--load-format dummy`). A function of
// (config, dtype, seed) alone: every value is keyed by its tensor's name and its place in the tensor, so that neither the thread count
// nor the kind of memory changes anything, and the float32 and the bfloat16 model are roundings of the same numbers.
//
// Ranges as in a trained network: activations of order 1, norm weights near identity, per-head decay exp(g) spread over
// [0.9, 0.999] (at zero input; the input moves it a little), lm_head scaled so that logits have a standard deviation of about 3.
// RESOURCE_EXHAUSTED when the memory cannot be had, INTERNAL when the device fails.
absl::StatusOr<std::unique_ptr<ModelWeights>> MakeDummyWeights(const ModelConfig& config, DType dtype, uint64_t seed, ThreadPool& pool,
                                                               DeviceMemory* memory);

}  // namespace bebop
