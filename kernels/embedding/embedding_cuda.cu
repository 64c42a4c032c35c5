// SPDX-License-Identifier: Apache-2.0
// Embedding: a block copies one row of the table, sixteen bytes of bf16 a thread, and widens or narrows it on the way. T·H·(2 +
// 4) bytes from bf16 to float32: latency bound for a decode step (two dependent loads and the launch), memory bound for a long
// prompt chunk.

#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/common/gpu.h"
#include "kernels/common/gpu_vector.h"
#include "kernels/embedding/embedding.h"

namespace bebop::cuda {
namespace {

using gpu::kVector;

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) EmbeddingKernel(EmbeddingArgs args) {
  const int64_t row = blockIdx.x;
  const int64_t token = args.token_ids[row];
  for (int64_t col = static_cast<int64_t>(threadIdx.x) * kVector; col < args.table.cols; col += kThreads * kVector) {
    float values[kVector] = {};
    if (token < args.table.rows) gpu::Load8(args.table.data, args.table.dtype, token * args.table.cols + col, values);
    gpu::Store8(args.out.data, args.out.dtype, row * args.out.row_stride + col, values);
  }
}

}  // namespace

void Embedding(const EmbeddingArgs& args, Stream& stream) {
  const TensorView& out = args.out;
  BEBOP_CHECK(out.cols == args.table.cols && args.table.layout == MatrixLayout::kRows);
  BEBOP_CHECK(gpu::RowsAligned(args.table.data, args.table.dtype, args.table.cols, args.table.cols));
  BEBOP_CHECK(gpu::RowsAligned(out));
  if (out.rows == 0) return;
  BEBOP_CUDA_TRY(stream,
                 gpu::Launch(EmbeddingKernel, dim3(static_cast<unsigned>(out.rows)), dim3(kThreads), 0, stream.handle(), args));
}

}  // namespace bebop::cuda
