// SPDX-License-Identifier: Apache-2.0
#include "kernels/linear/linear_backward.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "kernels/common/check.h"
#include "kernels/linear/linear_driver.h"

namespace bebop::cpu {
namespace {

// Rows whose transposes wait in the scratch at a time: enough that reading and writing dw once a block is small beside its
// products (2·512 operations for 8 bytes), few enough that the scratch does not grow with the batch.
constexpr int64_t kBlockRows = 512;
// Side of the square that a transposition keeps in L1.
constexpr int64_t kSquare = 16;

// out [cols, rows], rows `out_stride` floats apart, <- the transpose of `in` [rows, cols].
void Transpose(const TensorView& in, float* out, int64_t out_stride, ThreadPool& pool) {
  pool.ParallelFor(in.cols, kSquare, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < in.rows; row += kSquare) {
      const int64_t row_end = std::min(row + kSquare, in.rows);
      for (int64_t first = begin; first < end; first += kSquare) {
        // By way of a small square, so that every cache line is read once and written once: rows are often a multiple of 4 KiB
        // apart, where a column would wait for one set of the cache.
        const int64_t last = std::min(first + kSquare, end);
        float square[kSquare][kSquare];
        for (int64_t r = row; r < row_end; ++r) {
          const float* from = in.Row<float>(r);
          for (int64_t col = first; col < last; ++col) square[col - first][r - row] = from[col];
        }
        for (int64_t col = first; col < last; ++col) {
          std::memcpy(out + col * out_stride + row, square[col - first], static_cast<size_t>(row_end - row) * sizeof(float));
        }
      }
    }
  });
}

}  // namespace

LinearBackwardScratch::~LinearBackwardScratch() { std::free(data_); }

float* LinearBackwardScratch::Reserve(int64_t count) {
  if (count > capacity_) {
    std::free(data_);
    capacity_ = RoundUp(count, 16);
    data_ = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(capacity_) * sizeof(float)));
    BEBOP_CHECK(data_ != nullptr);
  }
  return data_;
}

PackedMatrix PackFloat(const TensorView& w, float* destination, ThreadPool& pool) {
  const int64_t panel_floats = kPanelRows * RoundUp(w.cols, kPanelCols);
  pool.ParallelFor(w.rows, kPanelRows, [&](int64_t begin, int64_t end) {
    const int64_t first = begin / kPanelRows, last = (end + kPanelRows - 1) / kPanelRows;
    std::memset(destination + first * panel_floats, 0, static_cast<size_t>((last - first) * panel_floats) * sizeof(float));
    PackRows(w.Rows(begin, end - begin), DType::kFloat32, w.rows, w.cols, begin, destination);
  });
  return {destination, DType::kFloat32, w.rows, w.cols};
}

PackedMatrix PackTransposed(const TensorView& w, float* destination, ThreadPool& pool) {
  const int64_t chunks = RoundUp(w.rows, kPanelCols), panels = (w.cols + kPanelRows - 1) / kPanelRows;
  // A chunk of a panel of Wᵀ is 16 neighbours in a row of W.
  pool.ParallelFor(panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      float* to = destination + panel * chunks * kPanelRows;
      const int64_t first = panel * kPanelRows, count = std::min(kPanelRows, w.cols - first);
      if (count < kPanelRows || chunks > w.rows) std::memset(to, 0, static_cast<size_t>(chunks * kPanelRows) * sizeof(float));
      for (int64_t row = 0; row < w.rows; ++row) {
        std::memcpy(to + row * kPanelRows, w.Row<float>(row) + first, static_cast<size_t>(count) * sizeof(float));
      }
    }
  });
  return {destination, DType::kFloat32, w.cols, w.rows};
}

void LinearBackwardWeight(const LinearBackwardWeightArgs& args, LinearBackwardScratch& scratch, ThreadPool& pool) {
  BEBOP_CHECK(args.x.rows == args.dy.rows && args.dw.rows == args.dy.cols && args.dw.cols == args.x.cols);
  BEBOP_CHECK(args.x.dtype == DType::kFloat32 && args.dy.dtype == DType::kFloat32 && args.dw.dtype == DType::kFloat32);
  const int64_t rows = args.x.rows, inputs = args.x.cols, outputs = args.dy.cols;
  if (rows == 0 && !args.accumulate) {
    for (int64_t row = 0; row < outputs; ++row)
      std::memset(args.dw.Row<float>(row), 0, static_cast<size_t>(inputs) * sizeof(float));
  }
  for (int64_t row = 0; row < rows; row += kBlockRows) {
    const int64_t count = std::min(kBlockRows, rows - row);
    const int64_t packed = PackedBytes(DType::kFloat32, inputs, count) / static_cast<int64_t>(sizeof(float));
    float* const buffer = scratch.Reserve(packed + outputs * count);
    float* const dy_transposed = buffer + packed;
    const PackedMatrix x_transposed = PackTransposed(args.x.Rows(row, count), buffer, pool);
    Transpose(args.dy.Rows(row, count), dy_transposed, count, pool);
    RunLinear(DetectInstructionSet(), {.x = FloatMatrix(dy_transposed, outputs, count), .w = x_transposed, .y = args.dw},
              args.accumulate || row > 0, scratch.linear(), pool);
  }
}

}  // namespace bebop::cpu
