// SPDX-License-Identifier: Apache-2.0
#include "kernels/linear/linear.h"

#include <cstdlib>

#include "kernels/common/check.h"

namespace bebop::cpu {

LinearScratch::LinearScratch() = default;
LinearScratch::~LinearScratch() { std::free(data_); }

void LinearScratch::Reserve(int64_t rows, int64_t cols) {
  const int64_t needed = RoundUp(rows * RoundUp(cols, kPanelCols), kPanelCols);
  if (needed <= capacity_) return;
  std::free(data_);
  data_ = static_cast<BFloat16*>(std::aligned_alloc(64, static_cast<size_t>(needed) * sizeof(BFloat16)));
  BEBOP_CHECK(data_ != nullptr);
  capacity_ = needed;
}

void LinearWith(InstructionSet, const LinearArgs& args, LinearScratch& scratch, ThreadPool& pool) {
  const int64_t rows = args.x.rows, cols = args.w.cols;
  BEBOP_CHECK(args.x.cols == cols && args.y.rows == rows && args.y.cols == args.w.rows);
  scratch.Reserve(rows, cols);
  const int64_t panels = RoundUp(args.w.rows, kPanelRows) / kPanelRows;
  const int64_t padded_cols = RoundUp(cols, kPanelCols);
  const bool bf16 = args.w.dtype == DType::kBFloat16;
  pool.ParallelFor(panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t t = 0; t < rows; ++t) {
        const float* x = args.x.Row<float>(t);
        float sum[kPanelRows] = {};
        for (int64_t c = 0; c < cols; ++c) {
          const float value = bf16 ? ToFloat(ToBFloat16(x[c])) : x[c];
          for (int64_t r = 0; r < kPanelRows; ++r) {
            const int64_t base = panel * kPanelRows * padded_cols;
            sum[r] += value * (bf16 ? ToFloat(static_cast<const BFloat16*>(args.w.data)[base + (c / 2 * 16 + r) * 2 + c % 2])
                                    : static_cast<const float*>(args.w.data)[base + c * 16 + r]);
          }
        }
        float* y = args.y.Row<float>(t) + panel * kPanelRows;
        for (int64_t r = 0; r < kPanelRows && panel * kPanelRows + r < args.w.rows; ++r) y[r] = sum[r];
      }
    }
  });
}

void Linear(const LinearArgs& args, LinearScratch& scratch, ThreadPool& pool) {
  LinearWith(DetectInstructionSet(), args, scratch, pool);
}

}  // namespace bebop::cpu
