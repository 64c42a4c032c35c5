// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/config/model_config.h"
#include "engine/memory/device_memory.h"
#include "engine/weights/model_weights.h"
#include "kernels/common/dtype.h"

namespace bebop {

// What a tensor is for: decides its dummy values, nothing else.
enum class TensorRole : uint8_t {
  kEmbedding,
  kLmHead,          // logits; also the embedding when tied
  kInProjection,    // reads a normalised input
  kOutProjection,   // writes to the residual stream
  kDecayProjection, // in_proj_a: the token's share of the decay gate
  kConv,
  kZeroCentredNorm,
  kPlainNorm,
  kDecayRate,       // A_log
  kDecayBias,       // dt_bias
};

// One tensor of a checkpoint and where it goes. Exactly one of `matrix.data` and `values` is set; both may be device memory
// (BlockWriter in row_blocks.h fills them).
struct TensorSlot {
  // Name in the checkpoint; tensors of the text model begin with `kTextPrefix`, which stands for the checkpoint's own prefix.
  std::string name;
  std::vector<int64_t> shape;  // as the checkpoint must have it
  TensorRole role = TensorRole::kInProjection;
  bool mtp = false;            // belongs to the MTP layer; `name` then begins with "mtp."
  PackedMatrix matrix = {};    // the matrix that holds it as rows [first_row, first_row + shape[0])
  int64_t first_row = 0;
  float* values = nullptr;     // dense float32 destination
};

inline constexpr char kTextPrefix[] = "@";

// TensorSlot::name of a tensor that a checkpoint names `name`: text tensors begin with "model.language_model." or "model.", the MTP
// layer's with "mtp." or "model.mtp.". Other names are as they are.
std::string SlotName(std::string_view name);

// Every tensor of a model, each once, with the memory it fills.
struct WeightLayout {
  std::vector<TensorSlot> slots;  // in a fixed order: embedding first, then layer by layer
  std::unique_ptr<ModelWeights> weights;
};

// The tensors of `config` (with the MTP layer when `with_mtp`), without memory: names, shapes and roles only. Fast for any config.
std::vector<TensorSlot> ListTensors(const ModelConfig& config, bool with_mtp);

// The same, with one zeroed arena in `memory` (256-byte aligned tensors) that `weights->storage` owns. Matrices are in panels in host
// memory and in rows on a device. RESOURCE_EXHAUSTED, naming the bytes, when the memory cannot be had.
absl::StatusOr<WeightLayout> AllocateWeights(const ModelConfig& config, DType dtype, bool with_mtp, DeviceMemory* memory);

// The slots of weights that AllocateWeights laid out for `config`, in the same order and with the addresses that they have.
std::vector<TensorSlot> SlotsOf(const ModelConfig& config, const ModelWeights& weights);

// The type that the slot holds its values in.
inline DType ResidentType(const TensorSlot& slot) { return slot.values != nullptr ? DType::kFloat32 : slot.matrix.dtype; }

// Bytes that AllocateWeights takes.
int64_t WeightBytes(const ModelConfig& config, DType dtype, bool with_mtp, MatrixLayout matrix_layout);

}  // namespace bebop
