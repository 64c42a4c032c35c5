// SPDX-License-Identifier: Apache-2.0
// Attention of prefill passes: many rows per sequence. A block has 64 packed rows of one (sequence, kv head) and walks over their
// keys in tiles of 64 with an online softmax (FlashAttention-2: Dao, 2023, algorithm 1), so nothing but q, k, v, gate and out
// touches memory.
//
// FLOPs: 4·head_dim per (row, q head, visible position). Bytes: 4·head_dim per position for every 64 packed rows, mostly from L2,
// hence 64 FLOPs a byte of L2. Limiter: tensor cores (mma.sync; wgmma would have about 1.5 times their rate on sm_90).
//
// Four warps of 16 packed rows each; scores, weights and the accumulator [16][kDim] stay in registers (128 of them at kDim 256,
// which is why there are only 64 rows), Q in shared memory. Keys and values alternate in a ring of 2 to 4 slots; two blocks share
// a multiprocessor where its shared memory allows, so that one's softmax hides behind the other's products. Long tiles start
// first. At most 251 registers, no spills.
#include "kernels/attention/attention_cuda.cuh"

#include <algorithm>

#include "kernels/common/gpu.h"
#include "kernels/common/gpu_vector.h"

namespace bebop::cuda::attention {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxSlots = 4;

template <int kDim>
struct Shared {
  static constexpr int64_t kQueryBytes = int64_t{kPrefillRows} * kDim * 2;
  static constexpr int64_t kFixedBytes = kQueryBytes + int64_t{kDim} * 4;
  static constexpr int64_t kSlotBytes = int64_t{kKeyTile} * kDim * 2;
};

template <int kDim>
__global__ void __launch_bounds__(kThreads, 2) PrefillKernel(const Params<BFloat16> params, const int32_t num_slots) {
  using Layout = Shared<kDim>;
  constexpr int kColumnTiles = kDim / 8;
  constexpr int kKeyColumns = kKeyTile / 8;
  BEBOP_DYNAMIC_SHARED(unsigned char, shared);
  BFloat16* const queries = reinterpret_cast<BFloat16*>(shared);                        // [kPrefillRows][kDim]
  int32_t* const first_bad = reinterpret_cast<int32_t*>(shared + Layout::kQueryBytes);  // [kDim]
  BFloat16* const slots = reinterpret_cast<BFloat16*>(shared + Layout::kFixedBytes);

  const int32_t kv_head = static_cast<int32_t>(blockIdx.y);
  const SequenceRows sequence = params.sequences[blockIdx.z];
  PackedRows rows;
  rows.first_row = sequence.first_row;
  rows.first_packed = static_cast<int32_t>(gridDim.x - 1 - blockIdx.x) * kPrefillRows;
  rows.count = min(kPrefillRows, sequence.num_rows * params.group - rows.first_packed);
  rows.group = params.group;
  rows.first_head = kv_head * params.group;
  if (rows.count <= 0) return;
  const int32_t first_limit = params.row_position[rows.Row(0)];
  const int32_t last_limit = params.row_position[rows.Row(rows.count - 1)];
  const int32_t num_tiles = last_limit / kKeyTile + 1;

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int quad_row = lane / 4, quad_column = lane % 4 * 2;
  const int matrix_row = lane % 8, matrix = lane / 8;
  const int low_row = (matrix & 1) * 8 + matrix_row, high_row = (matrix >> 1) * 8 + matrix_row;

  int fill_slot = 0, use_slot = 0;
  const auto next = [&](int slot) { return slot + 1 == num_slots ? 0 : slot + 1; };
  // Item 2t is the keys of tile t, 2t + 1 its values. Always one group, so that counting groups counts items.
  const auto fill = [&](int32_t item) {
    if (item < 2 * num_tiles) {
      FillTile<kDim, kThreads>(params, item % 2 == 0 ? params.k : params.v, sequence.first_page, kv_head, item / 2 * kKeyTile,
                               last_limit, slots + fill_slot * kKeyTile * kDim);
    }
    gpu::CpAsyncCommit();
    fill_slot = next(fill_slot);
  };
  for (int32_t item = 0; item + 1 < num_slots; ++item) fill(item);

  LoadQueries<kDim, kPrefillRows, kThreads>(params, rows, queries);
  int32_t limit[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = warp * 16 + quad_row + 8 * h;
    limit[h] = r < rows.count ? params.row_position[rows.Row(r)] : -1;
  }

  float acc[kColumnTiles][4];
  float row_max[2] = {-kInfinity, -kInfinity}, sum[2] = {0.0f, 0.0f};  // a sum is spread over the four lanes of a row
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[n][e] = 0.0f;
  }

  for (int32_t t = 0; t < num_tiles; ++t) {
    const int32_t tile_position = t * kKeyTile;
    const bool cut = tile_position + kKeyTile - 1 > first_limit || tile_position < params.first_index;

    // Keys. The slot that the barrier frees is that of the item before.
    WaitPending(num_slots - 2);
    __syncthreads();
    fill(2 * t + num_slots - 1);
    const BFloat16* const keys = slots + use_slot * kKeyTile * kDim;
    use_slot = next(use_slot);
    if (cut) {
      for (int c = static_cast<int>(threadIdx.x); c < kDim; c += kThreads) first_bad[c] = kNoBad;
    }
    float score[kKeyColumns][4];
#pragma unroll
    for (int n = 0; n < kKeyColumns; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) score[n][e] = 0.0f;
    }
#pragma unroll 4  // registers are short: more steps at once spill
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t query[4];
      gpu::LdMatrixX4(query, queries + Swizzle<kDim>(warp * 16 + low_row, step * 2 + (matrix >> 1)));
#pragma unroll
      for (int n = 0; n < kKeyColumns; n += 2) {
        uint32_t key[4];
        gpu::LdMatrixX4(key, keys + Swizzle<kDim>(n * 8 + high_row, step * 2 + (matrix & 1)));
        const uint32_t key0[2] = {key[0], key[1]}, key1[2] = {key[2], key[3]};
        gpu::MmaBf16(score[n], query, key0);
        gpu::MmaBf16(score[n + 1], query, key1);
      }
    }

    if (cut) {
#pragma unroll
      for (int n = 0; n < kKeyColumns; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int32_t position = tile_position + n * 8 + quad_column + e % 2;
          if (position > limit[e / 2] || position < params.first_index) score[n][e] = -kInfinity;
        }
      }
    }
    uint32_t weight[kKeyColumns][2];  // pairs of bf16, which are the A fragments of the second product
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float max = row_max[h];
#pragma unroll
      for (int n = 0; n < kKeyColumns; ++n) max = fmaxf(max, fmaxf(score[n][2 * h], score[n][2 * h + 1]));
      max = fmaxf(max, __shfl_xor_sync(gpu::kAllLanes, max, 1));
      max = fmaxf(max, __shfl_xor_sync(gpu::kAllLanes, max, 2));
      const float base = max == -kInfinity ? 0.0f : max;  // 0 while the row has seen nothing but -infinity
      const float factor = exp2f((row_max[h] - base) * (params.scale * kLog2E));
      row_max[h] = max;
      float tile_sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeyColumns; ++n) {
        weight[n][h] = gpu::PackBf16(exp2f((score[n][2 * h] - base) * (params.scale * kLog2E)),
                                     exp2f((score[n][2 * h + 1] - base) * (params.scale * kLog2E)));
        // The rounded weights, so that they and the sum agree.
        tile_sum += gpu::LowBf16(weight[n][h]) + gpu::HighBf16(weight[n][h]);
      }
      sum[h] = sum[h] * factor + tile_sum;
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        acc[n][2 * h] *= factor;
        acc[n][2 * h + 1] *= factor;
      }
    }

    // Values.
    WaitPending(num_slots - 2);
    __syncthreads();
    fill(2 * t + num_slots);
    BFloat16* const values = slots + use_slot * kKeyTile * kDim;
    use_slot = next(use_slot);
    if (cut) {
      ClearNonFinite<kDim, kThreads>(values, first_bad);
      __syncthreads();
    }
#pragma unroll
    for (int step = 0; step < kKeyTile / 16; ++step) {
      const uint32_t weights[4] = {weight[2 * step][0], weight[2 * step][1], weight[2 * step + 1][0], weight[2 * step + 1][1]};
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        uint32_t value[4];
        gpu::LdMatrixX4Trans(value, values + Swizzle<kDim>(step * 16 + low_row, n + (matrix >> 1)));
        const uint32_t value0[2] = {value[0], value[1]}, value1[2] = {value[2], value[3]};
        gpu::MmaBf16(acc[n], weights, value0);
        gpu::MmaBf16(acc[n + 1], weights, value1);
      }
    }
    if (cut) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (limit[e / 2] - tile_position >= first_bad[n * 8 + quad_column + e % 2]) acc[n][e] = kNan;
        }
      }
    }
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float total = sum[h];
    total += __shfl_xor_sync(gpu::kAllLanes, total, 1);
    total += __shfl_xor_sync(gpu::kAllLanes, total, 2);
    const int r = warp * 16 + quad_row + 8 * h;
    if (r >= rows.count) continue;
    const float inverse = InverseSum(total, limit[h] >= params.first_index);
    const int64_t row = rows.Row(r), head = rows.Head(r);
    const BFloat16* const gate = params.q_gate + row * params.q_gate_stride + (2 * head + 1) * params.head_dim;
    BFloat16* const out = params.out + row * params.out_stride + head * params.head_dim;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      const int column = n * 8 + quad_column;
      if (column >= params.head_dim) continue;
      const uint32_t gates = *reinterpret_cast<const uint32_t*>(gate + column);
      *reinterpret_cast<uint32_t*>(out + column) = gpu::PackBf16(acc[n][2 * h] * inverse * Sigmoid(gpu::LowBf16(gates)),
                                                                 acc[n][2 * h + 1] * inverse * Sigmoid(gpu::HighBf16(gates)));
    }
  }
}

template <int kDim>
void Enqueue(const Params<BFloat16>& params, int32_t num_sequences, int32_t max_packed_rows, Stream& stream) {
  using Layout = Shared<kDim>;
  // Two blocks a multiprocessor; a block also takes 1 KB for the system.
  int64_t slots = (stream.max_shared_bytes() / 2 - 1024 - Layout::kFixedBytes) / Layout::kSlotBytes;
  if (slots < 2) slots = (stream.max_shared_bytes() - Layout::kFixedBytes) / Layout::kSlotBytes;
  slots = std::min<int64_t>(slots, kMaxSlots);
  const int64_t bytes = Layout::kFixedBytes + slots * Layout::kSlotBytes;
  const int32_t row_blocks = (max_packed_rows + kPrefillRows - 1) / kPrefillRows;
  const dim3 grid(static_cast<unsigned>(row_blocks), static_cast<unsigned>(params.num_kv_heads),
                  static_cast<unsigned>(num_sequences));
  BEBOP_CUDA_TRY(stream, gpu::Launch(PrefillKernel<kDim>, grid, dim3(kThreads), static_cast<size_t>(bytes), stream.handle(),
                                     params, static_cast<int32_t>(slots)));
}

}  // namespace

void LaunchPrefill(const Params<BFloat16>& params, int32_t num_sequences, int32_t max_packed_rows, Stream& stream) {
  if (params.head_dim <= 128) {
    Enqueue<128>(params, num_sequences, max_packed_rows, stream);
  } else {
    Enqueue<256>(params, num_sequences, max_packed_rows, stream);
  }
}

}  // namespace bebop::cuda::attention
