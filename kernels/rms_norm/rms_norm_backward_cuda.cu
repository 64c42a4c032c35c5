// SPDX-License-Identifier: Apache-2.0
// Backward of RMSNorm. A block takes 8 rows (more where there are more than 8,192), one after the other; its threads keep their
// columns of dweight in shared memory over all of them, and leave them as one row of partial sums for a second launch.
//
// A row is read twice, for its two sums and for dx, the second time from L1. T·H·12 bytes, 16 with accumulate_dx, and T·H for the
// partial sums (written and read again): memory bound, 2,048 rows of H = 2560 are 89 MB (estimated: 21 µs).
//
// All sums are float32 in an order that T and H alone decide.

#include <algorithm>

#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/common/gpu.h"
#include "kernels/common/gpu_column_sums.h"
#include "kernels/common/gpu_vector.h"
#include "kernels/rms_norm/rms_norm_backward.h"

namespace bebop::cuda {
namespace {

using gpu::IsFloatRows;
using gpu::kVector;

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int64_t kBlockRows = 8;
constexpr int64_t kMaxBlocks = 1024;  // bounds the partial sums

// Block x: rows [x * block_rows, ...). Dynamic shared memory: [H] floats.
__global__ void __launch_bounds__(kMaxThreads) RmsNormBackwardKernel(RmsNormBackwardArgs args, int block_rows, float* partials) {
  BEBOP_DYNAMIC_SHARED(float, dweight);
  __shared__ float squares[kMaxThreads / kWarp], dots[kMaxThreads / kWarp];
  const int thread = static_cast<int>(threadIdx.x), num_threads = static_cast<int>(blockDim.x);
  const int lane = thread % kWarp, width = static_cast<int>(args.x.cols);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * block_rows;
  const int64_t end = min(begin + block_rows, args.x.rows);
  // A thread has the same columns in every loop, so that no barrier is needed for dweight, nor where dx is dy.
  for (int col = thread * kVector; col < width; col += num_threads * kVector) {
    const float zeros[kVector] = {};
    gpu::Store8(dweight + col, zeros);
  }
  for (int64_t row = begin; row < end; ++row) {
    const float* const x_row = gpu::Row<float>(args.x, row);
    const float* const dy_row = gpu::Row<float>(args.dy, row);
    float square = 0.0f, dot = 0.0f;  // Σ x², Σ x·dy·(1 + weight)
    for (int col = thread * kVector; col < width; col += num_threads * kVector) {
      float x[kVector], dy[kVector], weight[kVector];
      gpu::Load8(x_row + col, x);
      gpu::Load8(dy_row + col, dy);
      gpu::Load8(args.weight + col, weight);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        square = fmaf(x[i], x[i], square);
        dot = fmaf(x[i], dy[i] * (1.0f + weight[i]), dot);
      }
    }
    square = gpu::GroupSum<kWarp>(square);
    dot = gpu::GroupSum<kWarp>(dot);
    __syncthreads();  // everybody has read the sums of the row before
    if (lane == 0) {
      squares[thread / kWarp] = square;
      dots[thread / kWarp] = dot;
    }
    __syncthreads();
    square = gpu::GroupSum<kWarp>(lane < num_threads / kWarp ? squares[lane] : 0.0f);
    dot = gpu::GroupSum<kWarp>(lane < num_threads / kWarp ? dots[lane] : 0.0f);
    const float scale = 1.0f / sqrtf(square / static_cast<float>(width) + args.eps);
    const float mean = dot * scale / static_cast<float>(width);
    for (int col = thread * kVector; col < width; col += num_threads * kVector) {
      float x[kVector], dy[kVector], sums[kVector];
      gpu::Load8(x_row + col, x);
      gpu::Load8(dy_row + col, dy);
      gpu::Load8(dweight + col, sums);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        x[i] *= scale;
        sums[i] = fmaf(dy[i], x[i], sums[i]);
      }
      gpu::Store8(dweight + col, sums);
      if (args.dx.data == nullptr) continue;
      float weight[kVector], dx[kVector] = {};
      gpu::Load8(args.weight + col, weight);
      if (args.accumulate_dx) gpu::Load8(gpu::Row<float>(args.dx, row) + col, dx);
#pragma unroll
      for (int i = 0; i < kVector; ++i) dx[i] += scale * (dy[i] * (1.0f + weight[i]) - x[i] * mean);
      gpu::Store8(gpu::Row<float>(args.dx, row) + col, dx);
    }
  }
  for (int col = thread * kVector; col < width; col += num_threads * kVector) {
    float sums[kVector];
    gpu::Load8(dweight + col, sums);
    gpu::Store8(partials + static_cast<int64_t>(blockIdx.x) * width + col, sums);
  }
}

__global__ void __launch_bounds__(gpu::kSumThreads)
    RmsNormWeightKernel(const float* partials, int num_blocks, int width, float* dweight) {
  __shared__ float sums[gpu::kSumThreads];
  gpu::AddColumnSums(partials, num_blocks, width, width, dweight, sums);
}

}  // namespace

void RmsNormBackward(const RmsNormBackwardArgs& args, Stream& stream) {
  const int64_t rows = args.x.rows, width = args.x.cols;
  BEBOP_CHECK(width > 0 && IsFloatRows(args.x, rows, width) && IsFloatRows(args.dy, rows, width));
  BEBOP_CHECK(args.dx.data == nullptr || IsFloatRows(args.dx, rows, width));
  BEBOP_CHECK(gpu::RowsAligned(args.weight, DType::kFloat32, width, 0) && args.dweight != nullptr);
  if (rows == 0) return;
  const int64_t block_rows = std::max(kBlockRows, (rows + kMaxBlocks - 1) / kMaxBlocks);
  const int64_t num_blocks = (rows + block_rows - 1) / block_rows;
  BEBOP_CHECK(num_blocks * width * int64_t{sizeof(float)} <= stream.workspace_bytes());
  const int64_t vectors = (width / kVector + kWarp - 1) / kWarp * kWarp;
  auto* const partials = static_cast<float*>(stream.workspace());
  BEBOP_CUDA_TRY(stream, gpu::Launch(RmsNormBackwardKernel, dim3(static_cast<unsigned>(num_blocks)),
                                     dim3(static_cast<unsigned>(std::min<int64_t>(vectors, kMaxThreads))),
                                     static_cast<size_t>(width) * sizeof(float), stream.handle(), args,
                                     static_cast<int>(block_rows), partials));
  BEBOP_CUDA_TRY(stream,
                 gpu::Launch(RmsNormWeightKernel, dim3(gpu::SumBlocksOf(width)), dim3(gpu::kSumThreads), 0, stream.handle(),
                             partials, static_cast<int>(num_blocks), static_cast<int>(width), args.dweight));
}

}  // namespace bebop::cuda
