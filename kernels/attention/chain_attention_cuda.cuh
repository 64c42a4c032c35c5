// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/attention/attention_cuda.cuh"
#include "kernels/attention/chain_attention.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/common/gpu.h"
#include "kernels/common/gpu_vector.h"

// What the kernels of chain attention share. Tiles are of the batch's rows, whatever document they belong to: row r sees base
// entry j where row_first[r] <= j <= r. As documents ascend and cover the batch, row_first ascends as well, so the entries that a
// tile of rows sees are one range, and so are the rows that see a tile of entries.
//
// Queries, keys, values and gradients are float32 in memory and bf16 in shared memory, for mma.m16n8k16 with float32 sums; a
// row's own chain stays in float32. Shared tiles have kDim columns, those beyond head_dim are zeros.
namespace bebop::cuda::chain_attention {

inline constexpr int kWarp = 32;
inline constexpr int kWarps = 4;
inline constexpr int kThreads = kWarps * kWarp;
inline constexpr int kRowTile = kWarps * 16;  // rows (in the last pass of the backward, keys) of a block
inline constexpr int kStepTile = 32;          // keys (there, rows) of a turn of its loop
inline constexpr int kStepColumns = kStepTile / 8;
inline constexpr int kMaxChain = 8;
inline constexpr int kMaxHeadDim = 256;
inline constexpr float kLn2 = 0.693147180559945309f;

// ChainAttentionArgs as kernels take them.
struct Params {
  TensorView q, q_gate, base_k, base_v, attended, log_sum, out;
  TensorView chain_k[kMaxChain], chain_v[kMaxChain];
  const int32_t* row_first;  // [R] of each row the first row of its document
  const int32_t* row_end;    // [R] and one more than its last row
  int32_t num_rows;
  int32_t num_chain;
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t group;  // q heads of a kv head
  int32_t head_dim;
  float scale;  // of scores: 1/√head_dim
};

// Checks the arguments, makes row_first and row_end in the workspace (enqueued); *workspace_left <- what follows them.
Params Prepare(const ChainAttentionArgs& args, void** workspace_left, Stream& stream);

// ---- Device helpers ----

// Where a lane stands in the fragments of mma and ldmatrix.
struct Lane {
  int quad_row, quad_column;  // of its accumulators: rows quad_row, quad_row + 8; columns quad_column, quad_column + 1
  int matrix, low_row, high_row;
  __device__ explicit Lane(int lane)
      : quad_row(lane / 4),
        quad_column(lane % 4 * 2),
        matrix(lane / 8),
        low_row((lane / 8 & 1) * 8 + lane % 8),
        high_row((lane / 8 >> 1) * 8 + lane % 8) {}
};

// Rows [first_row, first_row + kRows) of columns [column, column + head_dim), as bf16 into a shared tile [kRows][kDim]. Rows from
// num_rows on are zeros. Barriers around are the caller's.
template <int kDim, int kRows>
__device__ inline void FillTile(const TensorView& view, int column, int first_row, int num_rows, int head_dim, BFloat16* tile) {
  constexpr int kChunks = kDim / 8;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    float values[gpu::kVector] = {};
    if (first_row + row < num_rows && chunk * 8 < head_dim) {
      gpu::Load8(gpu::Row<float>(view, first_row + row) + column + chunk * 8, values);
    }
    gpu::Store8(tile + attention::Swizzle<kDim>(row, chunk), values);
  }
}

// sums <- rows [a_row, a_row + 16) of `a` times rows [0, 8·kTiles) of `b` transposed; both tiles have kDim columns.
template <int kDim, int kTiles>
__device__ inline void MultiplyRows(const BFloat16* a, int a_row, const BFloat16* b, const Lane& lane, float (&sums)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[n][e] = 0.0f;
  }
#pragma unroll 4
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t left[4];
    gpu::LdMatrixX4(left, a + attention::Swizzle<kDim>(a_row + lane.low_row, step * 2 + (lane.matrix >> 1)));
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t right[4];
      gpu::LdMatrixX4(right, b + attention::Swizzle<kDim>(n * 8 + lane.high_row, step * 2 + (lane.matrix & 1)));
      const uint32_t right0[2] = {right[0], right[1]}, right1[2] = {right[2], right[3]};
      gpu::MmaBf16(sums[n], left, right0);
      gpu::MmaBf16(sums[n + 1], left, right1);
    }
  }
}

// acc [16, kDim] += weights [16, 8·kTiles] times the tile's rows. weights[n][h]: this lane's pair of columns 8·n + quad_column of
// row quad_row + 8·h: accumulators of MultiplyRows, rounded.
template <int kDim, int kTiles>
__device__ inline void AddWeightedRows(const uint32_t (&weights)[kTiles][2], const BFloat16* tile, const Lane& lane,
                                       float (&acc)[kDim / 8][4]) {
#pragma unroll
  for (int step = 0; step < kTiles / 2; ++step) {
    const uint32_t left[4] = {weights[2 * step][0], weights[2 * step][1], weights[2 * step + 1][0], weights[2 * step + 1][1]};
#pragma unroll
    for (int n = 0; n < kDim / 8; n += 2) {
      uint32_t right[4];
      gpu::LdMatrixX4Trans(right, tile + attention::Swizzle<kDim>(step * 16 + lane.low_row, n + (lane.matrix >> 1)));
      const uint32_t right0[2] = {right[0], right[1]}, right1[2] = {right[2], right[3]};
      gpu::MmaBf16(acc[n], left, right0);
      gpu::MmaBf16(acc[n + 1], left, right1);
    }
  }
}

// Runs `launch` with the number of columns that hold head_dim: launch(std::integral_constant<int, kDim>).
template <typename Launch>
void SelectDim(int head_dim, const Launch& launch) {
  if (head_dim <= 64) {
    launch(std::integral_constant<int, 64>{});
  } else if (head_dim <= 128) {
    launch(std::integral_constant<int, 128>{});
  } else {
    launch(std::integral_constant<int, 256>{});
  }
}

}  // namespace bebop::cuda::chain_attention
