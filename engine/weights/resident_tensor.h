// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

#include "engine/memory/device_memory.h"
#include "engine/weights/weight_digest.h"
#include "engine/weights/weight_layout.h"
#include "kernels/common/dtype.h"

namespace bebop {

// A tensor's bytes in its form (TensorInfo::form), kept where and however its slot holds the values. Every bit pattern comes back
// as it was written, so the slot itself is the store of a tensor that arrives in pieces. A view: slot and memory must outlive it.
class ResidentTensor {
 public:
  // REQUIRES: form kFloat32 only where the slot holds float32.
  ResidentTensor(const TensorSlot& slot, DType form, DeviceMemory* memory);

  int64_t num_bytes() const { return num_bytes_; }
  // Bytes [offset, offset + size) of the tensor. REQUIRES: in range, whole elements.
  void Write(int64_t offset, std::string_view bytes) const;
  void Read(int64_t offset, int64_t size, char* out) const;

 private:
  enum class Direction { kWrite, kRead };
  // `bytes` is read or written.
  template <Direction kDirection>
  void Move(int64_t offset, int64_t size, char* bytes) const;
  template <Direction kDirection>
  void MovePanels(int64_t first, int64_t count, char* bytes) const;
  template <Direction kDirection>
  void MoveRows(int64_t first, int64_t count, char* bytes) const;

  const TensorSlot& slot_;
  const DType form_;
  DeviceMemory* const memory_;
  const int64_t num_bytes_;
};

// The part of the arena that a slot fills, padding of its rows included; slots do not share a byte.
struct ArenaRange {
  void* data = nullptr;
  int64_t bytes = 0;
};
ArenaRange RangeOf(const TensorSlot& slot);

// The digest of a tensor, from its resident bytes.
Sha256Digest ResidentDigest(const ResidentTensor& tensor);

// Hashes all tensors of resident weights again. `memory` is where they are and is used by the calling thread; on a device it
// should have a stream of its own, or the copies wait for the engine's work. INTERNAL: the device failed.
absl::StatusOr<WeightVersion> RecomputeVersion(const ModelConfig& config, const ModelWeights& weights, DeviceMemory* memory);

}  // namespace bebop
