// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/memory/device_memory.h"
#include "engine/runtime/batch_builder.h"

namespace bebop {

// A ragged batch where the model reads it: in host memory the builder's own arrays, on a device a copy of them. Allocates at creation
// only. One upload at a time is valid: the next one overwrites it (in the order of the stream, so passes that were enqueued before still
// see theirs).
//
//   batch.Upload(builder);
//   model.ForwardTarget(batch.tokens(), batch.View(), ...);
class DeviceBatch {
 public:
  // Room for batches of this size. `memory` must outlive it. RESOURCE_EXHAUSTED when the memory cannot be had.
  static absl::StatusOr<std::unique_ptr<DeviceBatch>> Create(int64_t max_rows, int64_t max_sequences, int64_t max_page_entries, DeviceMemory* memory);
  // Device memory that Create takes.
  static int64_t Bytes(int64_t max_rows, int64_t max_sequences, int64_t max_page_entries);

  // Takes over `builder`, which may change afterwards on a device, but not in host memory. REQUIRES: within the room.
  void Upload(const BatchBuilder& builder);
  // Of the latest upload.
  const uint32_t* tokens() const { return tokens_; }
  const RaggedBatch& View() const { return view_; }

 private:
  explicit DeviceBatch(DeviceMemory* memory) : memory_(*memory) {}

  DeviceMemory& memory_;
  std::shared_ptr<void> arrays_;  // null in host memory
  std::vector<char> staging_;     // the arrays as they are copied, in one piece
  const uint32_t* tokens_ = nullptr;
  RaggedBatch view_;
};

}  // namespace bebop
