// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/attention/attention.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/common/gpu.h"

// What the attention kernels share: their arguments, the packing of rows, and tiles of keys and values in shared memory.
//
// Packing: the q heads of a group read the same keys, and so do the rows of a sequence. "Packed row" r of a (sequence, kv head)
// is window row r / group, q head kv_head·group + r % group; sixteen packed rows make the A operand of an MMA. Limits ascend with
// r.
namespace bebop::cuda::attention {

inline constexpr int kKeyTile = 64;           // positions of a tile, which starts at a multiple of it
inline constexpr int kMinPageTokens = 16;     // FillTile asks a page for up to 16 positions at once
inline constexpr int kMaxChain = 8;
inline constexpr int kMaxHeadDim = 256;
inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// AttentionArgs as kernels take them.
template <typename Element>
struct Params {
  const SequenceRows* sequences;
  const int32_t* page_ids;
  const int32_t* row_sequence;
  const int32_t* row_position;
  const Element* q;
  const Element* q_gate;
  const Element* k;
  const Element* v;
  Element* out;
  const Element* chain_k[kMaxChain];
  const Element* chain_v[kMaxChain];
  int64_t chain_k_stride[kMaxChain];
  int64_t chain_v_stride[kMaxChain];
  int64_t q_stride;
  int64_t q_gate_stride;
  int64_t out_stride;
  int32_t num_chain;
  int32_t first_index;
  int32_t num_kv_heads;
  int32_t num_q_heads;
  int32_t group;  // q heads of a kv head
  int32_t head_dim;
  int32_t page_shift;  // log2 of page_tokens
  float scale;         // of scores: 1/√head_dim
};

// How the keys of a call are split over blocks. Split i has positions [i·tiles_per_split·kKeyTile, ...). Partial results of batch
// rows [row_begin, row_end), per (row, q head, split): acc[head_dim] = Σ weight·v and stats = (largest score, Σ weight).
struct SplitPlan {
  int32_t tiles_per_split;
  int32_t num_splits;
  int32_t row_begin;
  int32_t row_end;
  int32_t num_slots;  // key and value tiles that shared memory holds
  float* acc;
  float2* stats;
};

// Enqueue; the launchers of attention_cuda_split.cu and attention_cuda_prefill.cu.
// Packed rows that a block of the split kernel takes on this device: a multiple of 16, enough for `packed_rows` if possible.
int32_t SplitRows(int32_t head_dim, int64_t packed_rows, const Stream& stream);
void LaunchSplit(const Params<BFloat16>& params, SplitPlan plan, int32_t split_rows, int32_t num_sequences,
                 int32_t max_packed_rows, Stream& stream);
inline constexpr int32_t kPrefillRows = 64;  // packed rows of a block
void LaunchPrefill(const Params<BFloat16>& params, int32_t num_sequences, int32_t max_packed_rows, Stream& stream);

// ---- Device helpers ----

// Consecutive packed rows of one (sequence, kv head).
struct PackedRows {
  int32_t first_row;     // the sequence's first row in the batch
  int32_t first_packed;
  int32_t count;         // <= 0: none
  int32_t group;
  int32_t first_head;    // kv_head·group

  __device__ int32_t Row(int32_t r) const { return first_row + (first_packed + r) / group; }
  __device__ int32_t Head(int32_t r) const { return first_head + (first_packed + r) % group; }
};

// Element offset of 16-byte chunk `chunk` of row `row` in a shared tile with rows of kColumns elements. Chunks are permuted by
// the row, so that the eight rows of an ldmatrix matrix lie in different banks.
template <int kColumns>
__device__ inline int Swizzle(int row, int chunk) {
  return row * kColumns + ((chunk ^ (row & 7)) << 3);
}

// Groups of cp.async complete but for the last `pending` (0..4).
__device__ inline void WaitPending(int pending) {
  switch (pending) {
    case 0: gpu::CpAsyncWait<0>(); break;
    case 1: gpu::CpAsyncWait<1>(); break;
    case 2: gpu::CpAsyncWait<2>(); break;
    case 3: gpu::CpAsyncWait<3>(); break;
    default: gpu::CpAsyncWait<4>(); break;
  }
}

// Starts the copy of the kKeyTile entries from position `tile_position` on into a shared tile [kKeyTile][kDim]. Entries outside
// [first_index, last_position] and columns from head_dim on become zeros: what lies there in the pages may be NaN, and page_ids
// need not reach that far.
template <int kDim, int kThreads>
__device__ inline void FillTile(const Params<BFloat16>& params, const BFloat16* pages, int32_t first_page, int32_t kv_head,
                                int32_t tile_position, int32_t last_position, BFloat16* tile) {
  constexpr int kChunks = kDim / 8;
  constexpr int kRowsPerThread = kKeyTile * kChunks / kThreads;  // consecutive, so they lie in one page
  static_assert(kMinPageTokens % kRowsPerThread == 0);
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
  const int row = static_cast<int>(threadIdx.x) / kChunks * kRowsPerThread;
  const int32_t position = tile_position + row;
  const bool column_valid = chunk * 8 < params.head_dim;
  const BFloat16* source = pages;
  if (column_valid && position <= last_position) {
    const int64_t page = params.page_ids[first_page + (position >> params.page_shift)];
    const int64_t entry =
        ((page * params.num_kv_heads + kv_head) << params.page_shift) + (position & ((1 << params.page_shift) - 1));
    source = pages + entry * params.head_dim + chunk * 8;
  }
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const bool valid = column_valid && position + i >= params.first_index && position + i <= last_position;
    gpu::CpAsync16(tile + Swizzle<kDim>(row + i, chunk), source, valid);
    source += params.head_dim;
  }
}

// Copies packed rows of q into a shared tile [kRows][kDim]; missing rows and columns are zeros. Visible after a barrier.
template <int kDim, int kRows, int kThreads>
__device__ inline void LoadQueries(const Params<BFloat16>& params, const PackedRows& rows, BFloat16* tile) {
  constexpr int kChunks = kDim / 8;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kChunks; i += kThreads) {
    const int r = i / kChunks, chunk = i % kChunks;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (r < rows.count && chunk * 8 < params.head_dim) {
      const BFloat16* const query = params.q + rows.Row(r) * params.q_stride + int64_t{rows.Head(r)} * params.head_dim;
      value = *reinterpret_cast<const uint4*>(query + chunk * 8);
    }
    *reinterpret_cast<uint4*>(tile + Swizzle<kDim>(r, chunk)) = value;
  }
}

// Rows of a block do not all see the whole of a tile that their limits cut, and a weight of 0 would not keep a NaN or infinity of
// another row's entry out of the product. So such values become 0 in the tile, and first_bad[column] the first entry of the tile
// that had one: a row whose limit reaches it gets NaN there. REQUIRES: first_bad[] = kNoBad before; barriers around.
inline constexpr int32_t kNoBad = std::numeric_limits<int32_t>::max();

template <int kDim, int kThreads>
__device__ inline void ClearNonFinite(BFloat16* tile, int32_t* first_bad) {
  constexpr int kChunks = kDim / 8;
  constexpr uint32_t kLowExponent = 0x7f80u, kHighExponent = 0x7f800000u;
  for (int i = static_cast<int>(threadIdx.x); i < kKeyTile * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    uint32_t* const words = reinterpret_cast<uint32_t*>(tile + Swizzle<kDim>(row, chunk));
    for (int w = 0; w < 4; ++w) {
      uint32_t word = words[w];
      const bool low = (word & kLowExponent) == kLowExponent, high = (word & kHighExponent) == kHighExponent;
      if (!low && !high) continue;
      if (low) atomicMin(first_bad + chunk * 8 + w * 2, row);
      if (high) atomicMin(first_bad + chunk * 8 + w * 2 + 1, row);
      words[w] = word & (low ? 0xffff0000u : 0xffffffffu) & (high ? 0x0000ffffu : 0xffffffffu);
    }
  }
}

__device__ inline float Sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// 1 / Σ weight. The largest weight is 1, so the sum is 0 where nothing is seen, which gives 0, or where all scores are -infinity.
__device__ inline float InverseSum(float sum, bool sees_entries) { return sum != 0.0f ? 1.0f / sum : sees_entries ? kNan : 0.0f; }

}  // namespace bebop::cuda::attention
