// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/gpu.h"

// The second half of a sum over rows that many blocks share (`*_cuda.cu` only): each block has left its part as one row of
// partial sums, and a launch of AddColumnSums adds these up. Two launches instead of atomics, so that a sum has one order.
namespace bebop::gpu {

inline constexpr int kSumColumns = 32;  // of a block
inline constexpr int kSumRuns = 16;     // of rows, a warp each
inline constexpr int kSumThreads = kSumColumns * kSumRuns;

constexpr unsigned SumBlocksOf(int64_t cols) { return static_cast<unsigned>((cols + kSumColumns - 1) / kSumColumns); }

// out[c] += Σ_r partials[r, c] for the columns of block x, in an order that num_rows alone decides. partials: [num_rows, cols],
// rows `stride` apart. sums: kSumThreads floats of shared memory. All kSumThreads threads of the block take part.
__device__ inline void AddColumnSums(const float* partials, int num_rows, int cols, int stride, float* out, float* sums) {
  const int lane = static_cast<int>(threadIdx.x) % kSumColumns, run = static_cast<int>(threadIdx.x) / kSumColumns;
  const int col = static_cast<int>(blockIdx.x) * kSumColumns + lane;
  const int run_rows = (num_rows + kSumRuns - 1) / kSumRuns, end = min(num_rows, (run + 1) * run_rows);
  float sum = 0.0f;
  if (col < cols) {
#pragma unroll 4
    for (int row = run * run_rows; row < end; ++row) sum += partials[static_cast<int64_t>(row) * stride + col];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (run != 0 || col >= cols) return;
  for (int i = 1; i < kSumRuns; ++i) sum += sums[i * kSumColumns + lane];
  out[col] += sum;
}

}  // namespace bebop::gpu
