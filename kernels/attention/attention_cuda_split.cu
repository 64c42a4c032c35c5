// SPDX-License-Identifier: Apache-2.0
// Attention of decode and verify passes: few rows per sequence, long keys. Reads each key and value once per (sequence, kv head)
// for all rows and q heads of the group; partial softmaxes go to the workspace and are merged by MergeKernel (attention_cuda.cu).
//
// Bytes: 4·head_dim per (position, kv head). FLOPs: 4·head_dim per (position, row, q head), so one FLOP a byte for each packed
// row: 16 for 4 rows and a group of 4, against a balance of about 180 on an H200. Limiter: memory bandwidth, from 48 packed rows
// on closely followed by shared-memory bandwidth (the Q fragments of the scores).
//
// A block has a split of the keys of one (sequence, kv head) and up to 80 packed rows (kRowTiles MMA tiles of 16). Keys and
// values come in tiles of 64 positions (32 KB at head_dim 256) through a ring of 3 to 6 cp.async slots in the order K0 V0 K1 V1
// ..., so 64 to 160 KB are under way on each multiprocessor; one block suffices to keep the memory busy. Eight warps:
//   scores   warp w: keys [16·(w % 4), +16) of the tile, row tiles w / 4, w / 4 + 2, ...
//   values   warp w: columns [w·kDim/8, +kDim/8), all row tiles; accumulators stay in registers over the whole split
// Three barriers a tile: keys are there; row maxima are there; weights and values are there. 94 to 236 registers, no spills.
//
// A row's numbers do not depend on the rows beside it: MMA rows are independent, tiles start at absolute multiples of 64, and a
// tile that a row does not see leaves its registers as they are (factor 1, weights 0).
#include "kernels/attention/attention_cuda.cuh"

#include <algorithm>

#include "kernels/common/gpu.h"
#include "kernels/common/gpu_vector.h"

namespace bebop::cuda::attention {
namespace {

constexpr int kThreads = 256;
constexpr int kKeyGroups = 4;  // of 16 keys
constexpr int kMaxSlots = 6;

// Layout of the dynamic shared memory, in this order.
template <int kDim, int kRowTiles>
struct Shared {
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int64_t kQueryBytes = int64_t{kRows} * kDim * 2;
  static constexpr int64_t kWeightBytes = int64_t{kRows} * kKeyTile * 2;
  static constexpr int64_t kGroupBytes = int64_t{kKeyGroups} * kRows * 4;  // maxima; as many for sums
  static constexpr int64_t kLimitBytes = int64_t{kRows} * 4;
  static constexpr int64_t kBadBytes = int64_t{kDim} * 4;
  static constexpr int64_t kFixedBytes = kQueryBytes + kWeightBytes + 2 * kGroupBytes + kLimitBytes + kBadBytes;
  static constexpr int64_t kSlotBytes = int64_t{kKeyTile} * kDim * 2;
};

template <int kDim, int kRowTiles>
__global__ void __launch_bounds__(kThreads, 1) SplitKernel(const Params<BFloat16> params, const SplitPlan plan) {
  using Layout = Shared<kDim, kRowTiles>;
  constexpr int kRows = Layout::kRows;
  constexpr int kOwnTiles = (kRowTiles + 1) / 2;  // row tiles of a warp in the scores
  constexpr int kColumnTiles = kDim / 64;         // 8-column tiles of a warp in the values
  BEBOP_DYNAMIC_SHARED(unsigned char, shared);
  BFloat16* const queries = reinterpret_cast<BFloat16*>(shared);                        // [kRows][kDim]
  BFloat16* const weights = reinterpret_cast<BFloat16*>(shared + Layout::kQueryBytes);  // [kRows][kKeyTile]
  float* const group_max = reinterpret_cast<float*>(shared + Layout::kQueryBytes + Layout::kWeightBytes);  // [kKeyGroups][kRows]
  float* const group_sum = group_max + kKeyGroups * kRows;                                                  // [kKeyGroups][kRows]
  int32_t* const row_limit = reinterpret_cast<int32_t*>(group_sum + kKeyGroups * kRows);                    // [kRows]
  int32_t* const first_bad = row_limit + kRows;                                                             // [kDim]
  BFloat16* const slots = reinterpret_cast<BFloat16*>(shared + Layout::kFixedBytes);

  const int32_t split = static_cast<int32_t>(blockIdx.x);
  const int32_t kv_head = static_cast<int32_t>(blockIdx.y) % params.num_kv_heads;
  const SequenceRows sequence = params.sequences[blockIdx.z];
  PackedRows rows;
  rows.first_row = sequence.first_row;
  rows.first_packed = static_cast<int32_t>(blockIdx.y) / params.num_kv_heads * kRows;
  rows.count = min(kRows, sequence.num_rows * params.group - rows.first_packed);
  rows.group = params.group;
  rows.first_head = kv_head * params.group;
  if (rows.count <= 0 || rows.Row(rows.count - 1) < plan.row_begin || rows.Row(0) >= plan.row_end) return;
  const int32_t first_limit = params.row_position[rows.Row(0)] - params.num_chain;
  const int32_t last_limit = params.row_position[rows.Row(rows.count - 1)] - params.num_chain;
  const int32_t first_tile = split * plan.tiles_per_split;
  const int32_t num_tiles = max(0, min(plan.tiles_per_split, (last_limit + kKeyTile) / kKeyTile - first_tile));
  if (split > 0 && num_tiles == 0) return;  // split 0 also speaks for rows that see nothing

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int key_group = warp % kKeyGroups, half = warp / kKeyGroups;
  const int quad_row = lane / 4, quad_column = lane % 4 * 2;     // place of a lane's values in an accumulator tile
  const int matrix_row = lane % 8, matrix = lane / 8;            // whose address a lane gives to ldmatrix
  const int low_row = (matrix & 1) * 8 + matrix_row, high_row = (matrix >> 1) * 8 + matrix_row;

  int fill_slot = 0, use_slot = 0;
  const auto next = [&](int slot) { return slot + 1 == plan.num_slots ? 0 : slot + 1; };
  // Item 2t is the keys of tile t, 2t + 1 its values. Always one group, so that counting groups counts items.
  const auto fill = [&](int32_t item) {
    if (item < 2 * num_tiles) {
      FillTile<kDim, kThreads>(params, item % 2 == 0 ? params.k : params.v, sequence.first_page, kv_head,
                               (first_tile + item / 2) * kKeyTile, last_limit, slots + fill_slot * kKeyTile * kDim);
    }
    gpu::CpAsyncCommit();
    fill_slot = next(fill_slot);
  };
  for (int32_t item = 0; item + 1 < plan.num_slots; ++item) fill(item);

  LoadQueries<kDim, kRows, kThreads>(params, rows, queries);
  for (int r = static_cast<int>(threadIdx.x); r < kRows; r += kThreads) {
    row_limit[r] = r < rows.count ? params.row_position[rows.Row(r)] - params.num_chain : -1;
  }

  float acc[kRowTiles][kColumnTiles][4];
  float row_max[kRowTiles][2], sum[kOwnTiles][2];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    row_max[m][0] = row_max[m][1] = -kInfinity;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < kOwnTiles; ++i) sum[i][0] = sum[i][1] = 0.0f;

  for (int32_t t = 0; t < num_tiles; ++t) {
    const int32_t tile_position = (first_tile + t) * kKeyTile;
    const bool cut = tile_position + kKeyTile - 1 > first_limit || tile_position < params.first_index;

    // Keys. The slot that the barrier frees is that of the item before.
    WaitPending(plan.num_slots - 2);
    __syncthreads();
    fill(2 * t + plan.num_slots - 1);
    const BFloat16* const keys = slots + use_slot * kKeyTile * kDim;
    use_slot = next(use_slot);
    if (cut) {
      for (int c = static_cast<int>(threadIdx.x); c < kDim; c += kThreads) first_bad[c] = kNoBad;
    }
    float score[kOwnTiles][2][4];
#pragma unroll
    for (int i = 0; i < kOwnTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) score[i][0][e] = score[i][1][e] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t key[4];
      gpu::LdMatrixX4(key, keys + Swizzle<kDim>(key_group * 16 + high_row, step * 2 + (matrix & 1)));
      const uint32_t key0[2] = {key[0], key[1]}, key1[2] = {key[2], key[3]};
#pragma unroll
      for (int i = 0; i < kOwnTiles; ++i) {
        const int m = half + 2 * i;
        if (m >= kRowTiles) continue;
        uint32_t query[4];
        gpu::LdMatrixX4(query, queries + Swizzle<kDim>(m * 16 + low_row, step * 2 + (matrix >> 1)));
        gpu::MmaBf16(score[i][0], query, key0);
        gpu::MmaBf16(score[i][1], query, key1);
      }
    }

    // Maxima.
#pragma unroll
    for (int i = 0; i < kOwnTiles; ++i) {
      const int m = half + 2 * i;
      if (m >= kRowTiles) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = m * 16 + quad_row + 8 * h;
        if (cut) {
          const int32_t limit = row_limit[r];
#pragma unroll
          for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int32_t position = tile_position + key_group * 16 + n * 8 + quad_column + e;
              if (position > limit || position < params.first_index) score[i][n][2 * h + e] = -kInfinity;
            }
          }
        }
        float max = fmaxf(fmaxf(score[i][0][2 * h], score[i][0][2 * h + 1]), fmaxf(score[i][1][2 * h], score[i][1][2 * h + 1]));
        max = fmaxf(max, __shfl_xor_sync(gpu::kAllLanes, max, 1));
        max = fmaxf(max, __shfl_xor_sync(gpu::kAllLanes, max, 2));
        if (lane % 4 == 0) group_max[key_group * kRows + r] = max;
      }
    }
    __syncthreads();

    // Weights. `base` is the new maximum, or 0 while a row has seen nothing but -infinity.
    float factor[kRowTiles][2], base[kRowTiles][2];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float* const maxima = group_max + m * 16 + quad_row + 8 * h;
        float max = row_max[m][h];
#pragma unroll
        for (int g = 0; g < kKeyGroups; ++g) max = fmaxf(max, maxima[g * kRows]);
        base[m][h] = max == -kInfinity ? 0.0f : max;
        factor[m][h] = exp2f((row_max[m][h] - base[m][h]) * (params.scale * kLog2E));
        row_max[m][h] = max;
      }
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      if (m % 2 != half) continue;  // the row tiles of this warp's scores
      const int i = m / 2;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = m * 16 + quad_row + 8 * h;
        float tile_sum = 0.0f;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const uint32_t pair = gpu::PackBf16(exp2f((score[i][n][2 * h] - base[m][h]) * (params.scale * kLog2E)),
                                              exp2f((score[i][n][2 * h + 1] - base[m][h]) * (params.scale * kLog2E)));
          // The rounded weights, so that they and the sum agree.
          tile_sum = __fadd_rn(tile_sum, __fadd_rn(gpu::LowBf16(pair), gpu::HighBf16(pair)));
          *reinterpret_cast<uint32_t*>(weights + Swizzle<kKeyTile>(r, key_group * 2 + n) + quad_column) = pair;
        }
        sum[i][h] = __fmaf_rn(sum[i][h], factor[m][h], tile_sum);
      }
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[m][n][e] *= factor[m][e / 2];
      }
    }

    // Values.
    WaitPending(plan.num_slots - 2);
    __syncthreads();
    fill(2 * t + plan.num_slots);
    BFloat16* const values = slots + use_slot * kKeyTile * kDim;
    use_slot = next(use_slot);
    if (cut) {
      ClearNonFinite<kDim, kThreads>(values, first_bad);
      __syncthreads();
    }
#pragma unroll
    for (int step = 0; step < kKeyTile / 16; ++step) {
      uint32_t weight[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        gpu::LdMatrixX4(weight[m], weights + Swizzle<kKeyTile>(m * 16 + low_row, step * 2 + (matrix >> 1)));
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        uint32_t value[4];
        gpu::LdMatrixX4Trans(value, values + Swizzle<kDim>(step * 16 + low_row, warp * kColumnTiles + n + (matrix >> 1)));
        const uint32_t value0[2] = {value[0], value[1]}, value1[2] = {value[2], value[3]};
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          gpu::MmaBf16(acc[m][n], weight[m], value0);
          gpu::MmaBf16(acc[m][n + 1], weight[m], value1);
        }
      }
    }
    if (cut) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int32_t bad = first_bad[(warp * kColumnTiles + n) * 8 + quad_column + e % 2];
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            if (row_limit[m * 16 + quad_row + e / 2 * 8] - tile_position >= bad) acc[m][n][e] = kNan;
          }
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kOwnTiles; ++i) {
    const int m = half + 2 * i;
    if (m >= kRowTiles) continue;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sum[i][h];
      total += __shfl_xor_sync(gpu::kAllLanes, total, 1);
      total += __shfl_xor_sync(gpu::kAllLanes, total, 2);
      if (lane % 4 == 0) group_sum[key_group * kRows + m * 16 + quad_row + 8 * h] = total;
    }
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = m * 16 + quad_row + 8 * h;
      if (r >= rows.count) continue;
      const int32_t row = rows.Row(r);
      // MergeKernel reads the splits that a row sees, and split 0.
      if (row < plan.row_begin || row >= plan.row_end || (split > 0 && row_limit[r] < first_tile * kKeyTile)) continue;
      const int64_t place = (int64_t{row - plan.row_begin} * params.num_q_heads + rows.Head(r)) * plan.num_splits + split;
      if (warp == 0 && lane % 4 == 0) {
        float total = group_sum[r];
        for (int g = 1; g < kKeyGroups; ++g) total = __fadd_rn(total, group_sum[g * kRows + r]);
        plan.stats[place] = make_float2(row_max[m][h], total);
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        const int column = (warp * kColumnTiles + n) * 8 + quad_column;
        if (column < params.head_dim) {
          float2* const to = reinterpret_cast<float2*>(plan.acc + place * params.head_dim + column);
          *to = make_float2(acc[m][n][2 * h], acc[m][n][2 * h + 1]);
        }
      }
    }
  }
}

struct Instance {
  void (*kernel)(Params<BFloat16>, SplitPlan);
  int32_t rows;
  int64_t fixed_bytes;
  int64_t slot_bytes;
};

template <int kDim, int kRowTiles>
constexpr Instance MakeInstance() {
  using Layout = Shared<kDim, kRowTiles>;
  return {SplitKernel<kDim, kRowTiles>, Layout::kRows, Layout::kFixedBytes, Layout::kSlotBytes};
}

// 80 rows: a group of 8 with 9 rows, or of 16 with 5. Smaller head_dims run padded with zeros.
constexpr Instance kInstances128[] = {MakeInstance<128, 1>(), MakeInstance<128, 2>(), MakeInstance<128, 3>(),
                                      MakeInstance<128, 5>()};
constexpr Instance kInstances256[] = {MakeInstance<256, 1>(), MakeInstance<256, 2>(), MakeInstance<256, 3>(),
                                      MakeInstance<256, 5>()};

int64_t NumSlots(const Instance& instance, const Stream& stream) {
  return std::min<int64_t>(kMaxSlots, (stream.max_shared_bytes() - instance.fixed_bytes) / instance.slot_bytes);
}

// The smallest instance with `rows` rows, or the largest that shared memory has room for.
const Instance& ChooseInstance(int32_t head_dim, int64_t rows, const Stream& stream) {
  const auto& instances = head_dim <= 128 ? kInstances128 : kInstances256;
  const Instance* chosen = &instances[0];
  for (const Instance& instance : instances) {
    if (chosen->rows < rows && NumSlots(instance, stream) >= 2) chosen = &instance;
  }
  return *chosen;
}

}  // namespace

int32_t SplitRows(int32_t head_dim, int64_t packed_rows, const Stream& stream) {
  return ChooseInstance(head_dim, packed_rows, stream).rows;
}

void LaunchSplit(const Params<BFloat16>& params, SplitPlan plan, int32_t split_rows, int32_t num_sequences,
                 int32_t max_packed_rows, Stream& stream) {
  const Instance& instance = ChooseInstance(params.head_dim, split_rows, stream);
  plan.num_slots = static_cast<int32_t>(NumSlots(instance, stream));
  const int64_t bytes = instance.fixed_bytes + plan.num_slots * instance.slot_bytes;
  const int32_t row_blocks = (max_packed_rows + instance.rows - 1) / instance.rows;
  const dim3 grid(static_cast<unsigned>(plan.num_splits), static_cast<unsigned>(params.num_kv_heads * row_blocks),
                  static_cast<unsigned>(num_sequences));
  BEBOP_CUDA_TRY(stream, gpu::Launch(instance.kernel, grid, dim3(kThreads), static_cast<size_t>(bytes), stream.handle(), params,
                                     plan));
}

}  // namespace bebop::cuda::attention
