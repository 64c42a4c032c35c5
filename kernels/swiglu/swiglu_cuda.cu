// SPDX-License-Identifier: Apache-2.0
// SwiGLU: out = SiLU(gate) · up, eight values a thread. T·F·6 bytes in bf16 and some 25 operations a value, so large T is memory
// bound (the 4B model's F = 9216: 2,048 rows move 113 MB, estimated: 26 µs); a decode step's few rows take the latency of one
// load and the launch. The accurate exponential and quotient fit: at full memory speed an SM has about 40 float operations for
// each value.

#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/common/gpu.h"
#include "kernels/common/gpu_vector.h"
#include "kernels/swiglu/swiglu.h"

namespace bebop::cuda {
namespace {

using gpu::kVector;

constexpr int kThreads = 256;

// Block (x, y): row x, vectors [y * kThreads, (y + 1) * kThreads).
template <typename T>
__global__ void __launch_bounds__(kThreads) SwiGluKernel(SwiGluArgs args) {
  const int64_t row = blockIdx.x;
  const int64_t col = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kVector;
  if (col >= args.gate.cols) return;
  float gate[kVector], up[kVector];
  gpu::Load8(gpu::Row<T>(args.gate, row) + col, gate);
  gpu::Load8(gpu::Row<T>(args.up, row) + col, up);
#pragma unroll
  for (int i = 0; i < kVector; ++i) gate[i] = gpu::Silu(gate[i]) * up[i];
  gpu::Store8(gpu::Row<T>(args.out, row) + col, gate);
}

}  // namespace

void SwiGlu(const SwiGluArgs& args, Stream& stream) {
  for (const TensorView& view : {args.gate, args.up, args.out}) {
    BEBOP_CHECK(view.rows == args.gate.rows && view.cols == args.gate.cols && view.dtype == args.gate.dtype);
    BEBOP_CHECK(gpu::RowsAligned(view));
  }
  if (args.gate.rows == 0 || args.gate.cols == 0) return;
  const int64_t blocks = (args.gate.cols / kVector + kThreads - 1) / kThreads;
  const auto kernel = args.gate.dtype == DType::kFloat32 ? SwiGluKernel<float> : SwiGluKernel<BFloat16>;
  BEBOP_CUDA_TRY(stream, gpu::Launch(kernel, dim3(static_cast<unsigned>(args.gate.rows), static_cast<unsigned>(blocks)),
                                     dim3(kThreads), 0, stream.handle(), args));
}

}  // namespace bebop::cuda
