// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/dtype.h"

namespace bebop {

// A borrowed row-major matrix [rows, cols] whose rows lie `row_stride` elements apart (>= cols).
// Owns nothing; the memory must outlive every use. On the CPU activations are kFloat32; a device keeps the
// residual stream in kFloat32 and the rest in the model's dtype.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;

  // Row `row` as T. REQUIRES: T is the C++ type of `dtype`, 0 <= row < rows.
  template <typename T>
  T* Row(int64_t row) const {
    return static_cast<T*>(data) + row * row_stride;
  }
  // Columns [begin, begin + count) of the same rows.
  TensorView Columns(int64_t begin, int64_t count) const {
    return {static_cast<char*>(data) + begin * ElementBytes(dtype), dtype, rows, count, row_stride};
  }
  // Rows [begin, begin + count).
  TensorView Rows(int64_t begin, int64_t count) const {
    return {static_cast<char*>(data) + begin * row_stride * ElementBytes(dtype), dtype, count, cols, row_stride};
  }
};

// A dense float matrix.
inline TensorView FloatMatrix(float* data, int64_t rows, int64_t cols) {
  return {data, DType::kFloat32, rows, cols, cols};
}

}  // namespace bebop
