// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/config/model_config.h"
#include "engine/memory/device_memory.h"
#include "kernels/common/ragged_batch.h"

namespace bebop {

// The caches that a forward pass reads and writes: borrowed views, one per layer of the kind, in layer order.
struct ModelState {
  std::vector<KvPagesView> kv;          // full-attention layers of the target
  std::vector<LinearStateView> linear;  // linear-attention layers of the target
  KvPagesView mtp_kv;                   // the MTP layer; num_pages 0 without one
};

struct ModelStateOptions {
  DType kv_dtype = DType::kBFloat16;
  int32_t num_pages = 0;     // of page_tokens positions each, for all layers together
  int32_t page_tokens = 16;
  int32_t num_slots = 0;     // recurrent-state slots
  int32_t window = 0;        // most draft rows per pass (γ)
  DType input_dtype = DType::kFloat32;  // of conv inputs and windows: the activations' dtype
};

// Bytes that one page (all attention layers and the MTP layer) and one state slot (all linear layers) take.
int64_t PageBytes(const ModelConfig& config, const ModelStateOptions& options);
int64_t SlotBytes(const ModelConfig& config, const ModelStateOptions& options);

// Owns the KV pages and recurrent-state slots of one model, zero at first. Which page and slot belongs to whom is the business of the pools
// (engine/memory/page_pool.h); this class only holds the bytes, and can be without them for a while. Not thread safe: the engine thread.
class ModelStateStorage {
 public:
  // In `memory`, which must outlive the storage. RESOURCE_EXHAUSTED, naming the bytes asked for, when the memory cannot be had.
  static absl::StatusOr<std::unique_ptr<ModelStateStorage>> Create(const ModelConfig& config, const ModelStateOptions& options,
                                                                   DeviceMemory* memory);
  const ModelState& state() const { return state_; }  // the object stays the same; its addresses are null while released

  // Gives all bytes back to the system or the device; what they held is lost. REQUIRES: nothing that was enqueued uses them, and nobody keeps
  // an address of theirs (Executor::Quiesce sees to both). Twice is as good as once.
  void Release();
  // Takes as many bytes again, zero, at other addresses perhaps. RESOURCE_EXHAUSTED, naming the bytes: still released, and may be tried again;
  // INTERNAL: the device failed. Nothing happens when it is not released.
  absl::Status Restore();
  bool released() const { return bytes_ == nullptr; }

  // Copies all layers of page `source` to page `destination` (copy on write of a shared, partly filled page). On a device the copies
  // are enqueued. REQUIRES: not released.
  void CopyPage(int32_t source, int32_t destination);

 private:
  ModelStateStorage(const ModelConfig& config, const ModelStateOptions& options, DeviceMemory* memory);

  const ModelConfig config_;
  const ModelStateOptions options_;
  DeviceMemory* const memory_;
  ModelState state_;
  std::shared_ptr<void> bytes_;
};

}  // namespace bebop
