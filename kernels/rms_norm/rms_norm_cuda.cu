// SPDX-License-Identifier: Apache-2.0
// RMSNorm with an optional residual addition, and the gated RMSNorm of the linear-attention block.
//
// RmsNorm: one block a row, eight neighbouring values a thread and turn, which stay in registers between the sum of squares and
// the normalisation, so that every byte moves once: T·H·(4 + 2 + 4 + 2) bytes with a float32 stream, bf16 residual and output. A
// prompt chunk of 2,048 rows of H = 2560 is memory bound (estimated: 15 µs); the few rows of a decode step are bound by the
// latency of one load, one block reduction (a single barrier) and the launch (estimated: 2 µs).
//
// GatedRmsNorm: sixteen lanes a head (head_dim 128 is one 16-byte load of bf16 a lane), no shared memory and no barrier.
// T·Hv·dv·6 bytes in bf16; the same limits.
//
// Sums of squares are float32 in a fixed order that depends on the width alone, so a row's bits do not depend on the batch.

#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/common/gpu.h"
#include "kernels/common/gpu_vector.h"
#include "kernels/rms_norm/rms_norm.h"

namespace bebop::cuda {
namespace {

using gpu::kVector;

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kRowVectors = 4;   // of a thread: rows of up to kMaxThreads * kRowVectors * kVector values
constexpr int kHeadLanes = 16;   // that share a head of the gated norm
constexpr int kHeadVectors = 4;  // of a lane: heads of up to kHeadLanes * kHeadVectors * kVector values
constexpr int kHeadThreads = 128;

__device__ float SumOfSquares(const float (&values)[kVector]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum = fmaf(values[i], values[i], sum);
  return sum;
}

__device__ float InverseRms(float sum, int64_t count, float eps) { return 1.0f / sqrtf(sum / static_cast<float>(count) + eps); }

__global__ void __launch_bounds__(kMaxThreads) RmsNormKernel(RmsNormArgs args) {
  __shared__ float warp_sums[kMaxThreads / kWarp];
  const int64_t row = blockIdx.x;
  const int num_vectors = static_cast<int>(args.x.cols) / kVector;
  const int thread = static_cast<int>(threadIdx.x), num_threads = static_cast<int>(blockDim.x);
  float values[kRowVectors][kVector];
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kRowVectors; ++j) {
    const int vector = j * num_threads + thread;
    if (vector >= num_vectors) continue;
    const int64_t at = row * args.x.row_stride + vector * kVector;
    gpu::Load8(args.x.data, args.x.dtype, at, values[j]);
    if (args.residual.data != nullptr) {
      float added[kVector];
      gpu::Load8(args.residual.data, args.residual.dtype, row * args.residual.row_stride + vector * kVector, added);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        values[j][i] += added[i];
        // The norm is of the stream as it is stored.
        if (args.x.dtype == DType::kBFloat16) values[j][i] = gpu::LowBf16(gpu::PackBf16(values[j][i], 0.0f));
      }
      gpu::Store8(args.x.data, args.x.dtype, at, values[j]);
    }
    sum += SumOfSquares(values[j]);
  }

  sum = gpu::GroupSum<kWarp>(sum);
  if (thread % kWarp == 0) warp_sums[thread / kWarp] = sum;
  __syncthreads();
  // Every warp adds up the warps' sums for itself.
  sum = gpu::GroupSum<kWarp>(thread % kWarp < num_threads / kWarp ? warp_sums[thread % kWarp] : 0.0f);
  const float scale = InverseRms(sum, args.x.cols, args.eps);

#pragma unroll
  for (int j = 0; j < kRowVectors; ++j) {
    const int vector = j * num_threads + thread;
    if (vector >= num_vectors) continue;
    float weight[kVector];
    gpu::Load8(args.weight + vector * kVector, weight);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[j][i] = values[j][i] * scale * (1.0f + weight[i]);
    gpu::Store8(args.out.data, args.out.dtype, row * args.out.row_stride + vector * kVector, values[j]);
  }
}

__global__ void __launch_bounds__(kHeadThreads) GatedRmsNormKernel(GatedRmsNormArgs args) {
  const int lane = static_cast<int>(threadIdx.x) % kHeadLanes;
  const int num_heads = static_cast<int>(args.x.cols) / args.head_dim, num_vectors = args.head_dim / kVector;
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * kHeadThreads + threadIdx.x) / kHeadLanes;
  const bool valid = item < args.x.rows * num_heads;  // lanes beyond the last head stay for the shuffles
  const int64_t row = item / num_heads;
  const int64_t first = item % num_heads * args.head_dim;
  float values[kHeadVectors][kVector];
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kHeadVectors; ++j) {
    const int vector = j * kHeadLanes + lane;
    if (!valid || vector >= num_vectors) continue;
    gpu::Load8(args.x.data, args.x.dtype, row * args.x.row_stride + first + vector * kVector, values[j]);
    sum += SumOfSquares(values[j]);
  }
  const float scale = InverseRms(gpu::GroupSum<kHeadLanes>(sum), args.head_dim, args.eps);
#pragma unroll
  for (int j = 0; j < kHeadVectors; ++j) {
    const int vector = j * kHeadLanes + lane;
    if (!valid || vector >= num_vectors) continue;
    float gate[kVector], weight[kVector];
    gpu::Load8(args.gate.data, args.gate.dtype, row * args.gate.row_stride + first + vector * kVector, gate);
    gpu::Load8(args.weight + vector * kVector, weight);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[j][i] = values[j][i] * scale * weight[i] * gpu::Silu(gate[i]);
    gpu::Store8(args.out.data, args.out.dtype, row * args.out.row_stride + first + vector * kVector, values[j]);
  }
}

}  // namespace

void RmsNorm(const RmsNormArgs& args, Stream& stream) {
  const int64_t num_vectors = args.x.cols / kVector;
  BEBOP_CHECK(num_vectors > 0 && num_vectors <= kMaxThreads * kRowVectors);
  BEBOP_CHECK(args.out.rows == args.x.rows && args.out.cols == args.x.cols && gpu::RowsAligned(args.x) &&
              gpu::RowsAligned(args.out));
  BEBOP_CHECK(args.residual.data == nullptr ||
              (args.residual.rows == args.x.rows && args.residual.cols == args.x.cols && gpu::RowsAligned(args.residual)));
  BEBOP_CHECK(gpu::RowsAligned(args.weight, DType::kFloat32, args.x.cols, 0));
  if (args.x.rows == 0) return;
  const int64_t threads = num_vectors < kMaxThreads ? (num_vectors + kWarp - 1) / kWarp * kWarp : kMaxThreads;
  BEBOP_CUDA_TRY(stream, gpu::Launch(RmsNormKernel, dim3(static_cast<unsigned>(args.x.rows)),
                                     dim3(static_cast<unsigned>(threads)), 0, stream.handle(), args));
}

void GatedRmsNorm(const GatedRmsNormArgs& args, Stream& stream) {
  BEBOP_CHECK(args.head_dim > 0 && args.head_dim % kVector == 0 && args.head_dim <= kHeadLanes * kHeadVectors * kVector);
  BEBOP_CHECK(args.x.cols % args.head_dim == 0 && args.gate.cols == args.x.cols && args.out.cols == args.x.cols);
  BEBOP_CHECK(args.gate.rows == args.x.rows && args.out.rows == args.x.rows);
  BEBOP_CHECK(gpu::RowsAligned(args.x) && gpu::RowsAligned(args.gate) && gpu::RowsAligned(args.out));
  BEBOP_CHECK(gpu::RowsAligned(args.weight, DType::kFloat32, args.head_dim, 0));
  const int64_t lanes = args.x.rows * (args.x.cols / args.head_dim) * kHeadLanes;
  if (lanes == 0) return;
  BEBOP_CUDA_TRY(stream, gpu::Launch(GatedRmsNormKernel, dim3(static_cast<unsigned>((lanes + kHeadThreads - 1) / kHeadThreads)),
                                     dim3(kHeadThreads), 0, stream.handle(), args));
}

}  // namespace bebop::cuda
