// SPDX-License-Identifier: Apache-2.0
// Conversion between float32 and bf16 for the operands of training's products: eight values a thread, 6 bytes a value, memory
// bound (2,048 rows of 9,216 are 113 MB, estimated: 26 µs). Beside a product of N outputs that is 6 bytes against 2·N operations
// a value, 20 % of the product's time at N = 2560 and 3 % at N = 18,432, at full rate of either.

#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/common/gpu.h"
#include "kernels/common/gpu_vector.h"
#include "kernels/linear/linear_backward.h"

namespace bebop::cuda {
namespace {

using gpu::kVector;

constexpr int kThreads = 256;

// Block (x, y): row x, vectors [y * kThreads, (y + 1) * kThreads).
__global__ void __launch_bounds__(kThreads) ConvertKernel(TensorView from, TensorView to) {
  const int64_t row = blockIdx.x;
  const int64_t col = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kVector;
  if (col >= from.cols) return;
  float values[kVector];
  gpu::Load8(from.data, from.dtype, row * from.row_stride + col, values);
  gpu::Store8(to.data, to.dtype, row * to.row_stride + col, values);
}

}  // namespace

void Convert(const TensorView& from, const TensorView& to, Stream& stream) {
  BEBOP_CHECK(from.rows == to.rows && from.cols == to.cols && gpu::RowsAligned(from) && gpu::RowsAligned(to));
  if (from.rows == 0 || from.cols == 0) return;
  const int64_t blocks = (from.cols / kVector + kThreads - 1) / kThreads;
  BEBOP_CUDA_TRY(stream, gpu::Launch(ConvertKernel, dim3(static_cast<unsigned>(from.rows), static_cast<unsigned>(blocks)),
                                     dim3(kThreads), 0, stream.handle(), from, to));
}

}  // namespace bebop::cuda
