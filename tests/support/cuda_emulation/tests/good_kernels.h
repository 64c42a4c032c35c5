// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

// Kernels that keep all rules, each with a use of the device that the checks must let pass.
namespace bebop::emulation_tests {

// y[row] = sum of x[row, :]; shuffles and a block reduction.
cudaError_t RowSums(const float* x, float* y, int rows, int cols, cudaStream_t stream);
// The same sums by the last block to finish, over what all blocks have written: atomics order it. `ticket` is 0 before and after.
cudaError_t TotalSum(const float* x, float* partial_sums, unsigned* ticket, float* total, int rows, int cols,
                     cudaStream_t stream);
// c[m, n] = sum over k of a[m, k] b[n, k], bf16; m a multiple of 16, n of 8, k of 16. Double-buffered asynchronous copies,
// ldmatrix, mma.
cudaError_t ProductBf16(const uint16_t* a, const uint16_t* b, float* c, int m, int n, int k, cudaStream_t stream);
// c[m, n] = sum over k of a[m, k] b[k, n], with transposing ldmatrix.
cudaError_t ProductBf16Trans(const uint16_t* a, const uint16_t* b, float* c, int m, int n, int k, cudaStream_t stream);
// c[16, 8] = a[16, 8] b[8, 8] with b given by columns.
cudaError_t ProductTf32(const float* a, const float* b, float* c, cudaStream_t stream);
// out[thread] = sum of the 16 threads of its half warp, through shared memory and __syncwarp.
cudaError_t HalfWarpSums(const int* in, int* out, int blocks, cudaStream_t stream);
// bins[key] += 1 for n keys below 32; shared and global atomics.
cudaError_t Histogram(const int* keys, unsigned* bins, int n, cudaStream_t stream);
// Each thread writes one half word of a word, in shared and global memory: out[i] = i.
cudaError_t HalfWords(uint16_t* out, int blocks, cudaStream_t stream);
// Waits until *flag (pinned) is not 0, then writes flag + 1 to *answer.
cudaError_t AnswerHost(const volatile int* flag, volatile int* answer, cudaStream_t stream);
// 16 results of votes, reductions and shuffles a lane, for one warp: out[16 * lane + i].
inline constexpr int kNumCollectives = 16;
cudaError_t Collectives(int64_t* out, cudaStream_t stream);
// out[linear index of the thread in the grid] = 1 + linear index, from three-dimensional blocks and grids.
cudaError_t Indices(unsigned* out, dim3 grid, dim3 block, cudaStream_t stream);
cudaError_t Fill(float* data, int n, float value, cudaStream_t stream);
// data[i] = factor * data[i] + summand
cudaError_t Scale(float* data, int n, float factor, float summand, cudaStream_t stream);
// A launch of any shape that does nothing with `shared_bytes` of shared memory.
cudaError_t Nothing(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream);
// The same without saying beforehand that it needs more than 48 KiB.
cudaError_t NothingOptIn(int opt_in_bytes);
// Does `rounds` rounds of one operation, for measuring: 0 nothing, 1 __syncthreads, 2 shuffle, 3 mma, 4 loads from global memory,
// 5 stores to and loads from shared memory.
cudaError_t Measure(int kind, int rounds, int blocks, int threads, float* data, cudaStream_t stream);

}  // namespace bebop::emulation_tests
