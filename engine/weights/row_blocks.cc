// SPDX-License-Identifier: Apache-2.0
#include "engine/weights/row_blocks.h"

#include <algorithm>
#include <atomic>

#include "kernels/common/check.h"
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

void BlockWriter::WriteRows(const RowBlock& block, const TensorView& rows) {
  const PackedMatrix& matrix = block.slot->matrix;
  const int64_t first_row = block.slot->first_row + block.first_row;
  if (matrix.layout == MatrixLayout::kPanels) {
    cpu::PackRows(rows, matrix.dtype, matrix.rows, matrix.cols, first_row, const_cast<void*>(matrix.data));
    return;
  }
  BEBOP_CHECK(rows.cols == matrix.cols && rows.row_stride == matrix.cols && first_row + rows.rows <= matrix.rows);
  const int64_t count = rows.rows * rows.cols;
  thread_local std::vector<BFloat16> narrow;
  thread_local std::vector<float> wide;
  const void* source = rows.data;
  if (rows.dtype == DType::kFloat32 && matrix.dtype == DType::kBFloat16) {
    narrow.resize(static_cast<size_t>(count));
    std::transform(rows.Row<float>(0), rows.Row<float>(0) + count, narrow.begin(), ToBFloat16);
    source = narrow.data();
  } else if (rows.dtype == DType::kBFloat16 && matrix.dtype == DType::kFloat32) {
    wide.resize(static_cast<size_t>(count));
    std::transform(rows.Row<BFloat16>(0), rows.Row<BFloat16>(0) + count, wide.begin(), [](BFloat16 value) { return ToFloat(value); });
    source = wide.data();
  }
  const int64_t row_bytes = matrix.cols * ElementBytes(matrix.dtype);
  char* const destination = static_cast<char*>(const_cast<void*>(matrix.data)) + first_row * row_bytes;
  MutexLock lock(&mutex_);
  memory_->CopyIn(destination, source, rows.rows * row_bytes);
}

void BlockWriter::WriteValues(const TensorSlot& slot, const float* values) {
  MutexLock lock(&mutex_);
  memory_->CopyIn(slot.values, values, SlotElements(slot) * ElementBytes(DType::kFloat32));
}

}  // namespace bebop
