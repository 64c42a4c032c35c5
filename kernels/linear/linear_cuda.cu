// SPDX-License-Identifier: Apache-2.0
// y = x Wᵀ on the device: our own kernels.
//
// bf16, few rows. The weights' N·K·2 bytes are nearly all that moves (x and y add T·(K + 2N) / (N·K), 1 % at T = 8), and the
// arithmetic is T operations a byte against the H200's ridge of 184: memory bound, 2560 x 9216 takes 11 µs (estimated). What has
// to be right is the number of bytes in flight. A block takes 64 or 128 rows of W and a run of columns; stages of 64 columns pass
// through a ring of 4 to 6 buffers filled by 16-byte cp.async, so that a block has 40 to 60 KiB under way and two to four blocks
// fit a multiprocessor. Each byte of W is read by one block, and goes through shared memory because the tensor cores want it by
// rows of eight.
//
// W rows are the 16-row operand of mma.m16n8k16 and rows of x the 8-column one (the transpose of how the product is written): T =
// 1 pays for eight columns rather than for sixteen rows, and a warp holds 16 rows of W times all rows of x of its block.
//
// Matrices with few rows are cut along K as well (SplitsOf). The runs' partial sums go to the stream's workspace; the block that
// arrives last at its tile (an integer counter) adds them up in the order of the runs. So no launch follows, no block waits, and
// the order of the sum does not depend on the order of the blocks.
//
// bf16, more rows (batch-invariant mode): the same loop over tiles of 64 rows of x, which adds up its runs itself, one after the
// other, with the same result to the bit. Speed is not its aim (estimated: half of what the tensor cores give through mma); that
// is cuBLASLt's job.
//
// Shared memory: rows of 64 bf16 are 128 bytes, eight 16-byte chunks; chunk c of row r lies at c ^ (r % 8), so that both the
// copies (eight chunks of a row) and ldmatrix (one chunk of eight rows) touch all banks.
//
// float32 is the oracle mode: one thread an output and four rows of x, no shared memory, one chain of fmaf.

#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/common/gpu.h"
#include "kernels/linear/linear_cuda.h"

namespace bebop::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kRowBytes = static_cast<int>(kStageCols) * 2;
constexpr int kChunks = kRowBytes / 16;

struct TileArgs {
  const BFloat16* x = nullptr;
  const BFloat16* w = nullptr;
  void* y = nullptr;
  DType y_dtype = DType::kFloat32;
  int64_t x_stride = 0, y_stride = 0;
  int32_t num_tokens = 0;  // T
  int32_t num_rows = 0;    // N
  int32_t num_cols = 0;    // K
  int32_t num_splits = 1;
  int32_t split_cols = 0;
  float* partials = nullptr;    // [num_splits, T, N]
  int32_t* counters = nullptr;  // [tiles]
};

// What a block takes: kTokens rows of x, 16 rows of W a warp.
template <int kTileTokens, int kNumWarps, int kNumStages, bool kAllSplits>
struct Tile {
  static constexpr int kTokens = kTileTokens;
  static constexpr int kWarps = kNumWarps;
  static constexpr int kStages = kNumStages;
  static constexpr bool kSequential = kAllSplits;  // one block adds up all runs, rather than a block for each
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = kWarps * 16;
  static constexpr int kWeightBytes = kRows * kRowBytes;
  static constexpr int kStageBytes = kWeightBytes + kTokens * kRowBytes;
  static constexpr int kOutStride = kRows + 4;  // of the sums in shared memory: lanes of a warp write to 32 banks
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kTokens * kOutStride * 4 <= kSharedBytes);
  static_assert(kRows % kTileRows == 0);
};
using Tile8 = Tile<8, 4, 6, false>;
using Tile16 = Tile<16, 4, 6, false>;
using Tile32 = Tile<32, 8, 4, false>;
using Tile64 = Tile<64, 8, 4, true>;
static_assert(Tile32::kTokens == kMaxStreamRows);

// Where chunk `chunk` of row `row` lies in a buffer.
__device__ int ChunkOffset(int row, int chunk) { return row * kRowBytes + (chunk ^ (row % kChunks)) * 16; }

__device__ void StoreOutput(const TileArgs& args, int64_t token, int64_t row, float value) {
  const int64_t at = token * args.y_stride + row;
  if (args.y_dtype == DType::kFloat32) {
    static_cast<float*>(args.y)[at] = value;
  } else {
    static_cast<BFloat16*>(args.y)[at] = ToBFloat16(value);
  }
}

// Block (x, y): rows [x * kTokens, ...) of x; tile y of W, or, unless kSequential, run y % num_splits of tile y / num_splits.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) LinearBf16Kernel(TileArgs args) {
  constexpr int kTokens = Tile::kTokens, kRows = Tile::kRows, kThreads = Tile::kThreads, kStages = Tile::kStages;
  constexpr int kColumnTiles = kTokens / 8;
  BEBOP_DYNAMIC_SHARED(unsigned char, shared);
  __shared__ bool is_last;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int tile = static_cast<int>(blockIdx.y) / (Tile::kSequential ? 1 : args.num_splits);
  const int split = Tile::kSequential ? 0 : static_cast<int>(blockIdx.y) % args.num_splits;
  const int first_token = static_cast<int>(blockIdx.x) * kTokens, first_row = tile * kRows;
  const int begin = split * args.split_cols;
  const int end = Tile::kSequential ? args.num_cols : min(begin + args.split_cols, args.num_cols);
  const int num_stages = (end - begin + static_cast<int>(kStageCols) - 1) / static_cast<int>(kStageCols);

  // This thread's part of every stage: one chunk of each kCopyRows-th row. Pointers and places are worked out here, once: a stage
  // is 8 KiB for four warps, and at full memory speed an SM has time for about a hundred instructions of each. Rows beyond W's
  // are copies of the last one, whose sums nobody stores; rows beyond x's, which would cost more, are zeros, and so are columns
  // beyond the run.
  constexpr int kCopyRows = kThreads / kChunks;
  static_assert(kCopyRows % kChunks == 0 && kRows % kCopyRows == 0);
  constexpr int kWeightCopies = kRows / kCopyRows, kTokenCopies = (kTokens + kCopyRows - 1) / kCopyRows;
  const int copy_row = thread / kChunks, copy_chunk = thread % kChunks, copy_at = ChunkOffset(copy_row, copy_chunk);
  const BFloat16* w_from[kWeightCopies];
  const BFloat16* x_from[kTokenCopies];
#pragma unroll
  for (int j = 0; j < kWeightCopies; ++j) {
    const int64_t row = min(first_row + copy_row + j * kCopyRows, args.num_rows - 1);
    w_from[j] = args.w + row * args.num_cols + begin + copy_chunk * 8;
  }
#pragma unroll
  for (int j = 0; j < kTokenCopies; ++j) {
    const int64_t token = first_token + copy_row + j * kCopyRows;
    x_from[j] = args.x + token * args.x_stride + begin + copy_chunk * 8;
  }
  int next_col = begin;  // of the stage that is copied next
  int next_buffer = 0;   // its place in the ring, in bytes
  // Starts the next stage's copies. Past the end an empty group keeps the count of groups.
  const auto load = [&] {
    if (next_col < end) {
      unsigned char* const to = shared + next_buffer + copy_at;
      const bool col_valid = next_col + copy_chunk * 8 < end;
#pragma unroll
      for (int j = 0; j < kWeightCopies; ++j) {
        gpu::CpAsync16(to + j * kCopyRows * kRowBytes, w_from[j], col_valid);
        w_from[j] += kStageCols;
      }
#pragma unroll
      for (int j = 0; j < kTokenCopies; ++j) {
        const int token = copy_row + j * kCopyRows;
        if (kTokens >= kCopyRows || token < kTokens) {
          gpu::CpAsync16(to + Tile::kWeightBytes + j * kCopyRows * kRowBytes, x_from[j],
                         col_valid && first_token + token < args.num_tokens);
        }
        x_from[j] += kStageCols;
      }
      next_col += static_cast<int>(kStageCols);
      next_buffer = next_buffer + Tile::kStageBytes == Tile::kSharedBytes ? 0 : next_buffer + Tile::kStageBytes;
    }
    gpu::CpAsyncCommit();
  };

  // Fragments: element e of sums[i] is row lane / 4 + 8 * (e / 2) of the warp's 16 rows of W and row 8 * i + lane % 4 * 2 + e % 2
  // of x.
  float sums[kColumnTiles][4] = {};
  float totals[kColumnTiles][4] = {};  // of the runs before this one, if kSequential
  for (int stage = 0; stage < kStages - 1; ++stage) load();
  // This lane's rows for ldmatrix. Sixteen columns further on are two chunks, which the swizzle makes an exclusive or of their
  // offset.
  const int a_at = ChunkOffset(warp * 16 + lane % 16, lane / 16);
  const int b_at = Tile::kWeightBytes + ChunkOffset((kColumnTiles > 1 ? lane / 16 * 8 : 0) + lane % 8, lane / 8 % 2);
  int buffer = 0;
  for (int stage = 0; stage < num_stages; ++stage) {
    gpu::CpAsyncWait<kStages - 2>();
    __syncthreads();  // the stage has arrived for all threads, and all have left the buffer that is filled next
    load();
#pragma unroll
    for (int step = 0; step < kChunks / 2; ++step) {
      uint32_t a[4];
      gpu::LdMatrixX4(a, shared + buffer + (a_at ^ step * 32));
      if constexpr (kColumnTiles == 1) {
        uint32_t b[2];
        gpu::LdMatrixX2(b, shared + buffer + (b_at ^ step * 32));
        gpu::MmaBf16(sums[0], a, b);
      } else {
#pragma unroll
        for (int i = 0; i < kColumnTiles; i += 2) {
          uint32_t b[4];
          gpu::LdMatrixX4(b, shared + buffer + (b_at ^ step * 32) + i * 8 * kRowBytes);
          const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
          gpu::MmaBf16(sums[i], a, low);
          gpu::MmaBf16(sums[i + 1], a, high);
        }
      }
    }
    buffer = buffer + Tile::kStageBytes == Tile::kSharedBytes ? 0 : buffer + Tile::kStageBytes;
    if constexpr (Tile::kSequential) {
      const int done = (stage + 1) * static_cast<int>(kStageCols);
      if (done % args.split_cols == 0 || stage + 1 == num_stages) {
        const bool is_first = done <= args.split_cols;
#pragma unroll
        for (int i = 0; i < kColumnTiles; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            totals[i][e] = is_first ? sums[i][e] : totals[i][e] + sums[i][e];
            sums[i][e] = 0.0f;
          }
        }
      }
    }
  }

  // Through shared memory, so that neighbouring lanes write neighbouring columns of y.
  __syncthreads();
  float* const out = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < kColumnTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      out[(i * 8 + lane % 4 * 2 + e % 2) * Tile::kOutStride + warp * 16 + lane / 4 + e / 2 * 8] =
          Tile::kSequential ? totals[i][e] : sums[i][e];
    }
  }
  __syncthreads();
  const bool is_split = !Tile::kSequential && args.num_splits > 1;
  const int row = first_row + thread % kRows;
  const int64_t plane = static_cast<int64_t>(args.num_tokens) * args.num_rows;  // of the partial sums of one run
  for (int i = thread / kRows; i < kTokens; i += kThreads / kRows) {
    const int token = first_token + i;
    if (row >= args.num_rows || token >= args.num_tokens) continue;
    const float value = out[i * Tile::kOutStride + thread % kRows];
    if (is_split) {
      args.partials[split * plane + static_cast<int64_t>(token) * args.num_rows + row] = value;
    } else {
      StoreOutput(args, token, row, value);
    }
  }
  if (!is_split) return;

  // The last block of the tile sees all others' partial sums: each wrote them, fenced, and then counted itself.
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    is_last = atomicAdd(&args.counters[tile], 1) == args.num_splits - 1;
    if (is_last) args.counters[tile] = 0;  // for the next launch
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int i = thread / kRows; i < kTokens; i += kThreads / kRows) {
    const int token = first_token + i;
    if (row >= args.num_rows || token >= args.num_tokens) continue;
    const float* const partial = args.partials + static_cast<int64_t>(token) * args.num_rows + row;
    float total = partial[0];
#pragma unroll 4
    for (int s = 1; s < args.num_splits; ++s) total += partial[s * plane];
    StoreOutput(args, token, row, total);
  }
}

constexpr int kFloatThreads = 64;
constexpr int kFloatTokens = 4;

// Block (x, y): rows [x * kFloatTokens, ...) of x, rows [y * kFloatThreads, ...) of W. A warp reads whole lines of W, spread over
// four turns.
__global__ void __launch_bounds__(kFloatThreads) LinearFloat32Kernel(LinearArgs args) {
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kFloatThreads + threadIdx.x;
  if (row >= args.w.rows) return;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kFloatTokens;
  const int64_t num_tokens = args.x.rows - first_token;
  const float* const w = static_cast<const float*>(args.w.data) + row * args.w.cols;
  const float* const x = static_cast<const float*>(args.x.data) + first_token * args.x.row_stride;
  float sums[kFloatTokens] = {};
  for (int64_t col = 0; col < args.w.cols; col += 4) {
    const float4 weights = *reinterpret_cast<const float4*>(w + col);
#pragma unroll
    for (int i = 0; i < kFloatTokens; ++i) {
      if (i >= num_tokens) continue;
      const float4 values = *reinterpret_cast<const float4*>(x + i * args.x.row_stride + col);
      sums[i] = fmaf(weights.x, values.x, sums[i]);
      sums[i] = fmaf(weights.y, values.y, sums[i]);
      sums[i] = fmaf(weights.z, values.z, sums[i]);
      sums[i] = fmaf(weights.w, values.w, sums[i]);
    }
  }
  float* const y = static_cast<float*>(args.y.data) + first_token * args.y.row_stride + row;
#pragma unroll
  for (int i = 0; i < kFloatTokens; ++i) {
    if (i < num_tokens) y[i * args.y.row_stride] = sums[i];
  }
}

template <typename Tile>
void LaunchTile(const TileArgs& args, Stream& stream) {
  const unsigned token_tiles = static_cast<unsigned>((args.num_tokens + Tile::kTokens - 1) / Tile::kTokens);
  const unsigned row_tiles = static_cast<unsigned>((args.num_rows + Tile::kRows - 1) / Tile::kRows);
  const unsigned splits = Tile::kSequential ? 1u : static_cast<unsigned>(args.num_splits);
  BEBOP_CUDA_TRY(stream, gpu::Launch(LinearBf16Kernel<Tile>, dim3(token_tiles, row_tiles * splits), dim3(Tile::kThreads),
                                     Tile::kSharedBytes, stream.handle(), args));
}

}  // namespace

void LinearBf16(const LinearArgs& args, int32_t* counters, Stream& stream) {
  const Splits splits = SplitsOf(args.w.rows, args.w.cols);
  TileArgs tile;
  tile.x = static_cast<const BFloat16*>(args.x.data);
  tile.w = static_cast<const BFloat16*>(args.w.data);
  tile.y = args.y.data;
  tile.y_dtype = args.y.dtype;
  tile.x_stride = args.x.row_stride;
  tile.y_stride = args.y.row_stride;
  tile.num_tokens = static_cast<int32_t>(args.x.rows);
  tile.num_rows = static_cast<int32_t>(args.w.rows);
  tile.num_cols = static_cast<int32_t>(args.w.cols);
  tile.num_splits = static_cast<int32_t>(splits.count);
  tile.split_cols = static_cast<int32_t>(splits.cols);
  tile.partials = static_cast<float*>(stream.workspace());
  tile.counters = counters;
  BEBOP_CHECK(args.x.rows > kMaxStreamRows || splits.count == 1 ||
              splits.count * args.x.rows * args.w.rows * int64_t{sizeof(float)} <= stream.workspace_bytes());
  if (args.x.rows <= Tile8::kTokens) {
    LaunchTile<Tile8>(tile, stream);
  } else if (args.x.rows <= Tile16::kTokens) {
    LaunchTile<Tile16>(tile, stream);
  } else if (args.x.rows <= Tile32::kTokens) {
    LaunchTile<Tile32>(tile, stream);
  } else {
    LaunchTile<Tile64>(tile, stream);
  }
}

void LinearFloat32(const LinearArgs& args, Stream& stream) {
  const unsigned token_blocks = static_cast<unsigned>((args.x.rows + kFloatTokens - 1) / kFloatTokens);
  const unsigned row_blocks = static_cast<unsigned>((args.w.rows + kFloatThreads - 1) / kFloatThreads);
  BEBOP_CUDA_TRY(stream,
                 gpu::Launch(LinearFloat32Kernel, dim3(token_blocks, row_blocks), dim3(kFloatThreads), 0, stream.handle(), args));
}

}  // namespace bebop::cuda
