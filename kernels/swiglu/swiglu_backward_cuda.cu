// SPDX-License-Identifier: Apache-2.0
// Backward of SwiGLU: eight values a thread. T·F·24 bytes and some 30 operations a value: memory bound (the 4B model's F = 9216:
// 2,048 rows move 453 MB, estimated: 105 µs).

#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/common/gpu.h"
#include "kernels/common/gpu_vector.h"
#include "kernels/swiglu/swiglu_backward.h"

namespace bebop::cuda {
namespace {

using gpu::kVector;

constexpr int kThreads = 256;

// Block (x, y): row x, vectors [y * kThreads, (y + 1) * kThreads). A thread reads its values before it writes any, so outputs may
// be inputs.
__global__ void __launch_bounds__(kThreads) SwiGluBackwardKernel(SwiGluBackwardArgs args) {
  const int64_t row = blockIdx.x;
  const int64_t col = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kVector;
  if (col >= args.gate.cols) return;
  float gate[kVector], up[kVector], dout[kVector];
  gpu::Load8(gpu::Row<float>(args.gate, row) + col, gate);
  gpu::Load8(gpu::Row<float>(args.up, row) + col, up);
  gpu::Load8(gpu::Row<float>(args.dout, row) + col, dout);
  float dgate[kVector], dup[kVector], out[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float sigmoid = 1.0f / (1.0f + expf(-gate[i])), silu = gate[i] * sigmoid;
    dgate[i] = dout[i] * up[i] * sigmoid * (1.0f + gate[i] * (1.0f - sigmoid));
    dup[i] = dout[i] * silu;
    out[i] = silu * up[i];
  }
  gpu::Store8(gpu::Row<float>(args.dgate, row) + col, dgate);
  gpu::Store8(gpu::Row<float>(args.dup, row) + col, dup);
  gpu::Store8(gpu::Row<float>(args.out, row) + col, out);
}

}  // namespace

void SwiGluBackward(const SwiGluBackwardArgs& args, Stream& stream) {
  for (const TensorView& view : {args.gate, args.up, args.dout, args.dgate, args.dup, args.out}) {
    BEBOP_CHECK(view.rows == args.gate.rows && view.cols == args.gate.cols && view.dtype == DType::kFloat32);
    BEBOP_CHECK(gpu::RowsAligned(view));
  }
  if (args.gate.rows == 0 || args.gate.cols == 0) return;
  const int64_t blocks = (args.gate.cols / kVector + kThreads - 1) / kThreads;
  BEBOP_CUDA_TRY(stream,
                 gpu::Launch(SwiGluBackwardKernel, dim3(static_cast<unsigned>(args.gate.rows), static_cast<unsigned>(blocks)),
                             dim3(kThreads), 0, stream.handle(), args));
}

}  // namespace bebop::cuda
