// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/config/model_config.h"
#include "engine/memory/device_memory.h"
#include "engine/weights/model_weights.h"
#include "kernels/common/dtype.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

// Which checkpoint to read, and how.
struct LoadOptions {
  std::string path;      // folder with model.safetensors, or model.safetensors.index.json and its shards
  std::string mtp_path;  // optional safetensors file: supplies or replaces the mtp.* tensors
  DType dtype = DType::kBFloat16;  // of the packed matrices; norms, convolutions and decay vectors are float32 always
  bool needs_mtp = true;           // false: a checkpoint without MTP tensors is fine (and has no `mtp`)
};

// Reads a Hugging Face checkpoint of `config` (model.md section 1) into `memory`, in the layout that its kernels read, on all threads of
// `pool`. Beside the weights themselves it takes a few MiB of host memory a thread.
//
// Every tensor of the network must be there once, with its shape, as BF16, F16 or F32 (converted to `dtype` with round to nearest
// even), and every value finite, also after conversion. The only tensors skipped are `model.visual.*`, and mtp.* where a file at
// mtp_path replaces them. Text tensors begin with "model.language_model." or "model.", MTP tensors with "mtp." or "model.mtp.".
// With tied embeddings lm_head.weight may be present only as a bit-equal copy: transformers would untie a different one with a
// warning; here it is an error. model.safetensors wins over an index, as in transformers.
//
// Errors, one line, naming file, tensor and both values: NOT_FOUND (file, tensor), DATA_LOSS (file shorter than its header says),
// FAILED_PRECONDITION (no MTP tensors but needs_mtp; names both remedies), RESOURCE_EXHAUSTED (memory), INTERNAL (the device failed),
// INVALID_ARGUMENT (all else).
absl::StatusOr<std::unique_ptr<ModelWeights>> LoadModelWeights(const ModelConfig& config, const LoadOptions& options, ThreadPool& pool,
                                                               DeviceMemory* memory);

// The part of LoadModelWeights that headers and sizes show, without reading a value: fast for any size.
absl::Status CheckCheckpoint(const ModelConfig& config, const LoadOptions& options);

}  // namespace bebop
