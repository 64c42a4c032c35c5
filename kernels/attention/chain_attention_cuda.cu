// SPDX-License-Identifier: Apache-2.0
// Chain attention, forward: a block takes 64 rows of one q head, 16 a warp. Each row begins with its own chain, in float32; then
// all walk over the base entries that they see in turns of 32 with an online softmax (FlashAttention-2: Dao, 2023, algorithm 1).
// Scores, weights and the accumulator [16][kDim] stay in registers.
//
// FLOPs: 4·head_dim per (row, q head, visible entry). Bytes: a turn reads 32 keys and values in float32 for 64 rows, mostly from
// L2: 32 FLOPs a byte of L2. So the limiter is L2 (estimated: 5.5 TB/s, 176 TFLOP/s), and behind it the tensor cores. One
// document of 32,768 rows of 16 heads of 256: 8.8 TFLOP (estimated: 50 ms); 16 documents of 2,048: 0.55 TFLOP (3 ms), beside 8
// TFLOP of the block's products.
//
// Simple where speed would cost clarity: tiles are loaded without a pipeline, two blocks a multiprocessor hide it from each
// other.

#include "kernels/attention/chain_attention.h"

#include <cmath>

#include "kernels/attention/chain_attention_cuda.cuh"
#include "kernels/common/check.h"

namespace bebop::cuda {
namespace chain_attention {
namespace {

using attention::kInfinity;
using attention::kLog2E;
using gpu::IsFloatRows;

// Block x: document x.
__global__ void __launch_bounds__(kThreads)
    DocumentRowsKernel(const DocumentRows* documents, int32_t* row_first, int32_t* row_end) {
  const DocumentRows document = documents[blockIdx.x];
  for (int64_t i = threadIdx.x; i < document.num_rows; i += kThreads) {
    row_first[document.first_row + i] = static_cast<int32_t>(document.first_row);
    row_end[document.first_row + i] = static_cast<int32_t>(document.first_row + document.num_rows);
  }
}

template <int kDim>
struct Shared {
  static constexpr int64_t kRowBytes = int64_t{kRowTile} * kDim * 2;
  static constexpr int64_t kStepBytes = int64_t{kStepTile} * kDim * 2;
  static constexpr int64_t kBytes = kRowBytes + 2 * kStepBytes;
};

// Block (x, y): a tile of rows, those with the most entries first; q head y.
template <int kDim>
__global__ void __launch_bounds__(kThreads, 2) ChainForwardKernel(const Params params) {
  using Layout = Shared<kDim>;
  constexpr int kColumnTiles = kDim / 8;
  BEBOP_DYNAMIC_SHARED(unsigned char, shared);
  BFloat16* const queries = reinterpret_cast<BFloat16*>(shared);
  BFloat16* const keys = reinterpret_cast<BFloat16*>(shared + Layout::kRowBytes);
  BFloat16* const values = reinterpret_cast<BFloat16*>(shared + Layout::kRowBytes + Layout::kStepBytes);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const Lane lane(static_cast<int>(threadIdx.x) % kWarp);
  const int tile = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kRowTile, head = static_cast<int>(blockIdx.y);
  const int dim = params.head_dim, kv_column = head / params.group * dim;
  const float log2_scale = params.scale * kLog2E;
  FillTile<kDim, kRowTile>(params.q, head * dim, tile, params.num_rows, dim, queries);

  int rows[2], firsts[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    rows[h] = tile + warp * 16 + lane.quad_row + 8 * h;
    firsts[h] = rows[h] < params.num_rows ? params.row_first[rows[h]] : params.num_rows;
  }
  float acc[kColumnTiles][4];
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[n][e] = 0.0f;
  }
  // Largest score in units of log 2, and the sum of the weights 2^(score - largest).
  float row_max[2] = {-kInfinity, -kInfinity}, sum[2] = {0.0f, 0.0f};

  // The four lanes of a row have each a quarter of its columns. Rows beyond the batch take part in the shuffles.
  for (int c = 0; c < params.num_chain; ++c) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(rows[h], params.num_rows - 1);
      const float* const query = gpu::Row<float>(params.q, row) + head * dim + lane.quad_column;
      const float* const key = gpu::Row<float>(params.chain_k[c], row) + kv_column + lane.quad_column;
      const float* const value = gpu::Row<float>(params.chain_v[c], row) + kv_column + lane.quad_column;
      float score = 0.0f;
      for (int column = 0; column < dim; column += 8) {
        const float2 a = *reinterpret_cast<const float2*>(query + column), b = *reinterpret_cast<const float2*>(key + column);
        score = fmaf(a.x, b.x, fmaf(a.y, b.y, score));
      }
      score += __shfl_xor_sync(gpu::kAllLanes, score, 1);
      score += __shfl_xor_sync(gpu::kAllLanes, score, 2);
      score *= log2_scale;
      const float max = fmaxf(row_max[h], score), factor = exp2f(row_max[h] - max), weight = exp2f(score - max);
      row_max[h] = max;
      // Like the tiles' below, a sum is spread over the four lanes.
      sum[h] = sum[h] * factor + (lane.quad_column == 0 ? weight : 0.0f);
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        if (n * 8 >= dim) continue;
        const float2 pair = *reinterpret_cast<const float2*>(value + n * 8);
        acc[n][2 * h] = fmaf(weight, pair.x, acc[n][2 * h] * factor);
        acc[n][2 * h + 1] = fmaf(weight, pair.y, acc[n][2 * h + 1] * factor);
      }
    }
  }

  const int last = min(tile + kRowTile, params.num_rows) - 1, first = params.row_first[tile];
  for (int key = first; key <= last; key += kStepTile) {
    __syncthreads();  // the tiles of the turn before have been read
    FillTile<kDim, kStepTile>(params.base_k, kv_column, key, params.num_rows, dim, keys);
    FillTile<kDim, kStepTile>(params.base_v, kv_column, key, params.num_rows, dim, values);
    __syncthreads();  // this turn's tiles are there, and before the first one the queries
    float score[kStepColumns][4];
    MultiplyRows<kDim>(queries, warp * 16, keys, lane, score);
    uint32_t weights[kStepColumns][2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float max = row_max[h];
#pragma unroll
      for (int n = 0; n < kStepColumns; ++n) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          const int entry = key + n * 8 + lane.quad_column + e % 2;
          score[n][e] = entry >= firsts[h] && entry <= rows[h] ? score[n][e] * log2_scale : -kInfinity;
          max = fmaxf(max, score[n][e]);
        }
      }
      max = fmaxf(max, __shfl_xor_sync(gpu::kAllLanes, max, 1));
      max = fmaxf(max, __shfl_xor_sync(gpu::kAllLanes, max, 2));
      const float base = max == -kInfinity ? 0.0f : max;  // while the row has seen nothing
      const float factor = exp2f(row_max[h] - base);
      row_max[h] = max;
      sum[h] *= factor;
#pragma unroll
      for (int n = 0; n < kStepColumns; ++n) {
        const float low = exp2f(score[n][2 * h] - base), high = exp2f(score[n][2 * h + 1] - base);
        sum[h] += low + high;
        weights[n][h] = gpu::PackBf16(low, high);
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        acc[n][2 * h] *= factor;
        acc[n][2 * h + 1] *= factor;
      }
    }
    AddWeightedRows<kDim>(weights, values, lane, acc);
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float total = sum[h];
    total += __shfl_xor_sync(gpu::kAllLanes, total, 1);
    total += __shfl_xor_sync(gpu::kAllLanes, total, 2);
    if (rows[h] >= params.num_rows) continue;
    const float inverse = 1.0f / total;
    const float* const gate = gpu::Row<float>(params.q_gate, rows[h]) + (2 * head + 1) * dim;
    float* const attended = gpu::Row<float>(params.attended, rows[h]) + head * dim;
    float* const out = gpu::Row<float>(params.out, rows[h]) + head * dim;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      const int column = n * 8 + lane.quad_column;
      if (column >= dim) continue;
      const float2 gates = *reinterpret_cast<const float2*>(gate + column);
      const float low = acc[n][2 * h] * inverse, high = acc[n][2 * h + 1] * inverse;
      *reinterpret_cast<float2*>(attended + column) = make_float2(low, high);
      *reinterpret_cast<float2*>(out + column) =
          make_float2(low * attention::Sigmoid(gates.x), high * attention::Sigmoid(gates.y));
    }
    if (lane.quad_column == 0) gpu::Row<float>(params.log_sum, rows[h])[head] = (row_max[h] + log2f(total)) * kLn2;
  }
}

}  // namespace

Params Prepare(const ChainAttentionArgs& args, void** workspace_left, Stream& stream) {
  const int64_t rows = args.q.rows, dim = args.head_dim;
  BEBOP_CHECK(dim > 0 && dim <= kMaxHeadDim && dim % 16 == 0 && args.num_chain >= 0 && args.num_chain <= kMaxChain);
  BEBOP_CHECK(args.num_kv_heads > 0 && args.num_q_heads % args.num_kv_heads == 0);
  const int64_t q_width = args.num_q_heads * dim, kv_width = args.num_kv_heads * dim;
  BEBOP_CHECK(IsFloatRows(args.q, rows, q_width) && IsFloatRows(args.q_gate, rows, 2 * q_width));
  BEBOP_CHECK(IsFloatRows(args.base_k, rows, kv_width) && IsFloatRows(args.base_v, rows, kv_width));
  BEBOP_CHECK(IsFloatRows(args.attended, rows, q_width) && args.log_sum.rows == rows && args.log_sum.cols == args.num_q_heads);
  Params params = {.q = args.q,
                   .q_gate = args.q_gate,
                   .base_k = args.base_k,
                   .base_v = args.base_v,
                   .attended = args.attended,
                   .log_sum = args.log_sum,
                   .out = args.out,
                   .chain_k = {},
                   .chain_v = {},
                   .row_first = nullptr,
                   .row_end = nullptr,
                   .num_rows = static_cast<int32_t>(rows),
                   .num_chain = args.num_chain,
                   .num_q_heads = args.num_q_heads,
                   .num_kv_heads = args.num_kv_heads,
                   .group = args.num_q_heads / args.num_kv_heads,
                   .head_dim = args.head_dim,
                   .scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)))};
  for (int32_t c = 0; c < args.num_chain; ++c) {
    BEBOP_CHECK(IsFloatRows(args.chain_k[c], rows, kv_width) && IsFloatRows(args.chain_v[c], rows, kv_width));
    params.chain_k[c] = args.chain_k[c];
    params.chain_v[c] = args.chain_v[c];
  }
  auto* const row_first = static_cast<int32_t*>(stream.workspace());
  int32_t* const row_end = row_first + rows;
  BEBOP_CHECK(rows * (8 + args.num_q_heads * 4) <= stream.workspace_bytes());  // with what the backward puts behind
  params.row_first = row_first;
  params.row_end = row_end;
  *workspace_left = row_end + rows;
  if (rows > 0 && args.num_documents > 0) {
    BEBOP_CUDA_TRY(stream, gpu::Launch(DocumentRowsKernel, dim3(static_cast<unsigned>(args.num_documents)), dim3(kThreads), 0,
                                       stream.handle(), args.documents, row_first, row_end));
  }
  return params;
}

}  // namespace chain_attention

void ChainAttention(const ChainAttentionArgs& args, Stream& stream) {
  using namespace chain_attention;  // of this file's own names
  void* workspace = nullptr;
  const Params params = Prepare(args, &workspace, stream);
  BEBOP_CHECK(IsFloatRows(args.out, args.q.rows, args.q.cols));
  if (args.q.rows == 0) return;
  const dim3 grid(static_cast<unsigned>((params.num_rows + kRowTile - 1) / kRowTile), static_cast<unsigned>(params.num_q_heads));
  SelectDim(params.head_dim, [&](auto columns) {
    constexpr int kDim = decltype(columns)::value;
    BEBOP_CUDA_TRY(stream, gpu::Launch(ChainForwardKernel<kDim>, grid, dim3(kThreads), static_cast<size_t>(Shared<kDim>::kBytes),
                                       stream.handle(), params));
  });
}

}  // namespace bebop::cuda
