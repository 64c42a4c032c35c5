// SPDX-License-Identifier: Apache-2.0
// Gated delta rule, step form with lazy commit: replays the accepted rows of the last window, runs the known rows, stores the
// state once, and goes on through the draft rows without storing.
//
// Bound by the state's bytes. A head of 128 x 128 float32 is read once and written once (128 KB), whatever the rows: 4B at 128
// sequences moves 537 MB a layer (estimated: 125 µs). Arithmetic is 3 instructions per element and replayed row and 4 per row
// with an output (4 rows with 2 replayed, estimated: 0.4 of that time on an H200's float32 units, beside it), so it hides as long
// as other blocks load meanwhile.
//
// A block works on 16 to 64 columns of one head of one sequence. A warp holds 16 columns in registers: lane = 4 g + c holds
// columns 4c..4c+3 of rows 32 j + 4 g + i (i < 4), so that a warp's load of 16 bytes a lane covers whole sectors, k and q come
// from shared memory four rows at a time, and 64 registers hold the state. All 16 loads of a lane are in flight before anything
// else is done. Eight lanes share a column; Sᵀk and Sᵀq are exchanged by halves (7 shuffles for the 8 sums of a lane, not 24).
// The order of every sum follows from dk alone: not from the slice, the batch or the kind of row (replayed, known, draft), and
// roundings are explicit, so that the states committed from a window are bit for bit those of token-by-token decoding.
//
// o = (e^g S + k δᵀ)ᵀ q = e^g (Sᵀq) + δ (k·q): both sums of a row need one pass over S before the update, and the norms of q and
// k go with the sums.
//
// Races. All heads of a group and all slices read a slot's window while they replay it, and with src == dst the draft rows of
// this pass go to the same memory. No block can know when the others are done, so nobody writes a window here: a second small
// kernel does it after this one (12 KB a draft row of the 4B model, a launch of its own). k and v come from qkv; g and beta go
// through the stream's workspace, so that a replay sees the very bits that the draft row was run with.
//
// Long known runs (prompts) in bf16: three launches, the step form for the rows before the chunks, the chunked form
// (delta_rule_chunks_cuda.cu), and the step form for the rows behind them. Each returns at once for sequences that do not need
// it.

#include <algorithm>
#include <type_traits>

#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/common/gpu.h"
#include "kernels/common/gpu_vector.h"
#include "kernels/delta_rule/delta_rule_cuda.h"

namespace bebop::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kLaneColumns = 4;
constexpr int kWarpColumns = 16;
constexpr int kMaxWarps = 4;
constexpr int kMaxThreads = kMaxWarps * kWarp;
constexpr int kMaxSliceColumns = kMaxWarps * kWarpColumns;
constexpr int kMaxHeadDim = 256;
constexpr int kWindowThreads = 256;

// Which rows a launch runs.
enum class Phase : int32_t {
  kBeforeChunks,  // up to the chunks; all rows of the sequences without
  kAfterChunks,   // behind the chunks
};

struct StepArgs {
  DeltaRuleArgs call;
  float* gates;           // [num_sequences, window, Hv, 2]: g and beta of the draft rows, for the window kernel
  int32_t slice_columns;  // of a block: kWarpColumns per warp
  Phase phase;
  bool has_chunks;  // ChunkRangeOf of each sequence is run elsewhere
};

// The tokens of a sequence (replayed rows, then its own rows) that a launch runs, [begin, end). S goes from slot `source` (zeros
// if < 0) to slot state_dst before token `commit` (after the last one if that is `end`; not at all if negative).
struct Run {
  int32_t begin;
  int32_t end;
  int32_t commit;
  int32_t source;
};

__device__ Run RunOf(const SequenceRows& sequence, Phase phase, bool has_chunks) {
  const int32_t committed = sequence.num_replay_rows + sequence.num_known_rows,
                all = sequence.num_replay_rows + sequence.num_rows;
  const Run nothing = {0, 0, -1, -1};
  if (sequence.num_rows == 0) return nothing;  // padding
  const ChunkRange chunks = has_chunks ? ChunkRangeOf(sequence) : ChunkRange{0, 0};
  if (chunks.begin == chunks.end) return phase == Phase::kAfterChunks ? nothing : Run{0, all, committed, sequence.state_src};
  const int32_t before = sequence.num_replay_rows + chunks.begin, behind = sequence.num_replay_rows + chunks.end;
  if (phase == Phase::kBeforeChunks) return before == 0 ? nothing : Run{0, before, before, sequence.state_src};
  return {behind, all, behind < committed ? committed : -1, sequence.state_dst};  // the chunks have stored their state
}

// What a row means to a block, whatever the column.
template <typename T>
struct TokenScalars {
  T* out;       // of the slice's first column; null for a replayed row
  float decay;  // e^g
  float beta;
  float k_scale;  // 1 / |k|
  float q_scale;  // 1 / (|q| √dk)
  float kq;       // Σ k q, raw
};

// Four neighbouring values of shared memory as float.
__device__ inline float4 Load4(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ inline float4 Load4(const Bf16Bits* from) {
  const uint2 pairs = *reinterpret_cast<const uint2*>(from);
  return make_float4(gpu::LowBf16(pairs.x), gpu::HighBf16(pairs.x), gpu::LowBf16(pairs.y), gpu::HighBf16(pairs.y));
}

__device__ inline float Dot4(const float4& a, const float4& b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// kExact: dk = dv = kDim, and all rows are aligned to 16 bytes; else dk and dv up to kDim and any stride, slower.
template <typename T, int kDim, bool kExact>
class StepBlock {
 public:
  static constexpr int kTile = kExact ? 16 : 8;  // tokens in shared memory at a time
  static constexpr int kRuns = kDim / kWarp;     // of 4 rows that a lane holds

  // `raw_` as it comes from memory, then converted: every lane of every warp reads all of k and q for each token.
  struct Shared {
    T raw_k[kTile][kDim];
    T raw_q[kTile][kDim];
    T raw_v[kTile][kMaxSliceColumns];
    float k[kTile][kDim];
    float q[kTile][kDim];
    TokenScalars<T> scalars[kTile];
  };

  __device__ StepBlock(const StepArgs& step, const SequenceRows& sequence, Shared* shared)
      : step_(step),
        sequence_(sequence),
        shared_(*shared),
        key_dim_(kExact ? kDim : step.call.state.key_head_dim),
        value_dim_(kExact ? kDim : step.call.state.value_head_dim),
        lane_(static_cast<int>(threadIdx.x) % kWarp),
        warp_(static_cast<int>(threadIdx.x) / kWarp),
        head_(static_cast<int>(blockIdx.y)),
        key_head_(head_ / (step.call.state.num_value_heads / step.call.state.num_key_heads)),
        slice_begin_(static_cast<int>(blockIdx.x) * step.slice_columns),
        slice_columns_(min(step.slice_columns, value_dim_ - slice_begin_)),
        active_(warp_ * kWarpColumns < slice_columns_) {}

  __device__ void Execute(const Run& run) {
    if (active_) LoadState(run.source);
    for (int first = run.begin; first < run.end; first += kTile) {
      const int count = min(kTile, run.end - first);
      __syncthreads();  // the tile's readers of the last turn
      Fetch(first, count);
      __syncthreads();
      Convert(count);
      __syncthreads();
      if (!active_) continue;
      const bool commits = run.commit >= first && run.commit < first + count;
      int t = 0;
#pragma unroll 1
      for (int part = commits ? 0 : 1; part < 2; ++part) {  // tokens before the commit, and the others
        const int stop = part == 0 ? run.commit - first : count;
#pragma unroll 1
        for (; t < stop; ++t) Step(t);
        if (part == 0) StoreState();
      }
    }
    if (active_ && run.commit == run.end) StoreState();
  }

 private:
  __device__ int FirstRow() const { return lane_ / kLaneColumns * 4; }  // plus 32 j + i
  __device__ int FirstColumn() const {                                  // of the head
    return slice_begin_ + warp_ * kWarpColumns + lane_ % kLaneColumns * kLaneColumns;
  }
  // Where row FirstRow() of this lane's columns lies. Other rows follow at offsets that are constants in the exact instance (one
  // address instead of sixteen).
  __device__ float* LaneState(int32_t slot) const {
    return MatrixOf(step_.call.state, slot, head_) + static_cast<int64_t>(FirstRow()) * Stride() + FirstColumn();
  }
  __device__ int Stride() const { return kExact ? kDim : value_dim_; }

  __device__ void LoadState(int32_t slot) {
    const float* const from = slot < 0 ? nullptr : LaneState(slot);
    const int columns = value_dim_ - FirstColumn();
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const at = from + (j * kWarp + i) * Stride();
        float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if constexpr (kExact) {
          if (from != nullptr) value = *reinterpret_cast<const float4*>(at);
        } else if (from != nullptr && j * kWarp + FirstRow() + i < key_dim_) {
          if (columns > 0) value.x = at[0];
          if (columns > 1) value.y = at[1];
          if (columns > 2) value.z = at[2];
          if (columns > 3) value.w = at[3];
        }
        s_[j][i][0] = value.x, s_[j][i][1] = value.y, s_[j][i][2] = value.z, s_[j][i][3] = value.w;
      }
    }
  }

  __device__ void StoreState() const {
    float* const to = LaneState(sequence_.state_dst);
    const int columns = value_dim_ - FirstColumn();
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float* const at = to + (j * kWarp + i) * Stride();
        if constexpr (kExact) {
          gpu::StoreStream16(at, make_uint4(__float_as_uint(s_[j][i][0]), __float_as_uint(s_[j][i][1]),
                                            __float_as_uint(s_[j][i][2]), __float_as_uint(s_[j][i][3])));
        } else if (j * kWarp + FirstRow() + i < key_dim_) {
#pragma unroll
          for (int c = 0; c < kLaneColumns; ++c) {
            if (c < columns) at[c] = s_[j][i][c];
          }
        }
      }
    }
  }

  // Where k, q and v (the slice's part) of a token lie; a replayed token has no q.
  struct Source {
    const T* k;
    const T* q;
    const T* v;
  };
  __device__ Source SourceOf(int token) const {
    const LinearStateView& state = step_.call.state;
    const int64_t key_width = static_cast<int64_t>(state.num_key_heads) * key_dim_;
    const int64_t key = static_cast<int64_t>(key_head_) * key_dim_,
                  value = static_cast<int64_t>(head_) * value_dim_ + slice_begin_;
    if (token < sequence_.num_replay_rows) {
      const int64_t kept = static_cast<int64_t>(sequence_.state_src) * state.window + token;
      return {static_cast<const T*>(state.window_k) + kept * key_width + key, nullptr,
              static_cast<const T*>(state.window_v) + kept * state.num_value_heads * value_dim_ + value};
    }
    const T* const row = gpu::Row<const T>(step_.call.qkv, RowIndex(token));
    return {row + key_width + key, row + key, row + 2 * key_width + value};
  }
  __device__ int64_t RowIndex(int token) const { return sequence_.first_row + token - sequence_.num_replay_rows; }

  // Rows of tokens [first, first + count) into raw_*, and their gates.
  __device__ void Fetch(int first, int count) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    for (int t = warp_; t < count; t += threads / kWarp) {
      const Source source = SourceOf(first + t);
      if constexpr (kExact) {
        constexpr int kValues = 16 / sizeof(T);  // of a piece
        if (lane_ * kValues < kDim) {
          const int at = lane_ * kValues;
          gpu::CpAsync16(&shared_.raw_k[t][at], source.k + at);
          gpu::CpAsync16(&shared_.raw_q[t][at], (source.q != nullptr ? source.q : source.k) + at, source.q != nullptr);
          if (at < slice_columns_) gpu::CpAsync16(&shared_.raw_v[t][at], source.v + at);
        }
      } else {
        for (int i = lane_; i < kDim; i += kWarp) {
          shared_.raw_k[t][i] = i < key_dim_ ? source.k[i] : T{0};
          shared_.raw_q[t][i] = i < key_dim_ && source.q != nullptr ? source.q[i] : T{0};
        }
        for (int i = lane_; i < kMaxSliceColumns; i += kWarp) shared_.raw_v[t][i] = i < slice_columns_ ? source.v[i] : T{0};
      }
    }
    if constexpr (kExact) gpu::CpAsyncCommit();
    if (thread < count) FetchScalars(first + thread, &shared_.scalars[thread]);
    if constexpr (kExact) gpu::CpAsyncWait<0>();
  }

  __device__ void FetchScalars(int token, TokenScalars<T>* scalars) const {
    const LinearStateView& state = step_.call.state;
    Gate gate;
    scalars->out = nullptr;
    if (token < sequence_.num_replay_rows) {
      const float* const kept =
          state.window_gate +
          ((static_cast<int64_t>(sequence_.state_src) * state.window + token) * state.num_value_heads + head_) * 2;
      gate = {kept[0], kept[1]};
    } else {
      gate = GateOf<T>(step_.call, RowIndex(token), head_);
      scalars->out = static_cast<T*>(step_.call.out.data) + RowIndex(token) * step_.call.out.row_stride +
                     static_cast<int64_t>(head_) * value_dim_ + slice_begin_;
      const int draft = token - sequence_.num_replay_rows - sequence_.num_known_rows;
      if (draft >= 0 && slice_begin_ == 0) {
        float* const kept =
            step_.gates + ((static_cast<int64_t>(blockIdx.z) * state.window + draft) * state.num_value_heads + head_) * 2;
        kept[0] = gate.log_decay;
        kept[1] = gate.beta;
      }
    }
    scalars->decay = expf(gate.log_decay);
    scalars->beta = gate.beta;
  }

  // raw_k and raw_q to float, a warp a token, with their norms and product.
  __device__ void Convert(int count) {
    for (int t = warp_; t < count; t += static_cast<int>(blockDim.x) / kWarp) {
      float kk = 0.0f, qq = 0.0f, kq = 0.0f;
#pragma unroll
      for (int at = 4 * lane_; at < kDim; at += 4 * kWarp) {
        const float4 k = Load4(&shared_.raw_k[t][at]), q = Load4(&shared_.raw_q[t][at]);
        *reinterpret_cast<float4*>(&shared_.k[t][at]) = k;
        *reinterpret_cast<float4*>(&shared_.q[t][at]) = q;
        kk = Dot4(k, k, kk);
        qq = Dot4(q, q, qq);
        kq = Dot4(k, q, kq);
      }
      kk = gpu::GroupSum<kWarp>(kk);
      qq = gpu::GroupSum<kWarp>(qq);
      kq = gpu::GroupSum<kWarp>(kq);
      if (lane_ == 0) {
        shared_.scalars[t].k_scale = rsqrtf(__fadd_rn(kk, 1e-6f));
        shared_.scalars[t].q_scale = rsqrtf(__fmul_rn(__fadd_rn(qq, 1e-6f), static_cast<float>(key_dim_)));
        shared_.scalars[t].kq = kq;
      }
    }
  }

  // Rows of the state that a lane holds in run j are all beyond dk. Uniform.
  __device__ bool Beyond(int j) const { return !kExact && j * kWarp >= key_dim_; }

  // The token in place t of the tile.
  __device__ void Step(int t) {
    const TokenScalars<T> scalars = shared_.scalars[t];
    const bool has_output = scalars.out != nullptr;
    const float* const k = shared_.k[t] + FirstRow();
    const float* const q = shared_.q[t] + FirstRow();
    float sk[kLaneColumns] = {}, sq[kLaneColumns] = {};
    if (has_output) {
#pragma unroll
      for (int j = 0; j < kRuns; ++j) {
        if (Beyond(j)) break;
        AddProducts(Load4(k + j * kWarp), s_[j], sk);
        AddProducts(Load4(q + j * kWarp), s_[j], sq);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kRuns; ++j) {
        if (Beyond(j)) break;
        AddProducts(Load4(k + j * kWarp), s_[j], sk);
      }
    }

    // Sums over the eight lanes of a column (bits 2 to 4 of the lane). Each exchange halves the sums that a lane still has to do
    // with: after it, lanes with bit 4 have Sᵀq and the others Sᵀk, of the column that bits 3 and 2 name.
    const bool is_q = (lane_ & 16) != 0, upper = (lane_ & 8) != 0, odd = (lane_ & 4) != 0;
    float four[4], two[2];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      four[c] = __fadd_rn(is_q ? sq[c] : sk[c], __shfl_xor_sync(gpu::kAllLanes, is_q ? sk[c] : sq[c], 16));
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      two[c] = __fadd_rn(upper ? four[c + 2] : four[c], __shfl_xor_sync(gpu::kAllLanes, upper ? four[c] : four[c + 2], 8));
    }
    const float sum = __fadd_rn(odd ? two[1] : two[0], __shfl_xor_sync(gpu::kAllLanes, odd ? two[0] : two[1], 4));

    // δ of that column, with k's norm, in the lanes with Sᵀk; then in all.
    const int column = lane_ % kLaneColumns * kLaneColumns + (upper ? 2 : 0) + (odd ? 1 : 0);  // of the warp's
    const float v = gpu::ToValue(shared_.raw_v[t][warp_ * kWarpColumns + column]);
    const float read = __fmul_rn(scalars.decay, scalars.k_scale);
    float delta = __fmul_rn(__fmul_rn(scalars.beta, fmaf(-read, sum, v)), scalars.k_scale);
    delta = __shfl_sync(gpu::kAllLanes, delta, lane_ & 15);
    const int at = warp_ * kWarpColumns + column;
    if (has_output && is_q && (kExact || at < slice_columns_)) {
      gpu::Store(__fmul_rn(fmaf(delta, scalars.kq, __fmul_rn(sum, scalars.decay)), scalars.q_scale), scalars.out + at);
    }
    float deltas[kLaneColumns];
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) deltas[c] = __shfl_sync(gpu::kAllLanes, delta, 4 * c + lane_ % kLaneColumns);

#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      if (Beyond(j)) break;
      const float4 rows = Load4(k + j * kWarp);
      const float row[4] = {rows.x, rows.y, rows.z, rows.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int c = 0; c < kLaneColumns; ++c) s_[j][i][c] = fmaf(row[i], deltas[c], __fmul_rn(scalars.decay, s_[j][i][c]));
      }
    }
  }

  __device__ static void AddProducts(const float4& factors, const float (&rows)[4][kLaneColumns], float (&sums)[kLaneColumns]) {
    const float factor[4] = {factors.x, factors.y, factors.z, factors.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) sums[c] = fmaf(factor[i], rows[i][c], sums[c]);
    }
  }

  const StepArgs& step_;
  const SequenceRows& sequence_;
  Shared& shared_;
  const int key_dim_, value_dim_, lane_, warp_, head_, key_head_, slice_begin_, slice_columns_;
  const bool active_;  // the warp has columns (else it only takes part in fetching)
  float s_[kRuns][4][kLaneColumns];
};

// Block (slice, head, sequence).
template <typename T, int kDim, bool kExact>
__global__ void __launch_bounds__(kMaxThreads, kExact ? 4 : 1) StepKernel(const StepArgs step) {
  using Block = StepBlock<T, kDim, kExact>;
  alignas(16) __shared__ typename Block::Shared shared;
  const SequenceRows sequence = step.call.batch.sequences[blockIdx.z];
  const Run run = RunOf(sequence, step.phase, step.has_chunks);
  if (run.begin == run.end && run.commit < 0) return;
  Block(step, sequence, &shared).Execute(run);
}

// Draft row x of sequence y into the window of slot state_dst.
template <typename T>
__global__ void __launch_bounds__(kWindowThreads) WindowKernel(const DeltaRuleArgs args, const float* gates) {
  const SequenceRows sequence = args.batch.sequences[blockIdx.y];
  const int draft = static_cast<int>(blockIdx.x);
  if (draft >= sequence.num_rows - sequence.num_known_rows) return;
  const LinearStateView& state = args.state;
  const int thread = static_cast<int>(threadIdx.x);
  const int key_width = state.num_key_heads * state.key_head_dim, value_width = state.num_value_heads * state.value_head_dim;
  const int64_t kept = static_cast<int64_t>(sequence.state_dst) * state.window + draft;
  const T* const k = gpu::Row<const T>(args.qkv, sequence.first_row + sequence.num_known_rows + draft) + key_width;
  const T* const v = k + key_width;
  T* const window_k = static_cast<T*>(state.window_k) + kept * key_width;
  T* const window_v = static_cast<T*>(state.window_v) + kept * value_width;
  constexpr int kValues = 16 / sizeof(T);
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  if (aligned(k) && aligned(v) && aligned(window_k) && aligned(window_v) && key_width % kValues == 0 &&
      value_width % kValues == 0) {
    for (int i = thread * kValues; i < key_width; i += kWindowThreads * kValues) {
      *reinterpret_cast<uint4*>(window_k + i) = *reinterpret_cast<const uint4*>(k + i);
    }
    for (int i = thread * kValues; i < value_width; i += kWindowThreads * kValues) {
      *reinterpret_cast<uint4*>(window_v + i) = *reinterpret_cast<const uint4*>(v + i);
    }
  } else {
    for (int i = thread; i < key_width; i += kWindowThreads) window_k[i] = k[i];
    for (int i = thread; i < value_width; i += kWindowThreads) window_v[i] = v[i];
  }
  const int gate_values = state.num_value_heads * 2;
  const float* const from = gates + (static_cast<int64_t>(blockIdx.y) * state.window + draft) * gate_values;
  for (int i = thread; i < gate_values; i += kWindowThreads) state.window_gate[kept * gate_values + i] = from[i];
}

// Widest slices that still give every multiprocessor four blocks (with 64 columns: as many as fit at a time). Bits do not depend
// on it.
int32_t SliceColumns(int64_t heads, int32_t value_dim, int num_multiprocessors) {
  for (int32_t columns = kMaxSliceColumns; columns > kWarpColumns; columns /= 2) {
    if (columns - kWarpColumns >= value_dim) continue;  // a warp or more without columns
    if (heads * ((value_dim + columns - 1) / columns) >= int64_t{4} * num_multiprocessors) return columns;
  }
  return kWarpColumns;
}

template <typename T>
void LaunchAll(const DeltaRuleArgs& args, bool exact, Stream& stream) {
  const LinearStateView& state = args.state;
  const RaggedBatch& batch = args.batch;
  StepArgs step = {
      .call = args,
      .gates = static_cast<float*>(stream.workspace()),
      .slice_columns =
          SliceColumns(int64_t{batch.num_sequences} * state.num_value_heads, state.value_head_dim, stream.num_multiprocessors()),
      .phase = Phase::kBeforeChunks,
      .has_chunks = std::is_same_v<T, Bf16Bits> && exact && batch.max_sequence_rows > kMaxStepRows,
  };
  const int32_t slices = (state.value_head_dim + step.slice_columns - 1) / step.slice_columns;
  const dim3 grid(static_cast<unsigned>(slices), static_cast<unsigned>(state.num_value_heads),
                  static_cast<unsigned>(batch.num_sequences));
  const dim3 block(static_cast<unsigned>(step.slice_columns / kWarpColumns * kWarp));
  const auto launch = [&](Phase phase) {
    step.phase = phase;
    if (exact) {
      BEBOP_CUDA_TRY(stream, gpu::Launch(StepKernel<T, kChunkHeadDim, true>, grid, block, 0, stream.handle(), step));
    } else {
      BEBOP_CUDA_TRY(stream, gpu::Launch(StepKernel<T, kMaxHeadDim, false>, grid, block, 0, stream.handle(), step));
    }
  };
  launch(Phase::kBeforeChunks);
  if (step.has_chunks) {
    DeltaRuleChunks(args, stream);
    launch(Phase::kAfterChunks);
  }
  if (state.window == 0) return;
  const dim3 window_grid(static_cast<unsigned>(std::min(state.window, batch.max_sequence_rows)), grid.z);
  BEBOP_CUDA_TRY(stream, gpu::Launch(WindowKernel<T>, window_grid, dim3(kWindowThreads), 0, stream.handle(), args, step.gates));
}

}  // namespace

void DeltaRule(const DeltaRuleArgs& args, Stream& stream) {
  const LinearStateView& state = args.state;
  const RaggedBatch& batch = args.batch;
  const DType dtype = args.qkv.dtype;
  BEBOP_CHECK(state.key_head_dim > 0 && state.key_head_dim <= kMaxHeadDim && state.value_head_dim > 0 &&
              state.value_head_dim <= kMaxHeadDim && state.num_value_heads % state.num_key_heads == 0 && state.window <= 64);
  BEBOP_CHECK(args.a.dtype == dtype && args.b.dtype == dtype && args.out.dtype == dtype && state.input_dtype == dtype);
  BEBOP_CHECK(args.qkv.cols == state.conv_channels() && args.qkv.rows >= batch.num_rows && args.out.rows >= batch.num_rows &&
              args.out.cols == int64_t{state.num_value_heads} * state.value_head_dim);
  BEBOP_CHECK(batch.max_sequence_rows > 0);
  BEBOP_CHECK(int64_t{batch.num_sequences} * state.window * state.num_value_heads * 2 * 4 <= stream.workspace_bytes());
  if (batch.num_sequences == 0) return;
  const int64_t bytes = ElementBytes(dtype);
  const int64_t key_width = int64_t{state.num_key_heads} * state.key_head_dim;
  const bool exact = state.key_head_dim == kChunkHeadDim && state.value_head_dim == kChunkHeadDim &&
                     gpu::RowsAligned(args.qkv.data, args.qkv.row_stride * bytes) &&
                     gpu::RowsAligned(args.out.data, args.out.row_stride * bytes) &&
                     gpu::RowsAligned(state.window_k, key_width * bytes) &&
                     gpu::RowsAligned(state.window_v, args.out.cols * bytes) && gpu::RowsAligned(state.matrix, 16);
  if (dtype == DType::kFloat32) {
    LaunchAll<float>(args, exact, stream);
  } else {
    LaunchAll<Bf16Bits>(args, exact, stream);
  }
}

}  // namespace bebop::cuda
