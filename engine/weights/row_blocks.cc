// SPDX-License-Identifier: Apache-2.0
#include "engine/weights/row_blocks.h"

#include <algorithm>
#include <atomic>

#include "kernels/linear/packed_matrix.h"

namespace bebop {

int64_t SlotElements(const TensorSlot& slot) {
  int64_t count = 1;
  for (const int64_t size : slot.shape) count *= size;
  return count;
}

void ForEachBlock(const std::vector<TensorSlot>& slots, ThreadPool& pool, const std::function<void(const RowBlock&, size_t)>& fill) {
  constexpr int64_t kBlockElements = 1 << 18;
  std::vector<RowBlock> blocks;
  for (const TensorSlot& slot : slots) {
    if (slot.values != nullptr) {
      blocks.push_back({&slot, 0, slot.shape[0]});
      continue;
    }
    // Whole panels, so that two threads never write one.
    const int64_t step = RoundUp(std::max<int64_t>(1, kBlockElements / slot.matrix.cols - kPanelRows), kPanelRows);
    for (int64_t row = 0; row < slot.shape[0]; row += step) {
      blocks.push_back({&slot, row, std::min(step, slot.shape[0] - row)});
    }
  }
  std::atomic<size_t> next{0};
  pool.ParallelFor(pool.num_threads(), 1, [&](int64_t, int64_t) {
    for (size_t i = next.fetch_add(1, std::memory_order_relaxed); i < blocks.size(); i = next.fetch_add(1, std::memory_order_relaxed)) {
      fill(blocks[i], i);
    }
  });
}

void PackBlock(const RowBlock& block, const TensorView& rows) {
  const TensorSlot& slot = *block.slot;
  cpu::PackRows(rows, slot.matrix.dtype, slot.matrix.rows, slot.matrix.cols, slot.first_row + block.first_row,
                const_cast<void*>(slot.matrix.data));
}

}  // namespace bebop
