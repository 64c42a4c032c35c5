// SPDX-License-Identifier: Apache-2.0
#include "kernels/linear/packed_matrix.h"

#include "kernels/common/check.h"

namespace bebop {

int64_t PackedBytes(DType dtype, int64_t rows, int64_t cols) {
  return RoundUp(rows, kPanelRows) * RoundUp(cols, kPanelCols) * ElementBytes(dtype);
}

namespace cpu {
namespace {

BFloat16 Convert(BFloat16 value, BFloat16*) { return value; }
BFloat16 Convert(float value, BFloat16*) { return ToBFloat16(value); }
float Convert(BFloat16 value, float*) { return ToFloat(value); }
float Convert(float value, float*) { return value; }

// Elements of a row that lie side by side in a panel: a VNNI pair of bf16, or one float.
template <typename T>
constexpr int64_t kGroup = 4 / sizeof(T);

// The first element of `row`; the group of columns [c, c + kGroup) lies c * kPanelRows elements further on.
template <typename T>
int64_t RowOffset(int64_t row, int64_t cols) {
  return row / kPanelRows * kPanelRows * RoundUp(cols, kPanelCols) + row % kPanelRows * kGroup<T>;
}

template <typename Source, typename Destination>
void PackTyped(const TensorView& source, int64_t cols, int64_t first_row, Destination* destination) {
  constexpr int64_t kColsPerGroup = kGroup<Destination>;
  // Column blocks of one panel stay in L1 while its rows are written one after the other.
  constexpr int64_t kBlock = 8 * kPanelCols;
  for (int64_t row = 0; row < source.rows;) {
    const int64_t panel_end = RoundUp(first_row + row + 1, kPanelRows) - first_row;
    const int64_t end = panel_end < source.rows ? panel_end : source.rows;
    for (int64_t block = 0; block < cols; block += kBlock) {
      const int64_t block_end = block + kBlock < cols ? block + kBlock : cols;
      for (int64_t r = row; r < end; ++r) {
        const Source* from = source.Row<Source>(r);
        Destination* to = destination + RowOffset<Destination>(first_row + r, cols);
        for (int64_t c = block; c < block_end; ++c) {
          to[c / kColsPerGroup * kColsPerGroup * kPanelRows + c % kColsPerGroup] = Convert(from[c], to);
        }
      }
    }
    row = end;
  }
}

template <typename T>
void UnpackTyped(const PackedMatrix& matrix, int64_t row, float* out) {
  const T* from = static_cast<const T*>(matrix.data) + RowOffset<T>(row, matrix.cols);
  for (int64_t c = 0; c < matrix.cols; ++c) {
    out[c] = ToFloat(from[c / kGroup<T> * kGroup<T> * kPanelRows + c % kGroup<T>]);
  }
}

}  // namespace

void PackRows(const TensorView& source, DType dtype, int64_t rows, int64_t cols, int64_t first_row, void* destination) {
  BEBOP_CHECK(source.cols == cols && first_row >= 0 && first_row + source.rows <= rows);
  const bool from_float = source.dtype == DType::kFloat32;
  if (dtype == DType::kFloat32) {
    auto* to = static_cast<float*>(destination);
    from_float ? PackTyped<float>(source, cols, first_row, to) : PackTyped<BFloat16>(source, cols, first_row, to);
  } else {
    auto* to = static_cast<BFloat16*>(destination);
    from_float ? PackTyped<float>(source, cols, first_row, to) : PackTyped<BFloat16>(source, cols, first_row, to);
  }
}

void UnpackRow(const PackedMatrix& matrix, int64_t row, float* out) {
  BEBOP_DCHECK(row >= 0 && row < matrix.rows);
  matrix.dtype == DType::kFloat32 ? UnpackTyped<float>(matrix, row, out) : UnpackTyped<BFloat16>(matrix, row, out);
}

}  // namespace cpu
}  // namespace bebop
