// SPDX-License-Identifier: Apache-2.0
// AdamW and the squared norm of the gradient.
//
// AdamW: four neighbouring elements a thread, 28 bytes an element, and in double some ten products and sums, two quotients, a
// root and a quotient by it (about 80 operations). Memory bound where doubles are fast (the 4B model's MTP layer, 121 M
// parameters, moves 3.4 GB; estimated: 0.8 ms).
//
// SquaredNorm: blocks of 32,768 values, whose sums in double one block adds up. 4 bytes a value: memory bound.

#include "kernels/adamw/adamw.h"
#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/common/gpu.h"
#include "kernels/common/gpu_vector.h"

namespace bebop::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kValues = 4;                   // of a thread
constexpr int64_t kBlockValues = 32 * 1024;  // that a block of the norm sums

// The header's formula, with the operations of the CPU's in their order.
__device__ void UpdateOne(const AdamWArgs& args, float gradient_value, float* parameter, float* first_moment,
                          float* second_moment) {
  const double gradient = args.clip * static_cast<double>(gradient_value);
  const double first = args.beta1 * static_cast<double>(*first_moment) + (1.0 - args.beta1) * gradient;
  const double second = args.beta2 * static_cast<double>(*second_moment) + (1.0 - args.beta2) * gradient * gradient;
  const double denominator = sqrt(second / args.second_correction) + args.epsilon;
  *first_moment = static_cast<float>(first);
  *second_moment = static_cast<float>(second);
  *parameter =
      static_cast<float>(args.keep * static_cast<double>(*parameter) - args.rate * (first / args.first_correction) / denominator);
}

__global__ void __launch_bounds__(kThreads) AdamWKernel(AdamWArgs args) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kValues;
  if (at + kValues <= args.count) {
    const float4 gradient = *reinterpret_cast<const float4*>(args.gradients + at);
    float4 parameter = *reinterpret_cast<const float4*>(args.parameters + at);
    float4 first = *reinterpret_cast<const float4*>(args.first + at), second = *reinterpret_cast<const float4*>(args.second + at);
    UpdateOne(args, gradient.x, &parameter.x, &first.x, &second.x);
    UpdateOne(args, gradient.y, &parameter.y, &first.y, &second.y);
    UpdateOne(args, gradient.z, &parameter.z, &first.z, &second.z);
    UpdateOne(args, gradient.w, &parameter.w, &first.w, &second.w);
    *reinterpret_cast<float4*>(args.parameters + at) = parameter;
    *reinterpret_cast<float4*>(args.first + at) = first;
    *reinterpret_cast<float4*>(args.second + at) = second;
    return;
  }
  for (int64_t i = at; i < args.count; ++i) {
    UpdateOne(args, args.gradients[i], args.parameters + i, args.first + i, args.second + i);
  }
}

// Σ over the block, in thread 0 and in one order.
__device__ double BlockSum(double value, double* scratch) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(gpu::kAllLanes, value, offset);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread % kWarp == 0) scratch[thread / kWarp] = value;
  __syncthreads();
  double sum = 0.0;
  for (int warp = 0; thread == 0 && warp < kWarps; ++warp) sum += scratch[warp];
  return sum;
}

// sums[x] <- Σ values² of block x.
__global__ void __launch_bounds__(kThreads) SquaredNormKernel(const float* values, int64_t count, double* sums) {
  __shared__ double scratch[kWarps];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kBlockValues, end = min(begin + kBlockValues, count);
  double sum = 0.0;
  for (int64_t at = begin + static_cast<int64_t>(threadIdx.x) * kValues; at < end; at += kThreads * kValues) {
    float part[kValues] = {};
    if (at + kValues <= end) {
      const float4 four = *reinterpret_cast<const float4*>(values + at);
      part[0] = four.x, part[1] = four.y, part[2] = four.z, part[3] = four.w;
    } else {
      for (int i = 0; at + i < end; ++i) part[i] = values[at + i];
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) sum = fma(static_cast<double>(part[i]), static_cast<double>(part[i]), sum);
  }
  sum = BlockSum(sum, scratch);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) SquaredNormSumKernel(const double* sums, int64_t count, double* result) {
  __shared__ double scratch[kWarps];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += sums[i];
  sum = BlockSum(sum, scratch);
  if (threadIdx.x == 0) *result = sum;
}

bool Aligned(const float* data) { return reinterpret_cast<uintptr_t>(data) % (kValues * sizeof(float)) == 0; }

}  // namespace

void AdamWUpdate(const AdamWArgs& args, Stream& stream) {
  BEBOP_CHECK(Aligned(args.parameters) && Aligned(args.first) && Aligned(args.second) && Aligned(args.gradients));
  if (args.count == 0) return;
  constexpr int64_t kBlock = kThreads * kValues;
  BEBOP_CUDA_TRY(stream, gpu::Launch(AdamWKernel, dim3(static_cast<unsigned>((args.count + kBlock - 1) / kBlock)), dim3(kThreads),
                                     0, stream.handle(), args));
}

void SquaredNorm(const float* values, int64_t count, double* result, Stream& stream) {
  BEBOP_CHECK(Aligned(values));
  const int64_t num_blocks = (count + kBlockValues - 1) / kBlockValues;
  BEBOP_CHECK(num_blocks * int64_t{sizeof(double)} <= stream.workspace_bytes());
  auto* const sums = static_cast<double*>(stream.workspace());
  if (num_blocks > 0) {
    BEBOP_CUDA_TRY(stream, gpu::Launch(SquaredNormKernel, dim3(static_cast<unsigned>(num_blocks)), dim3(kThreads), 0,
                                       stream.handle(), values, count, sums));
  }
  BEBOP_CUDA_TRY(stream,
                 gpu::Launch(SquaredNormSumKernel, dim3(1), dim3(kThreads), 0, stream.handle(), sums, num_blocks, result));
}

}  // namespace bebop::cuda
