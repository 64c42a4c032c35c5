// SPDX-License-Identifier: Apache-2.0
// QkNormRope: a warp takes one head of one row (a query head, or a key head with its value head), eight values a lane; a block
// four heads of one row. In bf16 a row moves (nq + 2·nkv)·D·4 bytes, 24 KiB in the 4B model: latency bound in a decode step,
// memory bound in prefill.
//
// Angles: rotation_cuda.cuh. Every block of a row computes them again, a thread for each pair and hidden behind the loads: cheaper
// than passing them on through memory.

#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/common/gpu.h"
#include "kernels/common/gpu_vector.h"
#include "kernels/qk_norm_rope/qk_norm_rope.h"
#include "kernels/qk_norm_rope/rotation_cuda.cuh"

namespace bebop::cuda {
namespace {

using gpu::kVector;

constexpr int kWarp = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
static_assert(kMaxHeadDim == kWarp * kVector);  // one vector a lane

// Block (x, y): row x, heads [y * kWarps, (y + 1) * kWarps) of the query heads followed by the key heads.
template <typename T>
__global__ void __launch_bounds__(kThreads) QkNormRopeKernel(QkNormRopeArgs args, Frequencies frequencies) {
  __shared__ float cosines[kMaxHeadDim / 2], sines[kMaxHeadDim / 2];
  __shared__ float normed[kWarps][kMaxHeadDim];
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int dim = args.head_dim, half = args.rotary_dim / 2, first = lane * kVector;
  const int head = static_cast<int>(blockIdx.y) * kWarps + warp;
  const bool is_query = head < args.num_q_heads;
  const int kv_head = head - args.num_q_heads;
  // Lanes without values stay for the shuffles and the barrier.
  const bool active = head < args.num_q_heads + args.num_kv_heads && first < dim;
  const int32_t position = args.batch.row_position[row];

  float values[kVector] = {}, value_head[kVector] = {}, weight[kVector] = {};
  if (active) {
    gpu::Load8(is_query ? gpu::Row<T>(args.q_gate, row) + int64_t{2} * head * dim + first
                        : gpu::Row<T>(args.k, row) + int64_t{kv_head} * dim + first,
               values);
    if (!is_query) gpu::Load8(gpu::Row<T>(args.v, row) + int64_t{kv_head} * dim + first, value_head);
    gpu::Load8((is_query ? args.q_norm : args.k_norm) + first, weight);
  }
  if (thread < half) CosSinOfTurns(position * frequencies.turns[thread], &cosines[thread], &sines[thread]);

  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum = fmaf(values[i], values[i], sum);
  const float scale = 1.0f / sqrtf(gpu::GroupSum<kWarp>(sum) / static_cast<float>(dim) + args.eps);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    values[i] = values[i] * scale * (1.0f + weight[i]);
    // Pairs may lie in other lanes at any distance: they meet in shared memory.
    if (active && first + i < 2 * half) normed[warp][first + i] = values[i];
  }
  __syncthreads();
  if (!active) return;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const int at = first + i;
    if (at < half) {
      values[i] = values[i] * cosines[at] - normed[warp][at + half] * sines[at];
    } else if (at < 2 * half) {
      values[i] = values[i] * cosines[at - half] + normed[warp][at - half] * sines[at - half];
    }
  }

  if (is_query) {
    gpu::Store8(gpu::Row<T>(args.q_out, row) + int64_t{head} * dim + first, values);
    return;
  }
  const int32_t sequence = args.batch.row_sequence[row];
  if (sequence < 0) return;  // padding
  T* key_out;
  T* value_out;
  if (args.dense_k.data != nullptr) {
    key_out = gpu::Row<T>(args.dense_k, row) + int64_t{kv_head} * dim;
    value_out = gpu::Row<T>(args.dense_v, row) + int64_t{kv_head} * dim;
  } else {
    const int page_tokens = args.pages.page_tokens;
    const int64_t page = args.batch.page_ids[args.batch.sequences[sequence].first_page + position / page_tokens];
    const int64_t offset = ((page * args.num_kv_heads + kv_head) * page_tokens + position % page_tokens) * dim;
    key_out = static_cast<T*>(args.pages.k) + offset;
    value_out = static_cast<T*>(args.pages.v) + offset;
  }
  gpu::Store8(key_out + first, values);
  gpu::Store8(value_out + first, value_head);
}

bool Aligned(const TensorView& view, DType dtype, int64_t rows, int64_t cols) {
  return view.dtype == dtype && view.rows == rows && view.cols == cols && gpu::RowsAligned(view);
}

}  // namespace

void QkNormRope(const QkNormRopeArgs& args, Stream& stream) {
  const int64_t rows = args.batch.num_rows, dim = args.head_dim;
  const DType dtype = args.q_gate.dtype;
  BEBOP_CHECK(dim > 0 && dim <= kMaxHeadDim && dim % kVector == 0);
  BEBOP_CHECK(args.rotary_dim >= 0 && args.rotary_dim <= dim && args.rotary_dim % 2 == 0);
  BEBOP_CHECK(args.batch.row_sequence != nullptr && args.batch.row_position != nullptr);
  BEBOP_CHECK(Aligned(args.q_gate, dtype, rows, 2 * args.num_q_heads * dim) &&
              Aligned(args.q_out, dtype, rows, args.num_q_heads * dim));
  BEBOP_CHECK(Aligned(args.k, dtype, rows, args.num_kv_heads * dim) && Aligned(args.v, dtype, rows, args.num_kv_heads * dim));
  BEBOP_CHECK(gpu::RowsAligned(args.q_norm, DType::kFloat32, dim, 0) && gpu::RowsAligned(args.k_norm, DType::kFloat32, dim, 0));
  if (args.dense_k.data != nullptr) {
    BEBOP_CHECK(Aligned(args.dense_k, dtype, rows, args.num_kv_heads * dim) &&
                Aligned(args.dense_v, dtype, rows, args.num_kv_heads * dim));
  } else {
    BEBOP_CHECK(args.pages.dtype == dtype && args.pages.num_kv_heads == args.num_kv_heads && args.pages.head_dim == dim);
  }
  if (rows == 0) return;
  const Frequencies frequencies = MakeFrequencies(args.rotary_dim, args.rope_theta);
  const auto kernel = dtype == DType::kFloat32 ? QkNormRopeKernel<float> : QkNormRopeKernel<BFloat16>;
  const int blocks = (args.num_q_heads + args.num_kv_heads + kWarps - 1) / kWarps;
  BEBOP_CUDA_TRY(stream, gpu::Launch(kernel, dim3(static_cast<unsigned>(rows), static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                                     stream.handle(), args, frequencies));
}

}  // namespace bebop::cuda
