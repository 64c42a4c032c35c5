// SPDX-License-Identifier: Apache-2.0
// Gated delta rule, chunked form for prompts (num_prefill_rows) in bf16, after Yang, Kautz, Hatamizadeh, "Gated Delta Networks"
// (2024), section 3.3. With G_i = g_1 + .. + g_i inside a chunk of at most 64 rows, S the state before it, k̂ and q̂ normalised:
//
//   (I + A) Δ = diag(β) (V - diag(e^G) K̂ S),   A_ij = β_i e^(G_i - G_j) (k̂_i · k̂_j) for j < i, else 0
//   O = diag(e^G) Q̂ S + P Δ,                   P_ij = e^(G_i - G_j) (q̂_i · k̂_j) for j <= i, else 0
//   S ← e^(G_n) S + K̂ᵀ diag(e^(G_n - G)) Δ
//
// Products run on the tensor cores with float32 sums. Raw k and q are bf16 and thus exact; their norms are applied to the sums.
// S, Δ and P are float32: as factors each is split into two bf16 numbers (16 bits of the fraction), which costs 9.5 instead of 6
// million multiply-adds a chunk and head (3 % of what a row of 4B takes) and keeps the chunked form as close to the step form as
// float32 sums are to each other. The triangular system is solved in float32: the four 16x16 diagonal blocks are inverted, then
// substitution by blocks. G is a double, as differences of large sums would lose the small decays between neighbours.
//
// A block of 8 warps owns 32 columns of one head of one sequence and walks over its chunks; S stays in its registers (16 rows of
// dk a warp) and enters shared memory as its two bf16 parts. Warps 0..3 take the k rows of the chunk, warps 4..7 the q rows. One
// prompt of the 4B model gives 128 blocks; two blocks fit a multiprocessor (112 KB of shared memory each), so one loads while the
// other computes.
//
// Chunks are cut at absolute multiples of 64, so that the cut of a prompt into passes at such multiples changes no bit
// (ChunkRangeOf). A NaN in a row makes NaN of its whole chunk (the step form spares earlier rows); sequences do not touch each
// other.

#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/common/gpu.h"
#include "kernels/common/gpu_vector.h"
#include "kernels/delta_rule/delta_rule_cuda.h"

namespace bebop::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = kChunkRows;
constexpr int kDim = kChunkHeadDim;
constexpr int kColumns = 32;  // of v and S that a block works on
constexpr int kTile = 16;     // rows of a tensor-core product, and of a diagonal block of the triangular system
constexpr int kKeySteps = kDim / kTile;
constexpr int kRowTiles = kRows / kTile;
constexpr int kColumnTiles = kColumns / 8;

// Row strides in elements: 16 bytes more than the row, so that eight rows of a matrix load lie in different banks.
constexpr int kKeyStride = kDim + 8;
constexpr int kColumnStride = kColumns + 8;
constexpr int kSystemStride = kRows + 4;
constexpr int kSolutionStride = kColumns + 4;
constexpr int kInverseStride = kTile + 4;

struct ChunkShared {
  double log_decay[kRows];  // G
  Bf16Bits k[kRows * kKeyStride];
  Bf16Bits q[kRows * kKeyStride];
  Bf16Bits v[kRows * kColumnStride];
  Bf16Bits state[2][kDim * kColumnStride];           // S in two parts
  Bf16Bits delta[2][kRows * kColumnStride];          // Δ with k's norm, for the outputs
  Bf16Bits decayed[2][kRows * kColumnStride];        // the same times e^(G_n - G), for the state
  float system[kRows * kSystemStride];               // A
  float solution[kRows * kSolutionStride];           // the right-hand side, then Δ
  float inverse[kRowTiles][kTile * kInverseStride];  // of the diagonal blocks of I + A
  float beta[kRows];
  float decay[kRows];    // e^G
  float k_scale[kRows];  // 1 / |k|
  float q_scale[kRows];  // 1 / (|q| √dk)
};
static_assert(sizeof(ChunkShared) <= 113 * 1024, "two blocks on a multiprocessor");

// x = high + low up to 2^-17 |x|, once low is rounded to bf16.
struct Split {
  float high;
  float low;
};
__device__ inline Split SplitOf(float x) {
  const float high = gpu::LowBf16(gpu::PackBf16(x, 0.0f));
  return {high, __fsub_rn(x, high)};
}

// Fragments of 16x16 (a) and 16x8 (b, two at a time) matrices in shared memory, by where their element (0, 0) lies.
__device__ inline void LoadA(uint32_t (&a)[4], const Bf16Bits* from, int stride, int lane) {
  gpu::LdMatrixX4(a, from + (lane % 16) * stride + lane / 16 * 8);
}
// The same of the transposed matrix: `from` has columns of a as rows.
__device__ inline void LoadATransposed(uint32_t (&a)[4], const Bf16Bits* from, int stride, int lane) {
  gpu::LdMatrixX4Trans(a, from + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
}
// b[0], b[1]: 16 rows of columns 0..7; b[2], b[3]: of columns 8..15. The matrix is stored by rows.
__device__ inline void LoadB(uint32_t (&b)[4], const Bf16Bits* from, int stride, int lane) {
  gpu::LdMatrixX4Trans(b, from + (lane % 16) * stride + lane / 16 * 8);
}
// The same of a matrix stored by columns.
__device__ inline void LoadBTransposed(uint32_t (&b)[4], const Bf16Bits* from, int stride, int lane) {
  gpu::LdMatrixX4(b, from + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
}
// d[0] += a b (columns 0..7), d[1] += a b (columns 8..15).
__device__ inline void MultiplyPair(float (&low)[4], float (&high)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
  gpu::MmaBf16(low, a, first);
  gpu::MmaBf16(high, a, second);
}

class ChunkBlock {
 public:
  __device__ ChunkBlock(const DeltaRuleArgs& args, const SequenceRows& sequence, ChunkShared* shared)
      : args_(args),
        sequence_(sequence),
        shared_(*shared),
        head_(static_cast<int>(blockIdx.x) / (kDim / kColumns)),
        first_column_(static_cast<int>(blockIdx.x) % (kDim / kColumns) * kColumns),
        key_head_(head_ / (args.state.num_value_heads / args.state.num_key_heads)),
        thread_(static_cast<int>(threadIdx.x)),
        lane_(thread_ % kWarp),
        warp_(thread_ / kWarp) {}

  __device__ void Execute() {
    const ChunkRange range = ChunkRangeOf(sequence_);
    LoadState(sequence_.num_replay_rows + range.begin > 0 ? sequence_.state_dst : sequence_.state_src);
    int count = kRows - (sequence_.first_position + range.begin) % kRows;  // up to the next multiple
    const int end = sequence_.first_row + range.end;
    for (int row = sequence_.first_row + range.begin; row < end; row += count, count = kRows) {
      if (count > end - row) count = end - row;
      SplitState();
      Fetch(row, count);
      gpu::CpAsyncWait<0>();
      __syncthreads();
      SetScalars(count);
      __syncthreads();
      float scores[2 * kRowTiles][4] = {}, read[kColumnTiles][4] = {};
      Products(scores, read);
      if (warp_ < kRowTiles) {
        StoreSystem(scores, read);
      } else {
        ScaleScores(scores, read);
      }
      __syncthreads();
      InvertDiagonal();
      __syncthreads();
      Solve();
      SplitSolution();
      __syncthreads();
      if (warp_ >= kRowTiles) StoreOutputs(scores, read, row, count);
      UpdateState();
      __syncthreads();  // before the next chunk overwrites what was read
    }
    StoreState();
  }

 private:
  // Places in an accumulator: element e of a lane is row GroupRow() + (e / 2) * 8, column PairColumn() + e % 2 of its 16x8 tile.
  __device__ int GroupRow() const { return lane_ / 4; }
  __device__ int PairColumn() const { return lane_ % 4 * 2; }

  __device__ float* StateAt(int64_t slot, int tile, int half) const {
    return MatrixOf(args_.state, slot, head_) + (warp_ * kTile + GroupRow() + half * 8) * kDim + first_column_ + tile * 8 +
           PairColumn();
  }
  __device__ void LoadState(int32_t slot) {
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 value = make_float2(0.0f, 0.0f);
        if (slot >= 0) value = *reinterpret_cast<const float2*>(StateAt(slot, tile, half));
        state_[tile][half * 2] = value.x;
        state_[tile][half * 2 + 1] = value.y;
      }
    }
  }
  __device__ void StoreState() const {
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<float2*>(StateAt(sequence_.state_dst, tile, half)) =
            make_float2(state_[tile][half * 2], state_[tile][half * 2 + 1]);
      }
    }
  }
  __device__ void SplitState() {
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Split left = SplitOf(state_[tile][half * 2]), right = SplitOf(state_[tile][half * 2 + 1]);
        const int at = (warp_ * kTile + GroupRow() + half * 8) * kColumnStride + tile * 8 + PairColumn();
        *reinterpret_cast<uint32_t*>(&shared_.state[0][at]) = gpu::PackBf16(left.high, right.high);
        *reinterpret_cast<uint32_t*>(&shared_.state[1][at]) = gpu::PackBf16(left.low, right.low);
      }
    }
  }

  // Rows [row, row + count) of k, q and v, zeros below them, and their gates.
  __device__ void Fetch(int64_t row, int count) {
    constexpr int kValues = 8;  // of 16 bytes
    constexpr int kPieces = kDim / kValues;
    const int64_t key_width = static_cast<int64_t>(args_.state.num_key_heads) * kDim;
#pragma unroll 1  // the copies do not wait for each other anyway, and registers are scarce
    for (int piece = thread_; piece < kRows * kPieces; piece += kThreads) {
      const int i = piece / kPieces, at = piece % kPieces * kValues;
      const bool valid = i < count;
      const Bf16Bits* const from = gpu::Row<const Bf16Bits>(args_.qkv, row + (valid ? i : 0)) + key_head_ * kDim + at;
      gpu::CpAsync16(&shared_.q[i * kKeyStride + at], from, valid);
      gpu::CpAsync16(&shared_.k[i * kKeyStride + at], from + key_width, valid);
    }
    constexpr int kColumnPieces = kColumns / kValues;
    static_assert(kRows * kColumnPieces == kThreads);
    const int i = thread_ / kColumnPieces, at = thread_ % kColumnPieces * kValues;
    const bool valid = i < count;
    const Bf16Bits* const from = gpu::Row<const Bf16Bits>(args_.qkv, row + (valid ? i : 0)) + 2 * key_width +
                                 static_cast<int64_t>(head_) * kDim + first_column_ + at;
    gpu::CpAsync16(&shared_.v[i * kColumnStride + at], from, valid);
    gpu::CpAsyncCommit();
    if (thread_ < kRows) {
      // Rows below the last one have beta 0 and keep G.
      const Gate gate = thread_ < count ? GateOf<Bf16Bits>(args_, row + thread_, head_) : Gate{0.0f, 0.0f};
      shared_.beta[thread_] = gate.beta;
      shared_.log_decay[thread_] = gate.log_decay;
    }
  }

  // G by the first warp, two rows a lane; the norms by all, 8 rows a warp.
  __device__ void SetScalars(int count) {
    if (warp_ == 0) {
      const double first = shared_.log_decay[2 * lane_], both = first + shared_.log_decay[2 * lane_ + 1];
      double sum = both;  // of the lanes up to this one
#pragma unroll
      for (int distance = 1; distance < kWarp; distance *= 2) {
        const double below = __shfl_up_sync(gpu::kAllLanes, sum, distance);
        if (lane_ >= distance) sum += below;
      }
      const double before = sum - both + first;
      shared_.log_decay[2 * lane_] = before;
      shared_.log_decay[2 * lane_ + 1] = sum;
      shared_.decay[2 * lane_] = expf(static_cast<float>(before));
      shared_.decay[2 * lane_ + 1] = expf(static_cast<float>(sum));
    }
    for (int i = warp_; i < count; i += kWarps) {
      float kk = 0.0f, qq = 0.0f;
#pragma unroll
      for (int at = 2 * lane_; at < kDim; at += 2 * kWarp) {
        const uint32_t k = *reinterpret_cast<const uint32_t*>(&shared_.k[i * kKeyStride + at]);
        const uint32_t q = *reinterpret_cast<const uint32_t*>(&shared_.q[i * kKeyStride + at]);
        kk = fmaf(gpu::HighBf16(k), gpu::HighBf16(k), fmaf(gpu::LowBf16(k), gpu::LowBf16(k), kk));
        qq = fmaf(gpu::HighBf16(q), gpu::HighBf16(q), fmaf(gpu::LowBf16(q), gpu::LowBf16(q), qq));
      }
      kk = gpu::GroupSum<kWarp>(kk);
      qq = gpu::GroupSum<kWarp>(qq);
      if (lane_ == 0) {
        shared_.k_scale[i] = rsqrtf(kk + 1e-6f);
        shared_.q_scale[i] = rsqrtf((qq + 1e-6f) * kDim);
      }
    }
    if (thread_ >= count && thread_ < kRows) shared_.k_scale[thread_] = shared_.q_scale[thread_] = 0.0f;
  }

  // For the warp's 16 rows X of k or q: scores = X Kᵀ (no further than the diagonal), read = X S.
  __device__ void Products(float (&scores)[2 * kRowTiles][4], float (&read)[kColumnTiles][4]) const {
    const int tile = warp_ % kRowTiles;
    const Bf16Bits* const rows = (warp_ < kRowTiles ? shared_.k : shared_.q) + tile * kTile * kKeyStride;
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
      uint32_t a[4], b[4];
      LoadA(a, rows + step * kTile, kKeyStride, lane_);
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        if (j > tile) break;
        LoadBTransposed(b, &shared_.k[j * kTile * kKeyStride + step * kTile], kKeyStride, lane_);
        MultiplyPair(scores[2 * j], scores[2 * j + 1], a, b);
      }
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int j = 0; j < kColumnTiles; j += 2) {
          LoadB(b, &shared_.state[part][step * kTile * kColumnStride + j * 8], kColumnStride, lane_);
          MultiplyPair(read[j], read[j + 1], a, b);
        }
      }
    }
  }

  // e^(G_i - G_j), i >= j.
  __device__ float DecayBetween(int i, int j) const {
    return expf(static_cast<float>(shared_.log_decay[i] - shared_.log_decay[j]));
  }

  // A and the right-hand side of the warp's 16 rows.
  __device__ void StoreSystem(const float (&scores)[2 * kRowTiles][4], const float (&read)[kColumnTiles][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = warp_ * kTile + GroupRow() + half * 8;
      const float scale = shared_.beta[i] * shared_.k_scale[i], state_scale = shared_.decay[i] * shared_.k_scale[i];
#pragma unroll
      for (int tile = 0; tile < 2 * kRowTiles; ++tile) {
        if (tile > 2 * warp_ + 1) break;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = tile * 8 + PairColumn() + e;
          shared_.system[i * kSystemStride + j] =
              j < i ? scale * shared_.k_scale[j] * DecayBetween(i, j) * scores[tile][half * 2 + e] : 0.0f;
        }
      }
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = tile * 8 + PairColumn() + e;
          const float v = gpu::ToValue(shared_.v[i * kColumnStride + column]);
          shared_.solution[i * kSolutionStride + column] = shared_.beta[i] * fmaf(-state_scale, read[tile][half * 2 + e], v);
        }
      }
    }
  }

  // P (without k's norms, which are in Δ) and the part of O that comes from S, in place.
  __device__ void ScaleScores(float (&scores)[2 * kRowTiles][4], float (&read)[kColumnTiles][4]) const {
    const int row_tile = warp_ - kRowTiles;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = row_tile * kTile + GroupRow() + half * 8;
      const float scale = shared_.q_scale[i];
#pragma unroll
      for (int tile = 0; tile < 2 * kRowTiles; ++tile) {
        if (tile > 2 * row_tile + 1) break;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = tile * 8 + PairColumn() + e;
          scores[tile][half * 2 + e] = j <= i ? scale * DecayBetween(i, j) * scores[tile][half * 2 + e] : 0.0f;
        }
      }
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile) {
        read[tile][half * 2] *= scale * shared_.decay[i];
        read[tile][half * 2 + 1] *= scale * shared_.decay[i];
      }
    }
  }

  // A column of the inverse of a 16x16 diagonal block of I + A by each of 64 threads.
  __device__ void InvertDiagonal() {
    if (thread_ >= kRows) return;
    const int block = thread_ / kTile, column = thread_ % kTile;
    const float* const system = &shared_.system[block * kTile * kSystemStride + block * kTile];
    float x[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      float sum = i == column ? 1.0f : 0.0f;
#pragma unroll
      for (int j = 0; j < i; ++j) sum = fmaf(-system[i * kSystemStride + j], x[j], sum);
      x[i] = sum;
      shared_.inverse[block][i * kInverseStride + column] = sum;
    }
  }

  // Solves (I + A) Δ = R by blocks of 16 rows. A warp has four columns to itself, so it needs no other warp; a lane has rows r
  // and r + 8 of the block.
  __device__ void Solve() {
    const int row = lane_ / 4, column = warp_ * 4 + lane_ % 4;
    float* const solution = shared_.solution + column;
#pragma unroll 1
    for (int block = 0; block < kRowTiles; ++block) {
      float rest[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = block * kTile + row + half * 8;
        rest[half] = solution[i * kSolutionStride];
      }
      for (int j = 0; j < block * kTile; j += 4) {
        const float x[4] = {solution[j * kSolutionStride], solution[(j + 1) * kSolutionStride],
                            solution[(j + 2) * kSolutionStride], solution[(j + 3) * kSolutionStride]};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4 a =
              *reinterpret_cast<const float4*>(&shared_.system[(block * kTile + row + half * 8) * kSystemStride + j]);
          rest[half] = fmaf(-a.w, x[3], fmaf(-a.z, x[2], fmaf(-a.y, x[1], fmaf(-a.x, x[0], rest[half]))));
        }
      }
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; ++half) solution[(block * kTile + row + half * 8) * kSolutionStride] = rest[half];
      __syncwarp();
      float sum[2] = {0.0f, 0.0f};
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        const float x = solution[(block * kTile + j) * kSolutionStride];
#pragma unroll
        for (int half = 0; half < 2; ++half)
          sum[half] = fmaf(shared_.inverse[block][(row + half * 8) * kInverseStride + j], x, sum[half]);
      }
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; ++half) solution[(block * kTile + row + half * 8) * kSolutionStride] = sum[half];
      __syncwarp();
    }
  }

  // Δ as factors of the two last products. The warp's own columns.
  __device__ void SplitSolution() {
    const int column = warp_ * 4 + lane_ % 4;
#pragma unroll
    for (int i = lane_ / 4; i < kRows; i += 8) {
      const float delta = shared_.solution[i * kSolutionStride + column] * shared_.k_scale[i];
      const Split plain = SplitOf(delta), decayed = SplitOf(delta * DecayBetween(kRows - 1, i));
      const int at = i * kColumnStride + column;
      gpu::Store(plain.high, &shared_.delta[0][at]);
      gpu::Store(plain.low, &shared_.delta[1][at]);
      gpu::Store(decayed.high, &shared_.decayed[0][at]);
      gpu::Store(decayed.low, &shared_.decayed[1][at]);
    }
  }

  // O = read + P Δ for the warp's 16 rows. low · low is left out (2^-16 of the product).
  __device__ void StoreOutputs(const float (&scores)[2 * kRowTiles][4], float (&read)[kColumnTiles][4], int64_t row,
                               int count) const {
    const int row_tile = warp_ - kRowTiles;
#pragma unroll
    for (int step = 0; step < kRowTiles; ++step) {
      if (step > row_tile) break;
      uint32_t high[4], low[4];  // of P: accumulators of two 16x8 tiles have the places of a 16x16 factor
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const Split left = SplitOf(scores[2 * step + r / 2][r % 2 * 2]), right = SplitOf(scores[2 * step + r / 2][r % 2 * 2 + 1]);
        high[r] = gpu::PackBf16(left.high, right.high);
        low[r] = gpu::PackBf16(left.low, right.low);
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles; j += 2) {
        uint32_t b[4];
        LoadB(b, &shared_.delta[0][step * kTile * kColumnStride + j * 8], kColumnStride, lane_);
        MultiplyPair(read[j], read[j + 1], high, b);
        MultiplyPair(read[j], read[j + 1], low, b);
        LoadB(b, &shared_.delta[1][step * kTile * kColumnStride + j * 8], kColumnStride, lane_);
        MultiplyPair(read[j], read[j + 1], high, b);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = row_tile * kTile + GroupRow() + half * 8;
      if (i >= count) continue;
      Bf16Bits* const out = static_cast<Bf16Bits*>(args_.out.data) + (row + i) * args_.out.row_stride +
                            static_cast<int64_t>(head_) * kDim + first_column_ + PairColumn();
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile) {
        *reinterpret_cast<uint32_t*>(out + tile * 8) = gpu::PackBf16(read[tile][half * 2], read[tile][half * 2 + 1]);
      }
    }
  }

  // The warp's 16 rows of S.
  __device__ void UpdateState() {
    const float decay = shared_.decay[kRows - 1];
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) state_[tile][e] *= decay;
    }
#pragma unroll
    for (int step = 0; step < kRowTiles; ++step) {
      uint32_t a[4], b[4];
      LoadATransposed(a, &shared_.k[step * kTile * kKeyStride + warp_ * kTile], kKeyStride, lane_);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int j = 0; j < kColumnTiles; j += 2) {
          LoadB(b, &shared_.decayed[part][step * kTile * kColumnStride + j * 8], kColumnStride, lane_);
          MultiplyPair(state_[j], state_[j + 1], a, b);
        }
      }
    }
  }

  const DeltaRuleArgs& args_;
  const SequenceRows& sequence_;
  ChunkShared& shared_;
  const int head_, first_column_, key_head_, thread_, lane_, warp_;
  float state_[kColumnTiles][4];  // rows 16 warp .. 16 warp + 15 of S as accumulators
};

// Block (head and columns, sequence).
__global__ void __launch_bounds__(kThreads, 2) ChunkKernel(const DeltaRuleArgs args) {
  BEBOP_DYNAMIC_SHARED(ChunkShared, shared);
  const SequenceRows sequence = args.batch.sequences[blockIdx.y];
  const ChunkRange range = ChunkRangeOf(sequence);
  if (sequence.num_rows == 0 || range.begin == range.end) return;
  ChunkBlock(args, sequence, shared).Execute();
}

}  // namespace

void DeltaRuleChunks(const DeltaRuleArgs& args, Stream& stream) {
  const dim3 grid(static_cast<unsigned>(args.state.num_value_heads * (kDim / kColumns)),
                  static_cast<unsigned>(args.batch.num_sequences));
  BEBOP_CUDA_TRY(stream, gpu::Launch(ChunkKernel, grid, dim3(kThreads), sizeof(ChunkShared), stream.handle(), args));
}

}  // namespace bebop::cuda
