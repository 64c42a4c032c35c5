// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/common/tensor_view.h"

namespace bebop {

// How a weight matrix lies in memory: the CPU's panels, or in device memory plain rows, or plain columns (training's transposes).
enum class MatrixLayout : uint8_t { kPanels, kRows, kColumns };

// A weight matrix W [rows, cols], borrowed.
//
// kRows (devices): row-major without gaps, cols as they are; 256-byte aligned. Rows that pad a fused matrix are zero.
//
// kColumns (devices): the transpose in rows, [cols, rows] without gaps; 256-byte aligned.
//
// kPanels (CPU): 16 rows make a panel; panels follow each other, each from its
// first column to its last, and every 64 bytes hold one group of columns for the 16 rows: a pair of bf16 columns (so that 16 rows x
// 32 columns are 1 KiB), or one float32 column. Rows and columns are padded with zeros to multiples of 16 and 32: with C padded
// columns, element (n, k) is number (n / 16 * C + k / 2 * 2) * 16 + n % 16 * 2 + k % 2 in bf16 and (n / 16 * C + k) * 16 + n % 16 in
// float32. The layout is the same for every instruction set.
struct PackedMatrix {
  const void* data = nullptr;  // 64-byte aligned
  DType dtype = DType::kFloat32;
  int64_t rows = 0;  // N, output features
  int64_t cols = 0;  // K, input features
  MatrixLayout layout = MatrixLayout::kPanels;
};

// Wᵀ over the bytes of W. REQUIRES: kRows.
inline PackedMatrix InColumns(const PackedMatrix& matrix) {
  return {matrix.data, matrix.dtype, matrix.cols, matrix.rows, MatrixLayout::kColumns};
}

// Rows of a packed panel: fused matrices start each segment at a multiple of this.
inline constexpr int64_t kPanelRows = 16;
// Columns are padded with zeros to a multiple of this.
inline constexpr int64_t kPanelCols = 32;

constexpr int64_t RoundUp(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Bytes that a packed [rows, cols] matrix of `dtype` takes.
int64_t PackedBytes(DType dtype, int64_t rows, int64_t cols);

namespace cpu {

// Writes the rows of `source` [n, cols] (float32 or bf16) as rows [first_row, first_row + n) of the packed matrix at `destination`
// (rows x cols in all, of `dtype`; converts with round-to-nearest-even). REQUIRES: first_row + n <= rows, destination zeroed before
// the first call (padding stays zero). Calls for distinct rows may run at the same time.
void PackRows(const TensorView& source, DType dtype, int64_t rows, int64_t cols, int64_t first_row, void* destination);

// Row `row` of W as float: out [cols]. Exact.
void UnpackRow(const PackedMatrix& matrix, int64_t row, float* out);

}  // namespace cpu
}  // namespace bebop
