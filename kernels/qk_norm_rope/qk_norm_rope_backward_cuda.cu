// SPDX-License-Identifier: Apache-2.0
// Backward of QkNormRope. A block takes 8 rows (more where there are more than 8,192) and all their heads, a warp one head of one
// row at a time, eight values a lane. A warp keeps its part of the weight gradients in registers; the block adds them up, warp by
// warp, and leaves them as one row of partial sums for a second launch.
//
// T·(nq + nkv)·D·12 bytes: memory bound, 2,048 rows of the 4B model (16 and 4 heads of 256) are 126 MB (estimated: 29 µs). Cos
// and sin, in double, are computed once a row.
//
// All sums are float32 in an order that T and the number of heads decide.

#include <algorithm>

#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/common/gpu.h"
#include "kernels/common/gpu_column_sums.h"
#include "kernels/common/gpu_vector.h"
#include "kernels/qk_norm_rope/qk_norm_rope_backward.h"
#include "kernels/qk_norm_rope/rotation_cuda.cuh"

namespace bebop::cuda {
namespace {

using gpu::IsFloatRows;
using gpu::kVector;

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTurnRows = 8;                    // whose angles are in shared memory at a time
constexpr int64_t kMaxBlocks = 1024;            // bounds the partial sums
static_assert(kMaxHeadDim == kWarp * kVector);  // one vector a lane

// Block x: rows [x * block_rows, ...). partials: [blocks, 2 * head_dim], of q_norm then k_norm.
__global__ void __launch_bounds__(kThreads)
    QkNormRopeBackwardKernel(QkNormRopeBackwardArgs args, Frequencies frequencies, int block_rows, float* partials) {
  __shared__ float cosines[kTurnRows][kMaxHeadDim / 2], sines[kTurnRows][kMaxHeadDim / 2];
  alignas(16) __shared__ float turned[kWarps][kMaxHeadDim];  // gradients before the rotation; in the end the warps' sums
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int dim = args.head_dim, half = args.rotary_dim / 2, first = lane * kVector;
  const int num_heads = args.num_q_heads + args.num_kv_heads;
  const bool active = first < dim;  // other lanes stay for the shuffles and barriers
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * block_rows;
  const int64_t end = min(begin + block_rows, args.q_gate.rows);

  float q_sums[kVector] = {}, k_sums[kVector] = {};
  for (int64_t turn = begin; turn < end; turn += kTurnRows) {
    const int num_rows = static_cast<int>(min(int64_t{kTurnRows}, end - turn));
    __syncthreads();  // nobody reads the angles of the turn before
    for (int i = thread; i < num_rows * half; i += kThreads) {
      const int row = i / half, pair = i % half;
      CosSinOfTurns(args.row_position[turn + row] * frequencies.turns[pair], &cosines[row][pair], &sines[row][pair]);
    }
    __syncthreads();  // the angles are there
    for (int item = warp; item < num_rows * num_heads; item += kWarps) {
      const int turn_row = item / num_heads, head = item % num_heads, kv_head = head - args.num_q_heads;
      const bool is_query = head < args.num_q_heads;
      const int64_t row = turn + turn_row;
      float x[kVector] = {}, dy[kVector] = {}, weight[kVector] = {};
      if (active) {
        gpu::Load8((is_query ? gpu::Row<float>(args.q_gate, row) + int64_t{2} * head * dim
                             : gpu::Row<float>(args.k, row) + int64_t{kv_head} * dim) +
                       first,
                   x);
        gpu::Load8((is_query ? gpu::Row<float>(args.dq, row) + int64_t{head} * dim
                             : gpu::Row<float>(args.dk, row) + int64_t{kv_head} * dim) +
                       first,
                   dy);
        gpu::Load8((is_query ? args.q_norm : args.k_norm) + first, weight);
        gpu::Store8(turned[warp] + first, dy);
      }
      __syncwarp();
      // Pairs may lie in other lanes at any distance: they meet in shared memory. Undoing the rotation is the rotation by the
      // negative angle.
      if (active) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const int at = first + i;
          if (at < half) {
            dy[i] = dy[i] * cosines[turn_row][at] + turned[warp][at + half] * sines[turn_row][at];
          } else if (at < 2 * half) {
            dy[i] = dy[i] * cosines[turn_row][at - half] - turned[warp][at - half] * sines[turn_row][at - half];
          }
        }
      }
      float square = 0.0f, dot = 0.0f;  // Σ x², Σ x·dy·(1 + weight)
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        square = fmaf(x[i], x[i], square);
        dot = fmaf(x[i], dy[i] * (1.0f + weight[i]), dot);
      }
      const float scale = 1.0f / sqrtf(gpu::GroupSum<kWarp>(square) / static_cast<float>(dim) + args.eps);
      const float mean = gpu::GroupSum<kWarp>(dot) * scale / static_cast<float>(dim);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        x[i] *= scale;
        const float product = dy[i] * x[i];
        if (is_query) {
          q_sums[i] += product;
        } else {
          k_sums[i] += product;
        }
        dy[i] = scale * (dy[i] * (1.0f + weight[i]) - x[i] * mean);
      }
      if (active) {
        gpu::Store8((is_query ? gpu::Row<float>(args.dq_gate, row) + int64_t{2} * head * dim
                              : gpu::Row<float>(args.dk_out, row) + int64_t{kv_head} * dim) +
                        first,
                    dy);
      }
      __syncwarp();  // turned[warp] is free again
    }
  }

  for (int is_key = 0; is_key < 2; ++is_key) {
    __syncthreads();  // `turned` is free
    if (active) gpu::Store8(turned[warp] + first, is_key == 0 ? q_sums : k_sums);
    __syncthreads();  // all warps' sums are there
    if (thread >= dim) continue;
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += turned[w][thread];
    partials[(static_cast<int64_t>(blockIdx.x) * 2 + is_key) * dim + thread] = sum;
  }
}

// Block (x, y): columns of q_norm's gradient (y = 0) or k_norm's.
__global__ void __launch_bounds__(gpu::kSumThreads)
    QkNormWeightKernel(const float* partials, int num_blocks, int dim, float* dq_norm, float* dk_norm) {
  __shared__ float sums[gpu::kSumThreads];
  gpu::AddColumnSums(partials + static_cast<int>(blockIdx.y) * dim, num_blocks, dim, 2 * dim, blockIdx.y == 0 ? dq_norm : dk_norm,
                     sums);
}

}  // namespace

void QkNormRopeBackward(const QkNormRopeBackwardArgs& args, Stream& stream) {
  const int64_t rows = args.q_gate.rows, dim = args.head_dim, q_width = args.num_q_heads * dim,
                kv_width = args.num_kv_heads * dim;
  BEBOP_CHECK(dim > 0 && dim <= kMaxHeadDim && dim % kVector == 0);
  BEBOP_CHECK(args.rotary_dim >= 0 && args.rotary_dim <= dim && args.rotary_dim % 2 == 0);
  BEBOP_CHECK(IsFloatRows(args.q_gate, rows, 2 * q_width) && IsFloatRows(args.dq_gate, rows, 2 * q_width));
  BEBOP_CHECK(IsFloatRows(args.k, rows, kv_width) && IsFloatRows(args.dk_out, rows, kv_width));
  BEBOP_CHECK(IsFloatRows(args.dq, rows, q_width) && IsFloatRows(args.dk, rows, kv_width));
  BEBOP_CHECK(gpu::RowsAligned(args.q_norm, DType::kFloat32, dim, 0) && gpu::RowsAligned(args.k_norm, DType::kFloat32, dim, 0));
  if (rows == 0) return;
  const int64_t block_rows = std::max<int64_t>(kTurnRows, (rows + kMaxBlocks - 1) / kMaxBlocks);
  const int64_t num_blocks = (rows + block_rows - 1) / block_rows;
  BEBOP_CHECK(num_blocks * 2 * dim * int64_t{sizeof(float)} <= stream.workspace_bytes());
  auto* const partials = static_cast<float*>(stream.workspace());
  BEBOP_CUDA_TRY(
      stream, gpu::Launch(QkNormRopeBackwardKernel, dim3(static_cast<unsigned>(num_blocks)), dim3(kThreads), 0, stream.handle(),
                          args, MakeFrequencies(args.rotary_dim, args.rope_theta), static_cast<int>(block_rows), partials));
  BEBOP_CUDA_TRY(stream,
                 gpu::Launch(QkNormWeightKernel, dim3(gpu::SumBlocksOf(dim), 2), dim3(gpu::kSumThreads), 0, stream.handle(),
                             partials, static_cast<int>(num_blocks), static_cast<int>(dim), args.dq_norm, args.dk_norm));
}

}  // namespace bebop::cuda
