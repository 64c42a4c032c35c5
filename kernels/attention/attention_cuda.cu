// SPDX-License-Identifier: Apache-2.0
// Attention on the device: the choice of kernels, the merge of splits, and the float32 kernel. The bf16 kernels are in
// attention_cuda_split.cu (decode and verify) and attention_cuda_prefill.cu.
//
// MergeKernel: bytes 4·(head_dim + 2) per (row, q head, split) and 4·head_dim per (row, q head); limiter latency. At 128
// sequences of 4 rows and 4,096 positions that is below 2 % of the keys' and values' bytes (counted).
//
// FloatKernel: the oracle mode's. Reads keys and values once per row and q head from the caches; limiter L1 loads. Plain on
// purpose.
#include "kernels/attention/attention_cuda.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>

#include "kernels/attention/attention_cuda.cuh"
#include "kernels/common/check.h"
#include "kernels/common/gpu.h"
#include "kernels/common/gpu_vector.h"

namespace bebop::cuda {
namespace attention {
namespace {

constexpr int kMergeThreads = 128;
constexpr int kMergeWarps = kMergeThreads / 32;

// One (row, q head): splits, then the row's chain, the gate, the output. Four columns a thread; `num_lanes` threads have a whole
// head, and the groups of them take splits in turn. The order of every sum depends on the row's number of splits and on head_dim
// alone.
__global__ void __launch_bounds__(kMergeThreads) MergeKernel(const Params<BFloat16> params, const SplitPlan plan) {
  __shared__ float4 group_acc[kMergeThreads];
  __shared__ float group_sum[kMergeThreads];
  __shared__ float chain_score[kMaxChain];
  const int32_t row = plan.row_begin + static_cast<int32_t>(blockIdx.x), head = static_cast<int32_t>(blockIdx.y);
  if (params.row_sequence[row] < 0) return;
  const int32_t limit = params.row_position[row] - params.num_chain, kv_head = head / params.group;
  const int32_t num_splits = limit < 0 ? 1 : limit / (plan.tiles_per_split * kKeyTile) + 1;
  const int64_t first = (int64_t{row - plan.row_begin} * params.num_q_heads + head) * plan.num_splits;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const float scale = params.scale * kLog2E;

  float max = -kInfinity;
  for (int32_t s = lane; s < num_splits; s += 32) max = fmaxf(max, plan.stats[first + s].x);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) max = fmaxf(max, __shfl_xor_sync(gpu::kAllLanes, max, mask));

  const BFloat16* const query = params.q + row * params.q_stride + int64_t{head} * params.head_dim;
  for (int32_t c = warp; c < params.num_chain; c += kMergeWarps) {
    const BFloat16* const key = params.chain_k[c] + row * params.chain_k_stride[c] + int64_t{kv_head} * params.head_dim;
    float score = 0.0f;
    for (int32_t i = lane; i < params.head_dim; i += 32) score = __fmaf_rn(ToFloat(query[i]), ToFloat(key[i]), score);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) score += __shfl_xor_sync(gpu::kAllLanes, score, mask);
    if (lane == 0) chain_score[c] = score;
  }

  // What sums relative to the maximum `from` are worth relative to `to`; 1 also where both are -infinity and the sums 0 or NaN.
  const auto rescale = [scale](float from, float to) { return from == to ? 1.0f : exp2f((from - to) * scale); };
  const int32_t num_lanes = params.head_dim / 4, num_groups = kMergeThreads / num_lanes;
  const int32_t group = thread / num_lanes, column = thread % num_lanes * 4;
  float4 acc = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float sum = 0.0f;
  for (int32_t s = group; group < num_groups && s < num_splits; s += num_groups) {
    const float2 stats = plan.stats[first + s];
    const float4 part = *reinterpret_cast<const float4*>(plan.acc + (first + s) * params.head_dim + column);
    const float factor = rescale(stats.x, max);
    sum = __fmaf_rn(factor, stats.y, sum);
    acc.x = __fmaf_rn(factor, part.x, acc.x);
    acc.y = __fmaf_rn(factor, part.y, acc.y);
    acc.z = __fmaf_rn(factor, part.z, acc.z);
    acc.w = __fmaf_rn(factor, part.w, acc.w);
  }
  group_acc[thread] = acc;
  group_sum[thread] = sum;
  __syncthreads();
  if (group > 0) return;
  for (int32_t g = 1; g < num_groups; ++g) {
    const float4 part = group_acc[g * num_lanes + thread];
    sum = __fadd_rn(sum, group_sum[g * num_lanes + thread]);
    acc.x = __fadd_rn(acc.x, part.x);
    acc.y = __fadd_rn(acc.y, part.y);
    acc.z = __fadd_rn(acc.z, part.z);
    acc.w = __fadd_rn(acc.w, part.w);
  }
  for (int32_t c = 0; c < params.num_chain; ++c) {
    const BFloat16* const value =
        params.chain_v[c] + row * params.chain_v_stride[c] + int64_t{kv_head} * params.head_dim + column;
    const float score = chain_score[c], largest = fmaxf(max, score);
    const float factor = rescale(max, largest), added = exp2f((score - largest) * scale);
    max = largest;
    sum = __fmaf_rn(sum, factor, added);
    acc.x = __fmaf_rn(acc.x, factor, __fmul_rn(added, ToFloat(value[0])));
    acc.y = __fmaf_rn(acc.y, factor, __fmul_rn(added, ToFloat(value[1])));
    acc.z = __fmaf_rn(acc.z, factor, __fmul_rn(added, ToFloat(value[2])));
    acc.w = __fmaf_rn(acc.w, factor, __fmul_rn(added, ToFloat(value[3])));
  }
  const float inverse = InverseSum(sum, limit >= params.first_index || params.num_chain > 0);
  const BFloat16* const gate = params.q_gate + row * params.q_gate_stride + (2 * int64_t{head} + 1) * params.head_dim + column;
  uint32_t* const out =
      reinterpret_cast<uint32_t*>(params.out + row * params.out_stride + int64_t{head} * params.head_dim + column);
  out[0] = gpu::PackBf16(acc.x * inverse * Sigmoid(ToFloat(gate[0])), acc.y * inverse * Sigmoid(ToFloat(gate[1])));
  out[1] = gpu::PackBf16(acc.z * inverse * Sigmoid(ToFloat(gate[2])), acc.w * inverse * Sigmoid(ToFloat(gate[3])));
}

constexpr int kFloatThreads = 128;
constexpr int kFloatColumns = kMaxHeadDim / kFloatThreads;

// One (row, q head). Tiles of kFloatThreads entries in order, pages first, then the chain: a thread scores an entry, then owns
// columns.
__global__ void __launch_bounds__(kFloatThreads) FloatKernel(const Params<float> params) {
  __shared__ float query[kMaxHeadDim];
  __shared__ float score[kFloatThreads];
  __shared__ const float* value[kFloatThreads];
  const int32_t row = static_cast<int32_t>(blockIdx.x), head = static_cast<int32_t>(blockIdx.y);
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  if (params.row_sequence[row] < 0) return;
  const int32_t kv_head = head / params.group, dim = params.head_dim, page_tokens = 1 << params.page_shift;
  const int32_t* const pages = params.page_ids + params.sequences[params.row_sequence[row]].first_page;
  const int32_t num_paged = max(0, params.row_position[row] - params.num_chain + 1 - params.first_index);
  const int32_t num_entries = num_paged + params.num_chain;
  const float* const unscaled = params.q + row * params.q_stride + int64_t{head} * dim;
  for (int32_t i = thread; i < dim; i += kFloatThreads) query[i] = unscaled[i] * params.scale;

  float acc[kFloatColumns] = {};
  float max = -kInfinity, sum = 0.0f;  // the same in all threads
  for (int32_t first = 0; first < num_entries; first += kFloatThreads) {
    const int32_t count = min(kFloatThreads, num_entries - first);
    __syncthreads();  // the tile before is used up; at first: the query is there
    if (thread < count) {
      const int32_t entry = first + thread;
      const float* key;
      if (entry < num_paged) {
        const int32_t position = params.first_index + entry;
        const int64_t page = pages[position >> params.page_shift];
        const int64_t offset = ((page * params.num_kv_heads + kv_head) * page_tokens + position % page_tokens) * dim;
        key = params.k + offset;
        value[thread] = params.v + offset;
      } else {
        const int32_t c = entry - num_paged;
        key = params.chain_k[c] + row * params.chain_k_stride[c] + int64_t{kv_head} * dim;
        value[thread] = params.chain_v[c] + row * params.chain_v_stride[c] + int64_t{kv_head} * dim;
      }
      float total = 0.0f;
      for (int32_t i = 0; i < dim; ++i) total = __fmaf_rn(query[i], key[i], total);
      score[thread] = total;
    }
    __syncthreads();
    float largest = max;
    for (int32_t j = 0; j < count; ++j) largest = fmaxf(largest, score[j]);
    const float base = largest == -kInfinity ? 0.0f : largest;
    const float factor = expf(max - base);
    max = largest;
    sum *= factor;
    for (int c = 0; c < kFloatColumns; ++c) acc[c] *= factor;
    for (int32_t j = 0; j < count; ++j) {
      const float weight = expf(score[j] - base);
      sum = __fadd_rn(sum, weight);
#pragma unroll
      for (int c = 0; c < kFloatColumns; ++c) {
        const int32_t column = thread + c * kFloatThreads;
        if (column < dim) acc[c] = __fmaf_rn(weight, value[j][column], acc[c]);
      }
    }
  }
  const float inverse = InverseSum(sum, num_entries > 0);
#pragma unroll
  for (int c = 0; c < kFloatColumns; ++c) {
    const int32_t column = thread + c * kFloatThreads;
    if (column >= dim) continue;
    const float gate = params.q_gate[row * params.q_gate_stride + (2 * int64_t{head} + 1) * dim + column];
    params.out[row * params.out_stride + int64_t{head} * dim + column] = acc[c] * inverse * Sigmoid(gate);
  }
}

int64_t DivideUp(int64_t count, int64_t size) { return (count + size - 1) / size; }

template <typename Element>
Params<Element> MakeParams(const AttentionArgs& args) {
  Params<Element> params = {};
  params.sequences = args.batch.sequences;
  params.page_ids = args.batch.page_ids;
  params.row_sequence = args.batch.row_sequence;
  params.row_position = args.batch.row_position;
  params.q = args.q.Row<Element>(0);
  params.q_gate = args.q_gate.Row<Element>(0);
  params.k = static_cast<const Element*>(args.pages.k);
  params.v = static_cast<const Element*>(args.pages.v);
  params.out = args.out.Row<Element>(0);
  for (int32_t c = 0; c < args.num_chain; ++c) {
    BEBOP_CHECK(args.chain_k[c].dtype == args.pages.dtype && args.chain_v[c].dtype == args.pages.dtype);
    params.chain_k[c] = args.chain_k[c].Row<Element>(0);
    params.chain_v[c] = args.chain_v[c].Row<Element>(0);
    params.chain_k_stride[c] = args.chain_k[c].row_stride;
    params.chain_v_stride[c] = args.chain_v[c].row_stride;
  }
  params.q_stride = args.q.row_stride;
  params.q_gate_stride = args.q_gate.row_stride;
  params.out_stride = args.out.row_stride;
  params.num_chain = args.num_chain;
  params.first_index = args.first_index;
  params.num_kv_heads = args.pages.num_kv_heads;
  params.num_q_heads = args.num_q_heads;
  params.group = args.num_q_heads / args.pages.num_kv_heads;
  params.head_dim = args.pages.head_dim;
  params.page_shift = std::countr_zero(static_cast<uint32_t>(args.pages.page_tokens));
  params.scale = 1.0f / std::sqrt(static_cast<float>(args.pages.head_dim));
  return params;
}

// Batch invariance: borders of splits, hence sums, depend on positions alone.
constexpr int32_t kInvariantTiles = 8;
// The fast mode aims at two blocks for each multiprocessor, which evens out lengths that are below their bound, with splits long
// enough to pay for the start of a block, and short enough that the last blocks of a full device do not run long alone.
constexpr int32_t kBlocksPerMultiprocessor = 2;
constexpr int32_t kMinTiles = 2;
constexpr int32_t kMaxTiles = 32;

void SplitAttention(const AttentionArgs& args, Stream& stream) {
  const Params<BFloat16> params = MakeParams<BFloat16>(args);
  const int32_t max_packed_rows = args.batch.max_sequence_rows * params.group;
  const int32_t split_rows = SplitRows(params.head_dim, max_packed_rows, stream);
  const int64_t num_tiles = DivideUp(std::max(args.batch.max_positions, 1) + params.first_index, kKeyTile);
  const int64_t row_split_bytes = int64_t{params.num_q_heads} * (params.head_dim * 4 + 8);  // of one row and split
  int64_t tiles_per_split = kInvariantTiles;
  if (!stream.batch_invariant()) {
    const int64_t row_blocks =
        std::min<int64_t>(args.batch.num_sequences * DivideUp(max_packed_rows, split_rows),
                          args.batch.num_sequences + DivideUp(int64_t{args.batch.num_rows} * params.group, split_rows));
    const int64_t blocks = kBlocksPerMultiprocessor * std::max(stream.num_multiprocessors(), 1);
    tiles_per_split = std::clamp<int64_t>(DivideUp(row_blocks * params.num_kv_heads * num_tiles, blocks), kMinTiles, kMaxTiles);
    // Rather longer splits than several launches.
    const int64_t max_splits = stream.workspace_bytes() / (args.batch.num_rows * row_split_bytes);
    tiles_per_split = std::max(tiles_per_split, DivideUp(num_tiles, std::max<int64_t>(max_splits, 1)));
  }
  SplitPlan plan = {};
  plan.tiles_per_split = static_cast<int32_t>(tiles_per_split);
  plan.num_splits = static_cast<int32_t>(DivideUp(num_tiles, tiles_per_split));
  const int64_t row_bytes = plan.num_splits * row_split_bytes;
  const int64_t slice_rows = std::min<int64_t>(args.batch.num_rows, stream.workspace_bytes() / row_bytes);
  if (slice_rows < 1) {
    stream.Fail("attention: the partial results of one row take " + std::to_string(row_bytes) +
                " bytes, the workspace has " + std::to_string(stream.workspace_bytes()));
    return;
  }
  plan.acc = static_cast<float*>(stream.workspace());
  plan.stats = reinterpret_cast<float2*>(plan.acc + slice_rows * plan.num_splits * params.num_q_heads * params.head_dim);
  for (int64_t begin = 0; begin < args.batch.num_rows; begin += slice_rows) {
    plan.row_begin = static_cast<int32_t>(begin);
    plan.row_end = static_cast<int32_t>(std::min<int64_t>(begin + slice_rows, args.batch.num_rows));
    LaunchSplit(params, plan, split_rows, args.batch.num_sequences, max_packed_rows, stream);
    const dim3 grid(static_cast<unsigned>(plan.row_end - plan.row_begin), static_cast<unsigned>(params.num_q_heads));
    BEBOP_CUDA_TRY(stream, gpu::Launch(MergeKernel, grid, dim3(kMergeThreads), 0, stream.handle(), params, plan));
  }
}

bool IsAligned(const TensorView& view) { return gpu::RowsAligned(view.data, view.row_stride * ElementBytes(view.dtype)); }

}  // namespace
}  // namespace attention

AttentionKernel ChooseAttentionKernel(const AttentionArgs& args, const Stream& stream) {
  if (args.pages.dtype == DType::kFloat32) return AttentionKernel::kFloat;
  // The prefill kernel rounds in another order than the split kernel, so a batch-invariant stream has one kernel for all rows.
  // Chains are in MergeKernel only: they belong to `Score`, not to the steady state.
  if (stream.batch_invariant() || args.num_chain > 0) return AttentionKernel::kSplit;
  const int64_t group = args.num_q_heads / args.pages.num_kv_heads, max_packed_rows = args.batch.max_sequence_rows * group;
  if (max_packed_rows <= attention::SplitRows(args.pages.head_dim, max_packed_rows, stream)) return AttentionKernel::kSplit;
  // A short prefill would leave multiprocessors without a block.
  const int64_t blocks = attention::DivideUp(args.batch.num_rows * group, attention::kPrefillRows) * args.pages.num_kv_heads;
  return blocks * 2 < stream.num_multiprocessors() ? AttentionKernel::kSplit : AttentionKernel::kPrefill;
}

void AttentionWith(AttentionKernel kernel, const AttentionArgs& args, Stream& stream) {
  const RaggedBatch& batch = args.batch;
  const KvPagesView& pages = args.pages;
  BEBOP_CHECK(pages.head_dim > 0 && pages.head_dim <= attention::kMaxHeadDim);
  BEBOP_CHECK(pages.num_kv_heads > 0 && args.num_q_heads % pages.num_kv_heads == 0);
  BEBOP_CHECK(pages.page_tokens > 0 && std::has_single_bit(static_cast<uint32_t>(pages.page_tokens)));
  BEBOP_CHECK(batch.row_position != nullptr && batch.row_sequence != nullptr && args.first_index >= 0);
  BEBOP_CHECK(args.num_chain >= 0 && args.num_chain <= attention::kMaxChain);
  BEBOP_CHECK(args.q.dtype == pages.dtype && args.q_gate.dtype == pages.dtype && args.out.dtype == pages.dtype);
  BEBOP_CHECK((kernel == AttentionKernel::kFloat) == (pages.dtype == DType::kFloat32));
  if (batch.num_sequences == 0 || batch.num_rows == 0) return;
  if (kernel == AttentionKernel::kFloat) {
    const dim3 grid(static_cast<unsigned>(batch.num_rows), static_cast<unsigned>(args.num_q_heads));
    BEBOP_CUDA_TRY(stream, gpu::Launch(attention::FloatKernel, grid, dim3(attention::kFloatThreads), 0, stream.handle(),
                                       attention::MakeParams<float>(args)));
    return;
  }
  BEBOP_CHECK(pages.head_dim % 16 == 0 && pages.page_tokens >= attention::kMinPageTokens && batch.max_sequence_rows > 0);
  BEBOP_CHECK((reinterpret_cast<uintptr_t>(pages.k) | reinterpret_cast<uintptr_t>(pages.v)) % 16 == 0);
  BEBOP_CHECK(attention::IsAligned(args.q) && attention::IsAligned(args.q_gate) && attention::IsAligned(args.out));
  if (kernel == AttentionKernel::kSplit) {
    attention::SplitAttention(args, stream);
  } else {
    BEBOP_CHECK(args.num_chain == 0 && !stream.batch_invariant());
    attention::LaunchPrefill(attention::MakeParams<BFloat16>(args), batch.num_sequences,
                             batch.max_sequence_rows * (args.num_q_heads / pages.num_kv_heads), stream);
  }
}

void Attention(const AttentionArgs& args, Stream& stream) { AttentionWith(ChooseAttentionKernel(args, stream), args, stream); }

}  // namespace bebop::cuda
