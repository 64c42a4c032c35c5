// SPDX-License-Identifier: Apache-2.0
#include "good_kernels.h"

#include "kernels/common/gpu.h"

namespace bebop::emulation_tests {
namespace {

constexpr unsigned kFull = 0xffffffffu;
constexpr int kThreads = 128;

__device__ float BlockSum(float value, float* warp_sums) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFull, value, offset);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += warp_sums[warp];
  __syncthreads();
  return sum;
}

__global__ void __launch_bounds__(kThreads) RowSumsKernel(const float* __restrict__ x, float* __restrict__ y, int cols) {
  __shared__ float warp_sums[kThreads / 32];
  float sum = 0.0f;
  for (int i = threadIdx.x; i < cols; i += kThreads) sum += __ldg(x + static_cast<int64_t>(blockIdx.x) * cols + i);
  sum = BlockSum(sum, warp_sums);
  if (threadIdx.x == 0) y[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    TotalSumKernel(const float* x, float* partial_sums, unsigned* ticket, float* total, int rows, int cols) {
  __shared__ float warp_sums[kThreads / 32];
  __shared__ bool is_last;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < cols; i += kThreads) sum += x[static_cast<int64_t>(blockIdx.x) * cols + i];
  sum = BlockSum(sum, warp_sums);
  if (threadIdx.x == 0) {
    partial_sums[blockIdx.x] = sum;
    __threadfence();
    is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  sum = 0.0f;
  for (int i = threadIdx.x; i < rows; i += kThreads) sum += __ldcg(partial_sums + i);
  sum = BlockSum(sum, warp_sums);
  if (threadIdx.x == 0) {
    *total = sum;
    *ticket = 0;
  }
}

// One warp a tile of 16 x 8; k in steps of 16 through two buffers.
template <bool kTrans>
__global__ void __launch_bounds__(32) ProductKernel(const uint16_t* a, const uint16_t* b, float* c, int n, int k) {
  BEBOP_DYNAMIC_SHARED(uint16_t, buffers);  // [2][16 * 16 of a, 8 * 16 or 16 * 8 of b]
  constexpr int kBuffer = 16 * 16 + 16 * 8;
  const int lane = static_cast<int>(threadIdx.x);
  const int first_row = static_cast<int>(blockIdx.x) * 16, first_col = static_cast<int>(blockIdx.y) * 8;
  const auto load = [&](int step) {
    uint16_t* buffer = buffers + step % 2 * kBuffer;
    gpu::CpAsync16(buffer + lane * 8, a + (first_row + lane / 2) * k + step * 16 + lane % 2 * 8);
    const uint16_t* source =
        kTrans ? b + (step * 16 + lane) * n + first_col : b + (first_col + lane / 2) * k + step * 16 + lane % 2 * 8;
    if (lane < 16) gpu::CpAsync16(buffer + 16 * 16 + lane * 8, source);
    gpu::CpAsyncCommit();
  };
  float sums[4] = {};
  const int steps = k / 16;
  load(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      load(step + 1);
      gpu::CpAsyncWait<1>();
    } else {
      gpu::CpAsyncWait<0>();
    }
    __syncthreads();
    const uint16_t* buffer = buffers + step % 2 * kBuffer;
    uint32_t a_registers[4], b_registers[2];
    gpu::LdMatrixX4(a_registers, buffer + lane % 16 * 16 + lane / 16 * 8);
    if (kTrans) {
      gpu::LdMatrixX2Trans(b_registers, buffer + 16 * 16 + lane % 16 * 8);
    } else {
      gpu::LdMatrixX2(b_registers, buffer + 16 * 16 + lane % 8 * 16 + lane / 8 % 2 * 8);
    }
    gpu::MmaBf16(sums, a_registers, b_registers);
    __syncthreads();  // before the buffer is loaded again
  }
  for (int r = 0; r < 4; ++r) c[(first_row + lane / 4 + r / 2 * 8) * n + first_col + lane % 4 * 2 + r % 2] = sums[r];
}

__global__ void ProductTf32Kernel(const float* a, const float* b, float* c) {
  const int lane = static_cast<int>(threadIdx.x), row = lane / 4, col = lane % 4;
  const uint32_t a_registers[4] = {__float_as_uint(a[row * 8 + col]), __float_as_uint(a[(row + 8) * 8 + col]),
                                   __float_as_uint(a[row * 8 + col + 4]), __float_as_uint(a[(row + 8) * 8 + col + 4])};
  const uint32_t b_registers[2] = {__float_as_uint(b[row * 8 + col]), __float_as_uint(b[row * 8 + col + 4])};
  float sums[4] = {};
  gpu::MmaTf32(sums, a_registers, b_registers);
  for (int r = 0; r < 4; ++r) c[(row + r / 2 * 8) * 8 + col * 2 + r % 2] = sums[r];
}

__global__ void HalfWarpSumsKernel(const int* in, int* out) {
  __shared__ int values[64];
  const unsigned mask = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  const int at = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  for (int round = 0; round < 3; ++round) {
    values[threadIdx.x] = in[at];
    __syncwarp(mask);
    int sum = 0;
    for (int i = 0; i < 16; ++i) sum += values[threadIdx.x / 16 * 16 + (threadIdx.x + i) % 16];
    __syncwarp(mask);
    out[at] = sum;
  }
  // The halves hand their sums to each other through the whole warp.
  values[threadIdx.x] = out[at];
  __syncwarp();
  if (values[threadIdx.x ^ 16] < 0) out[at] = 0;
}

__global__ void HistogramKernel(const int* keys, unsigned* bins, int n) {
  __shared__ unsigned counts[32];
  if (threadIdx.x < 32) counts[threadIdx.x] = 0;
  __syncthreads();
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += static_cast<int>(gridDim.x * blockDim.x)) {
    atomicAdd(&counts[keys[i]], 1u);
  }
  __syncthreads();
  if (threadIdx.x < 32) atomicAdd(bins + threadIdx.x, counts[threadIdx.x]);
}

__global__ void HalfWordsKernel(uint16_t* out) {
  __shared__ uint16_t values[65];
  // Neighbours write the halves of a word, also across blocks: blocks of 63 threads' worth of values.
  const unsigned index = blockIdx.x * 63 + threadIdx.x;
  if (threadIdx.x < 63) values[threadIdx.x + 1] = static_cast<uint16_t>(index);
  __syncthreads();
  if (threadIdx.x < 63) out[index] = values[threadIdx.x + 1];
}

__global__ void AnswerHostKernel(const volatile int* flag, volatile int* answer) {
  while (*flag == 0) __nanosleep(100);
  __syncthreads();
  if (threadIdx.x == 0) *answer = *flag + 1;
  __threadfence_system();
}

__global__ void CollectivesKernel(int64_t* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int64_t* results = out + lane * kNumCollectives;
  results[0] = __shfl_sync(kFull, lane * 10, 7);
  results[1] = __shfl_sync(kFull, lane * 10, 3, 8);
  results[2] = __shfl_up_sync(kFull, lane * 10, 2);
  results[3] = __shfl_up_sync(kFull, lane * 10, 2, 16);
  results[4] = __shfl_down_sync(kFull, lane * 10, 5);
  results[5] = __shfl_down_sync(kFull, lane * 10, 5, 8);
  results[6] = __shfl_xor_sync(kFull, static_cast<int64_t>(lane) << 40, 9);
  results[7] = static_cast<int64_t>(__shfl_xor_sync(kFull, 0.5 * lane, 1) * 4);
  results[8] = __ballot_sync(kFull, lane % 3 == 0);
  results[9] = __any_sync(kFull, lane == 31) + 2 * __any_sync(kFull, lane == 32);
  results[10] = __all_sync(kFull, lane < 32) + 2 * __all_sync(kFull, lane < 31);
  results[11] = __reduce_add_sync(kFull, lane - 20);
  results[12] = __reduce_min_sync(kFull, lane - 20);
  results[13] = __reduce_max_sync(kFull, static_cast<unsigned>(lane) - 20u);
  results[14] = lane % 2 == 0 ? __reduce_add_sync(0x55555555u, static_cast<unsigned>(lane)) : 0;
  results[15] = __match_any_sync(kFull, lane % 5);
}

__global__ void IndicesKernel(unsigned* out) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned index = block * blockDim.x * blockDim.y * blockDim.z + thread;
  out[index] = index + 1;
}

__global__ void FillKernel(float* data, int n, float value) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) data[i] = value;
}
__global__ void ScaleKernel(float* data, int n, float factor, float summand) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) data[i] = factor * data[i] + summand;
}
__global__ void NothingKernel() {}

__global__ void MeasureKernel(int kind, int rounds, float* data) {
  __shared__ float values[1024];
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0.0f, sums[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  for (int i = 0; i < rounds; ++i) {
    if (kind == 1) __syncthreads();
    if (kind == 2) sum += __shfl_xor_sync(kFull, sum, 1);
    if (kind == 3) gpu::MmaBf16(sums, a, b);
    if (kind == 4) sum += data[(i * 1024 + thread) % 65536];
    if (kind == 5) {
      values[thread] = sum;
      sum += values[thread];
    }
  }
  if (sum + sums[0] == 1.0f) data[0] = sum;
}

}  // namespace

cudaError_t RowSums(const float* x, float* y, int rows, int cols, cudaStream_t stream) {
  return gpu::Launch(RowSumsKernel, rows, kThreads, 0, stream, x, y, cols);
}
cudaError_t TotalSum(const float* x, float* partial_sums, unsigned* ticket, float* total, int rows, int cols,
                     cudaStream_t stream) {
  return gpu::Launch(TotalSumKernel, rows, kThreads, 0, stream, x, partial_sums, ticket, total, rows, cols);
}
cudaError_t ProductBf16(const uint16_t* a, const uint16_t* b, float* c, int m, int n, int k, cudaStream_t stream) {
  return gpu::Launch(ProductKernel<false>, dim3(m / 16, n / 8), 32, 2 * (16 * 16 + 16 * 8) * 2, stream, a, b, c, n, k);
}
cudaError_t ProductBf16Trans(const uint16_t* a, const uint16_t* b, float* c, int m, int n, int k, cudaStream_t stream) {
  return gpu::Launch(ProductKernel<true>, dim3(m / 16, n / 8), 32, 2 * (16 * 16 + 16 * 8) * 2, stream, a, b, c, n, k);
}
cudaError_t ProductTf32(const float* a, const float* b, float* c, cudaStream_t stream) {
  return gpu::Launch(ProductTf32Kernel, 1, 32, 0, stream, a, b, c);
}
cudaError_t HalfWarpSums(const int* in, int* out, int blocks, cudaStream_t stream) {
  return gpu::Launch(HalfWarpSumsKernel, blocks, 64, 0, stream, in, out);
}
cudaError_t Histogram(const int* keys, unsigned* bins, int n, cudaStream_t stream) {
  return gpu::Launch(HistogramKernel, 3, 96, 0, stream, keys, bins, n);
}
cudaError_t HalfWords(uint16_t* out, int blocks, cudaStream_t stream) {
  return gpu::Launch(HalfWordsKernel, blocks, 64, 0, stream, out);
}
cudaError_t AnswerHost(const volatile int* flag, volatile int* answer, cudaStream_t stream) {
  return gpu::Launch(AnswerHostKernel, 1, 64, 0, stream, flag, answer);
}
cudaError_t Collectives(int64_t* out, cudaStream_t stream) { return gpu::Launch(CollectivesKernel, 1, 32, 0, stream, out); }
cudaError_t Indices(unsigned* out, dim3 grid, dim3 block, cudaStream_t stream) {
  return gpu::Launch(IndicesKernel, grid, block, 0, stream, out);
}
cudaError_t Fill(float* data, int n, float value, cudaStream_t stream) {
  return gpu::Launch(FillKernel, (n + 63) / 64, 64, 0, stream, data, n, value);
}
cudaError_t Scale(float* data, int n, float factor, float summand, cudaStream_t stream) {
  return gpu::Launch(ScaleKernel, (n + 63) / 64, 64, 0, stream, data, n, factor, summand);
}
cudaError_t Nothing(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
  return gpu::Launch(NothingKernel, grid, block, shared_bytes, stream);
}
cudaError_t NothingOptIn(int opt_in_bytes) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(&NothingKernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              opt_in_bytes);
}
cudaError_t Measure(int kind, int rounds, int blocks, int threads, float* data, cudaStream_t stream) {
  return gpu::Launch(MeasureKernel, blocks, threads, 0, stream, kind, rounds, data);
}

}  // namespace bebop::emulation_tests
