// SPDX-License-Identifier: Apache-2.0
// Chain attention, backward, in four launches, so that every sum has one owner and one order (no atomics). Probabilities are made
// again from log_sum (Dao et al., "FlashAttention", 2022, algorithm 4).
//
//   Rows     a warp takes a row and a kv head: the gate's gradient, dout -> the gradient of `attended`, delta = its product with
//            `attended` (to the workspace), and all of the row's own chain, in float32. Memory: 24·D bytes a (row, q head) and
//            8·D·num_chain a (row, kv head), read and written.
//   Queries  a block takes 64 rows of a q head and walks over the keys that they see: scores, dP = dO Vᵀ, dq += dS K.
//   Keys     a block takes 64 keys of a kv head and walks over the rows that see them, of all q heads of the group: scores
//            (transposed), then dV += Pᵀ dO; in a launch of its own also dP, then dK += dSᵀ Q. One launch for both would need
//            twice the accumulators that registers hold, so scores are made once more instead.
//
// FLOPs of the last three launches: 16·head_dim per (row, q head, visible entry), four times the forward's. A turn of 32 rows or
// keys reads 64 KiB in float32 at kDim 256, mostly from L2: 48 FLOPs a byte of it, 32 for dV. So the limiter is L2 (estimated:
// 5.5 TB/s, 264 and 176 TFLOP/s). One document of 32,768 rows of 16 heads of 256: 35 TFLOP (estimated: 150 ms); 16 documents of
// 2,048: 2.2 TFLOP (9 ms), beside 16 TFLOP of the block's products.

#include "kernels/attention/chain_attention_cuda.cuh"
#include "kernels/common/check.h"

namespace bebop::cuda {
namespace chain_attention {
namespace {

using attention::kLog2E;
using gpu::IsFloatRows;
using gpu::kVector;

constexpr int kMaxGroup = 32;  // q heads of a kv head
static_assert(kMaxHeadDim == kWarp * kVector);

struct BackwardParams {
  Params forward;
  TensorView dout, dq, dq_gate, dbase_k, dbase_v;
  TensorView dchain_k[kMaxChain], dchain_v[kMaxChain];
  float* delta;  // [R, nq]
};

__device__ float Dot(const float (&a)[kVector], const float (&b)[kVector]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum = fmaf(a[i], b[i], sum);
  return gpu::GroupSum<kWarp>(sum);
}

// Warp i: row i / num_kv_heads, kv head i % num_kv_heads; eight columns a lane.
__global__ void __launch_bounds__(kThreads) ChainRowsKernel(const BackwardParams params) {
  __shared__ float weights[kWarps][kMaxGroup][kMaxChain], dscores[kWarps][kMaxGroup][kMaxChain];
  const Params& forward = params.forward;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  const int64_t row = item / forward.num_kv_heads;
  const int kv_head = static_cast<int>(item % forward.num_kv_heads), dim = forward.head_dim, column = lane * kVector;
  if (row >= forward.num_rows) return;  // the whole warp
  const bool active = column < dim;     // other lanes stay for the shuffles
  const auto load = [&](const TensorView& view, int first, float(&values)[kVector]) {
    if (active) gpu::Load8(gpu::Row<float>(view, row) + first + column, values);
  };
  const auto store = [&](const TensorView& view, int first, const float(&values)[kVector]) {
    if (active) gpu::Store8(gpu::Row<float>(view, row) + first + column, values);
  };
  for (int g = 0; g < forward.group; ++g) {
    const int head = kv_head * forward.group + g;
    float gate[kVector] = {}, attended[kVector] = {}, dout[kVector] = {}, query[kVector] = {};
    load(forward.q_gate, (2 * head + 1) * dim, gate);
    load(forward.attended, head * dim, attended);
    load(params.dout, head * dim, dout);
    load(forward.q, head * dim, query);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float sigmoid = attention::Sigmoid(gate[i]);
      gate[i] = dout[i] * attended[i] * sigmoid * (1.0f - sigmoid);
      dout[i] *= sigmoid;
    }
    store(params.dq_gate, (2 * head + 1) * dim, gate);
    store(params.dout, head * dim, dout);
    const float delta = Dot(dout, attended);
    if (lane == 0) params.delta[row * forward.num_q_heads + head] = delta;
    const float log_sum = gpu::Row<float>(forward.log_sum, row)[head];
    float dq[kVector] = {};
    for (int c = 0; c < forward.num_chain; ++c) {
      float key[kVector] = {}, value[kVector] = {};
      load(forward.chain_k[c], kv_head * dim, key);
      load(forward.chain_v[c], kv_head * dim, value);
      const float weight = expf(Dot(query, key) * forward.scale - log_sum);
      const float dscore = weight * (Dot(dout, value) - delta) * forward.scale;
#pragma unroll
      for (int i = 0; i < kVector; ++i) dq[i] = fmaf(dscore, key[i], dq[i]);
      if (lane == 0) {
        weights[warp][g][c] = weight;
        dscores[warp][g][c] = dscore;
      }
    }
    store(params.dq, head * dim, dq);
  }
  __syncwarp();
  for (int c = 0; c < forward.num_chain; ++c) {
    float dkey[kVector] = {}, dvalue[kVector] = {};
    load(params.dchain_k[c], kv_head * dim, dkey);
    load(params.dchain_v[c], kv_head * dim, dvalue);
    for (int g = 0; g < forward.group; ++g) {
      const int head = kv_head * forward.group + g;
      float dout[kVector] = {}, query[kVector] = {};
      load(params.dout, head * dim, dout);
      load(forward.q, head * dim, query);
      const float weight = weights[warp][g][c], dscore = dscores[warp][g][c];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        dkey[i] = fmaf(dscore, query[i], dkey[i]);
        dvalue[i] = fmaf(weight, dout[i], dvalue[i]);
      }
    }
    store(params.dchain_k[c], kv_head * dim, dkey);
    store(params.dchain_v[c], kv_head * dim, dvalue);
  }
}

template <int kDim>
struct Shared {
  static constexpr int64_t kRowBytes = int64_t{kRowTile} * kDim * 2;
  static constexpr int64_t kStepBytes = int64_t{kStepTile} * kDim * 2;
  static constexpr int64_t kTileBytes = 2 * kRowBytes + 2 * kStepBytes;
  static constexpr int64_t kBytes = kTileBytes + kStepTile * 3 * 4;  // and three words of each row of a turn
};

// view[rows of the warp's accumulators] += acc.
template <int kDim>
__device__ void AddRows(const TensorView& view, int first_row, int num_rows, int column, int dim, const Lane& lane,
                        const float (&acc)[kDim / 8][4]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first_row + lane.quad_row + 8 * h;
    if (row >= num_rows) continue;
    float* const out = gpu::Row<float>(view, row) + column + lane.quad_column;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      if (n * 8 >= dim) continue;
      float2* const pair = reinterpret_cast<float2*>(out + n * 8);
      *pair = make_float2(pair->x + acc[n][2 * h], pair->y + acc[n][2 * h + 1]);
    }
  }
}

// Block (x, y): a tile of rows, those with the most entries first; q head y. Adds to dq.
template <int kDim>
__global__ void __launch_bounds__(kThreads, 2) ChainQueriesKernel(const BackwardParams params) {
  using Layout = Shared<kDim>;
  BEBOP_DYNAMIC_SHARED(unsigned char, shared);
  BFloat16* const queries = reinterpret_cast<BFloat16*>(shared);
  BFloat16* const gradients = reinterpret_cast<BFloat16*>(shared + Layout::kRowBytes);
  BFloat16* const keys = reinterpret_cast<BFloat16*>(shared + 2 * Layout::kRowBytes);
  BFloat16* const values = reinterpret_cast<BFloat16*>(shared + 2 * Layout::kRowBytes + Layout::kStepBytes);
  const Params& forward = params.forward;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const Lane lane(static_cast<int>(threadIdx.x) % kWarp);
  const int tile = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kRowTile, head = static_cast<int>(blockIdx.y);
  const int dim = forward.head_dim, kv_column = head / forward.group * dim;
  FillTile<kDim, kRowTile>(forward.q, head * dim, tile, forward.num_rows, dim, queries);
  FillTile<kDim, kRowTile>(params.dout, head * dim, tile, forward.num_rows, dim, gradients);
  int rows[2], firsts[2];
  float log_sums[2], deltas[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    rows[h] = tile + warp * 16 + lane.quad_row + 8 * h;
    const bool valid = rows[h] < forward.num_rows;
    firsts[h] = valid ? forward.row_first[rows[h]] : forward.num_rows;
    log_sums[h] = valid ? gpu::Row<float>(forward.log_sum, rows[h])[head] * kLog2E : 0.0f;
    deltas[h] = valid ? params.delta[static_cast<int64_t>(rows[h]) * forward.num_q_heads + head] : 0.0f;
  }
  float acc[kDim / 8][4];
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[n][e] = 0.0f;
  }
  const int last = min(tile + kRowTile, forward.num_rows) - 1, first = forward.row_first[tile];
  for (int key = first; key <= last; key += kStepTile) {
    __syncthreads();  // the tiles of the turn before have been read
    FillTile<kDim, kStepTile>(forward.base_k, kv_column, key, forward.num_rows, dim, keys);
    FillTile<kDim, kStepTile>(forward.base_v, kv_column, key, forward.num_rows, dim, values);
    __syncthreads();  // this turn's tiles are there, and before the first one those of the rows
    float score[kStepColumns][4], product[kStepColumns][4];
    MultiplyRows<kDim>(queries, warp * 16, keys, lane, score);
    MultiplyRows<kDim>(gradients, warp * 16, values, lane, product);
    uint32_t dscores[kStepColumns][2];
#pragma unroll
    for (int n = 0; n < kStepColumns; ++n) {
      float dscore[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int entry = key + n * 8 + lane.quad_column + e % 2;
        const bool seen = entry >= firsts[e / 2] && entry <= rows[e / 2];
        const float weight = exp2f(fmaf(score[n][e], forward.scale * kLog2E, -log_sums[e / 2]));
        dscore[e] = seen ? weight * (product[n][e] - deltas[e / 2]) * forward.scale : 0.0f;
      }
      dscores[n][0] = gpu::PackBf16(dscore[0], dscore[1]);
      dscores[n][1] = gpu::PackBf16(dscore[2], dscore[3]);
    }
    AddWeightedRows<kDim>(dscores, keys, lane, acc);
  }
  AddRows<kDim>(params.dq, tile + warp * 16, forward.num_rows, head * dim, dim, lane, acc);
}

// Block (x, y): a tile of keys, those that the most rows may see first; kv head y. Adds to dbase_v with kValues, else to dbase_k.
template <int kDim, bool kValues>
__global__ void __launch_bounds__(kThreads, 2) ChainKeysKernel(const BackwardParams params) {
  using Layout = Shared<kDim>;
  BEBOP_DYNAMIC_SHARED(unsigned char, shared);
  BFloat16* const keys = reinterpret_cast<BFloat16*>(shared);
  BFloat16* const values = reinterpret_cast<BFloat16*>(shared + Layout::kRowBytes);  // with kValues unused
  BFloat16* const queries = reinterpret_cast<BFloat16*>(shared + 2 * Layout::kRowBytes);
  BFloat16* const gradients = reinterpret_cast<BFloat16*>(shared + 2 * Layout::kRowBytes + Layout::kStepBytes);
  int* const row_firsts = reinterpret_cast<int*>(shared + Layout::kTileBytes);  // [kStepTile]
  float* const log_sums = reinterpret_cast<float*>(row_firsts + kStepTile);
  float* const deltas = log_sums + kStepTile;
  const Params& forward = params.forward;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  const Lane lane(thread % kWarp);
  const int tile = static_cast<int>(blockIdx.x) * kRowTile, kv_head = static_cast<int>(blockIdx.y);
  const int dim = forward.head_dim, kv_column = kv_head * dim;
  FillTile<kDim, kRowTile>(forward.base_k, kv_column, tile, forward.num_rows, dim, keys);
  if (!kValues) FillTile<kDim, kRowTile>(forward.base_v, kv_column, tile, forward.num_rows, dim, values);
  float acc[kDim / 8][4];
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[n][e] = 0.0f;
  }
  const int end = forward.row_end[min(tile + kRowTile, forward.num_rows) - 1];
  for (int first = tile; first < end; first += kStepTile) {
    for (int g = 0; g < forward.group; ++g) {
      const int head = kv_head * forward.group + g;
      __syncthreads();  // the tiles of the turn before have been read
      FillTile<kDim, kStepTile>(forward.q, head * dim, first, forward.num_rows, dim, queries);
      FillTile<kDim, kStepTile>(params.dout, head * dim, first, forward.num_rows, dim, gradients);
      if (thread < kStepTile) {
        const int row = first + thread;
        const bool valid = row < forward.num_rows;
        row_firsts[thread] = valid ? forward.row_first[row] : forward.num_rows;
        log_sums[thread] = valid ? gpu::Row<float>(forward.log_sum, row)[head] * kLog2E : 0.0f;
        deltas[thread] = valid ? params.delta[static_cast<int64_t>(row) * forward.num_q_heads + head] : 0.0f;
      }
      __syncthreads();               // this turn's tiles are there, and before the first one the keys
      float score[kStepColumns][4];  // [key, row]
      MultiplyRows<kDim>(keys, warp * 16, queries, lane, score);
      float product[kStepColumns][4];
      if constexpr (!kValues) MultiplyRows<kDim>(values, warp * 16, gradients, lane, product);
      uint32_t factors[kStepColumns][2];
#pragma unroll
      for (int n = 0; n < kStepColumns; ++n) {
        float factor[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int at = n * 8 + lane.quad_column + e % 2, entry = tile + warp * 16 + lane.quad_row + e / 2 * 8;
          const bool seen = entry >= row_firsts[at] && entry <= first + at;
          const float weight = exp2f(fmaf(score[n][e], forward.scale * kLog2E, -log_sums[at]));
          factor[e] = !seen ? 0.0f : weight;
          if constexpr (!kValues) factor[e] *= (product[n][e] - deltas[at]) * forward.scale;
        }
        factors[n][0] = gpu::PackBf16(factor[0], factor[1]);
        factors[n][1] = gpu::PackBf16(factor[2], factor[3]);
      }
      AddWeightedRows<kDim>(factors, kValues ? gradients : queries, lane, acc);
    }
  }
  AddRows<kDim>(kValues ? params.dbase_v : params.dbase_k, tile + warp * 16, forward.num_rows, kv_column, dim, lane, acc);
}

}  // namespace
}  // namespace chain_attention

void ChainAttentionBackward(const ChainAttentionBackwardArgs& args, Stream& stream) {
  using namespace chain_attention;  // of this file's own names
  void* workspace = nullptr;
  const int64_t rows = args.forward.q.rows, q_width = args.forward.q.cols;
  const int64_t kv_width = int64_t{args.forward.num_kv_heads} * args.forward.head_dim;
  BackwardParams params = {.forward = Prepare(args.forward, &workspace, stream),
                           .dout = args.dout,
                           .dq = args.dq,
                           .dq_gate = args.dq_gate,
                           .dbase_k = args.dbase_k,
                           .dbase_v = args.dbase_v,
                           .dchain_k = {},
                           .dchain_v = {},
                           .delta = static_cast<float*>(workspace)};
  const Params& forward = params.forward;
  BEBOP_CHECK(IsFloatRows(args.dout, rows, q_width) && IsFloatRows(args.dq, rows, q_width));
  BEBOP_CHECK(IsFloatRows(args.dq_gate, rows, 2 * q_width) && forward.group <= kMaxGroup);
  BEBOP_CHECK(IsFloatRows(args.dbase_k, rows, kv_width) && IsFloatRows(args.dbase_v, rows, kv_width));
  for (int32_t c = 0; c < forward.num_chain; ++c) {
    BEBOP_CHECK(IsFloatRows(args.dchain_k[c], rows, kv_width) && IsFloatRows(args.dchain_v[c], rows, kv_width));
    params.dchain_k[c] = args.dchain_k[c];
    params.dchain_v[c] = args.dchain_v[c];
  }
  if (rows == 0) return;
  const auto blocks = [](int64_t count, int64_t size) { return static_cast<unsigned>((count + size - 1) / size); };
  BEBOP_CUDA_TRY(stream, gpu::Launch(ChainRowsKernel, dim3(blocks(rows * forward.num_kv_heads, kWarps)), dim3(kThreads), 0,
                                     stream.handle(), params));
  const dim3 row_grid(blocks(rows, kRowTile), static_cast<unsigned>(forward.num_q_heads));
  const dim3 key_grid(blocks(rows, kRowTile), static_cast<unsigned>(forward.num_kv_heads));
  SelectDim(forward.head_dim, [&](auto columns) {
    constexpr int kDim = decltype(columns)::value;
    constexpr auto kBytes = static_cast<size_t>(Shared<kDim>::kBytes);
    BEBOP_CUDA_TRY(stream, gpu::Launch(ChainQueriesKernel<kDim>, row_grid, dim3(kThreads), kBytes, stream.handle(), params));
    BEBOP_CUDA_TRY(stream, gpu::Launch((ChainKeysKernel<kDim, true>), key_grid, dim3(kThreads), kBytes, stream.handle(), params));
    BEBOP_CUDA_TRY(stream,
                   gpu::Launch((ChainKeysKernel<kDim, false>), key_grid, dim3(kThreads), kBytes, stream.handle(), params));
  });
}

}  // namespace bebop::cuda
