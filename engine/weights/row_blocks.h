// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

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

// Writes the block's rows ([num_rows, cols], float32 or bf16) into the packed matrix. REQUIRES: block.slot->values is null.
void PackBlock(const RowBlock& block, const TensorView& rows);

}  // namespace bebop
