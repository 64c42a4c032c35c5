// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "engine/base/mutex.h"
#include "engine/memory/device_memory.h"
#include "engine/weights/weight_layout.h"
#include "kernels/common/tensor_view.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

// A piece of filling the weights: some rows of one packed tensor, or a whole float vector. No two blocks write the same panel, so
// blocks are filled by different threads without a lock.
struct RowBlock {
  const TensorSlot* slot = nullptr;
  int64_t first_row = 0;  // of the tensor, not of the fused matrix
  int64_t num_rows = 0;
};

int64_t SlotElements(const TensorSlot& slot);

// Calls fill(block, block_idx) once for every block of all slots, on all threads of `pool`. Blocks hold at most about 1 MiB of floats and
// are numbered in slot order. Threads take the next block when free: tensors differ in size by a factor of 10^5.
void ForEachBlock(const std::vector<TensorSlot>& slots, ThreadPool& pool, const std::function<void(const RowBlock&, size_t)>& fill);

// Puts values where their slots say, whatever memory and layout that is. Device memory is filled block by block from the caller's own
// buffers, so a model of any size loads with little host memory. Thread safe: blocks are distinct, and copies to a device take turns.
class BlockWriter {
 public:
  explicit BlockWriter(DeviceMemory* memory) : memory_(memory) {}  // must outlive the writer
  // The block's rows ([num_rows, cols], float32 or bf16, without gaps), converted to the matrix's dtype with round to nearest even.
  void WriteRows(const RowBlock& block, const TensorView& rows);
  // All values of a float vector.
  void WriteValues(const TensorSlot& slot, const float* values);

 private:
  DeviceMemory* const memory_;
  Mutex mutex_;  // of the copies to a device
};

}  // namespace bebop
