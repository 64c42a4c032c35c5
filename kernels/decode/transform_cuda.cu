// SPDX-License-Identifier: Apache-2.0
// TransformRows: rows of logits -> distributions, without storing a weight and without sorting. Four launches:
//
//   MaxBlocks    chunk x row   bans; maximum, argmax and usability of every sampling block; draft rows are copied to their slot
//   PrepareRows  row           the row's maximum, argmax, scale; top-k: the k-th largest logit
//   SumBlocks    chunk x row   sums of the weights of every sampling block, and of the raw logits' where they are another sum
//   FinishRows   row           totals; top-p: the border, then the sums of what is left
//
// Bytes: a row of V float32 logits is read twice (the second time from L2 if few rows are in flight), a draft row is written once
// more. At V = 248,320 that is 2 MB a row (estimated: 0.5 µs). FLOPs: about 30 float operations and one conversion to double an
// id (estimated: of the order of the memory's time). Loads are 4 bytes a thread and 64 or 128 contiguous bytes a request: at one
// load to thirty operations wider ones gain nothing, and rows need no alignment.
//
// Truncation works on single rows in single thread blocks: rows that do not ask leave at once. Both thresholds are found by radix
// search on the ordered bits of floats. Counts are integers. Masses are, too: floats of one exponent add up exactly as integers,
// so a histogram with bins no wider than an exponent has no rounding, and atomics no order. What rounding is left in the CPU's
// own sums decides only when a sum meets its goal to within that rounding; that is detected, and then the CPU's additions are
// repeated in the CPU's order.
#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/decode/decode_device.cuh"

namespace bebop {
namespace cuda {
namespace {

constexpr int32_t kRowThreads = 256;
constexpr float kSmallestNormal = 1.17549435e-38f;

// Partial results of N rows; V = vocabulary, M = sampling blocks.
struct Scratch {
  double* raw_block_sum;  // [N, M]
  float* block_max;       // [N, M]; +inf marks a block with NaN or +inf
  int32_t* block_argmax;  // [N, M]
  float* raw_block_max;   // [N, M] before bans
  float* raw_max;         // [N]
  float* banned_logits;   // [N, kMaxBannedIds] logits in place of which bans were written
};

int64_t LayOut(int64_t num_rows, int32_t vocab_size, char* base, Scratch* scratch) {
  const int64_t blocks = num_rows * NumSamplingBlocks(vocab_size);
  int64_t offset = 0;
  const auto take = [&](int64_t bytes) {
    char* const at = base + offset;
    offset += (bytes + 15) / 16 * 16;
    return at;
  };
  scratch->raw_block_sum = reinterpret_cast<double*>(take(blocks * 8));
  scratch->block_max = reinterpret_cast<float*>(take(blocks * 4));
  scratch->block_argmax = reinterpret_cast<int32_t*>(take(blocks * 4));
  scratch->raw_block_max = reinterpret_cast<float*>(take(blocks * 4));
  scratch->raw_max = reinterpret_cast<float*>(take(num_rows * 4));
  scratch->banned_logits = reinterpret_cast<float*>(take(num_rows * kMaxBannedIds * 4));
  return offset;
}

struct Params {
  SlotArrays slots;
  PassArrays pass;
  int32_t draft_depth;
  float* logits;
  Scratch scratch;
};

// What is asked of a row.
struct Task {
  bool active = false;
  bool one_hot = false;  // a greedy row of which nothing is reported
  bool want_raw = false;
  bool raw_apart = false;  // the raw sum is not the processed one
  bool truncate_k = false, truncate_p = false;
  float temperature = 1.0f, top_p = 1.0f, min_p = 0.0f;
  int32_t top_k = 0;
  int32_t num_banned = 0;
  const uint32_t* banned_ids = nullptr;
  float* source = nullptr;  // the row of args.logits
  float* copy = nullptr;    // of a draft row
  DeviceDistribution* out = nullptr;
  double* block_sums = nullptr;
};

__device__ Task DescribeRow(const Params& params, int32_t row) {
  const SlotArrays& slots = params.slots;
  const PassArrays& pass = params.pass;
  const int64_t vocab_size = slots.vocab_size;
  const int32_t num_blocks = NumSamplingBlocks(slots.vocab_size);
  const bool draft = params.draft_depth >= 0;
  Task task;
  const int32_t sequence_idx = draft ? row : pass.judged_sequence[row];
  if (sequence_idx < 0 || (draft && pass.draft_from_row[row] < 0)) return task;
  const PassSequence& sequence = pass.sequences[sequence_idx];
  const SlotRequest& request = slots.requests[sequence.slot];
  const int32_t place = draft ? params.draft_depth : row - sequence.first_judged_row;
  task.active = true;
  task.temperature = request.temperature;
  task.top_k = request.top_k;
  task.top_p = request.top_p;
  task.min_p = request.min_p;
  if (request.temperature == 0.0f) {
    // What is reported of a greedy row is temperature 1 without truncation; its argmax is the same.
    task.one_hot = (request.record & (kRecordLogprob | kRecordEntropy | kRecordDraftLogprob)) == 0;
    task.temperature = task.one_hot ? 0.0f : 1.0f;
    task.top_k = 0;
    task.top_p = 1.0f;
    task.min_p = 0.0f;
  }
  task.truncate_k = task.top_k > 0 && task.top_k < slots.vocab_size;
  task.truncate_p = task.top_p < 1.0f;
  if (slots.states[sequence.slot].num_output + place < request.min_new_tokens) {
    task.num_banned = request.num_banned_ids;
    task.banned_ids = slots.banned_ids + static_cast<int64_t>(sequence.slot) * kMaxBannedIds;
  }
  task.source = params.logits + row * vocab_size;
  if (draft) {
    const int64_t draft_row = static_cast<int64_t>(sequence.slot) * slots.max_drafts + params.draft_depth;
    task.copy = slots.draft_logits + draft_row * vocab_size;
    task.out = slots.draft_rows + draft_row;
    task.block_sums = slots.draft_block_sums + draft_row * num_blocks;
  } else {
    task.want_raw = (request.record & kRecordRawLogprob) != 0;
    const bool plain_raw = task.temperature == 1.0f && task.num_banned == 0;
    task.raw_apart = task.want_raw && (!plain_raw || task.truncate_k || task.min_p > 0.0f);
    task.out = pass.target_rows + row;
    task.block_sums = pass.target_block_sums + static_cast<int64_t>(row) * num_blocks;
  }
  return task;
}

// Maximum (+inf: unusable) and lowest argmax of one sampling block, by a warp, in all lanes; copies the block if `copy` is not
// null.
__device__ void MaxOfBlock(const float* logits, float* copy, int32_t first, int32_t end, float* block_max,
                           int32_t* block_argmax) {
  float best = -Infinity();
  int32_t best_id = first;
  bool usable = true;
  // Eight loads at a time, before the stores: the compiler cannot know that the copy is other memory.
  constexpr int32_t kLoads = 8;
  for (int32_t base = first + static_cast<int32_t>(threadIdx.x % 32); base < end; base += 32 * kLoads) {
    float group[kLoads];
#pragma unroll
    for (int32_t i = 0; i < kLoads; ++i) group[i] = base + 32 * i < end ? logits[base + 32 * i] : -Infinity();
#pragma unroll
    for (int32_t i = 0; i < kLoads; ++i) {
      const int32_t id = base + 32 * i;
      if (copy != nullptr && id < end) copy[id] = group[i];
      usable = usable && group[i] < Infinity();
      if (group[i] > best) {
        best = group[i];
        best_id = id;
      }
    }
  }
  for (int32_t distance = 16; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(gpu::kAllLanes, best, distance);
    const int32_t other_id = __shfl_xor_sync(gpu::kAllLanes, best_id, distance);
    if (other > best || (other == best && other_id < best_id)) {
      best = other;
      best_id = other_id;
    }
  }
  *block_max = __all_sync(gpu::kAllLanes, usable) ? best : Infinity();
  *block_argmax = best_id;
}

__global__ void __launch_bounds__(kChunkThreads) MaxBlocks(Params params) {
  const int32_t row = blockIdx.y, vocab_size = params.slots.vocab_size, num_blocks = NumSamplingBlocks(vocab_size);
  const Task task = DescribeRow(params, row);
  if (!task.active) return;
  const int32_t first = static_cast<int32_t>(blockIdx.x) * kChunkIds, end = min(vocab_size, first + kChunkIds);
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t first_block = static_cast<int32_t>(blockIdx.x) * kChunkBlocks;
  const int64_t blocks_before = static_cast<int64_t>(row) * num_blocks;

  int32_t broken = 0;  // a ban does not hide a broken row
  if (task.num_banned > 0) {
    float* const kept = params.scratch.banned_logits + static_cast<int64_t>(row) * kMaxBannedIds;
    if (task.want_raw) {
      for (int32_t block = first_block + warp; block < min(num_blocks, first_block + kChunkBlocks); block += kChunkThreads / 32) {
        float max;
        int32_t argmax;
        MaxOfBlock(task.source, nullptr, block * kSamplingBlock, block * kSamplingBlock + BlockCount(vocab_size, block), &max,
                   &argmax);
        if (lane == 0) params.scratch.raw_block_max[blocks_before + block] = max;
      }
    }
    for (int32_t i = threadIdx.x; i < task.num_banned; i += kChunkThreads) {
      const uint32_t id = task.banned_ids[i];
      if (id < static_cast<uint32_t>(first) || id >= static_cast<uint32_t>(end)) continue;
      kept[i] = task.source[id];
      if (!(kept[i] < Infinity())) broken = 1;
    }
    broken = __syncthreads_or(broken);
    for (int32_t i = threadIdx.x; i < task.num_banned; i += kChunkThreads) {
      const uint32_t id = task.banned_ids[i];
      if (id >= static_cast<uint32_t>(first) && id < static_cast<uint32_t>(end)) task.source[id] = -Infinity();
    }
    __syncthreads();
  }
  for (int32_t block = first_block + warp; block < min(num_blocks, first_block + kChunkBlocks); block += kChunkThreads / 32) {
    float max;
    int32_t argmax;
    MaxOfBlock(task.source, task.copy, block * kSamplingBlock, block * kSamplingBlock + BlockCount(vocab_size, block), &max,
               &argmax);
    if (lane == 0) {
      params.scratch.block_max[blocks_before + block] = broken != 0 ? Infinity() : max;
      params.scratch.block_argmax[blocks_before + block] = argmax;
    }
  }
}

// Floats as integers in the same order; both zeros are one.
__device__ uint32_t OrderedBits(float value) {
  const uint32_t bits = __float_as_uint(__fadd_rn(value, 0.0f));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ float FromOrderedBits(uint32_t ordered) {
  return __uint_as_float(ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered);
}

struct TopKShared {
  uint32_t histogram[2048];
  uint32_t partial[kRowThreads];
  float low;
  uint32_t bin;
  uint32_t rank;
};

// The k-th largest logit of a finite row. If k is at most the number of sampling blocks, the k-th largest block maximum bounds it
// from below: then about k blocks are looked at, and few logits of those counted. All threads call it.
__device__ float KthLargest(const float* logits, int32_t vocab_size, const float* block_max, int32_t k, TopKShared& s) {
  const int32_t num_blocks = NumSamplingBlocks(vocab_size);
  if (threadIdx.x == 0) s.low = -Infinity();
  __syncthreads();
  if (k <= num_blocks) {
    for (int32_t i = threadIdx.x; i < num_blocks; i += kRowThreads) {
      int32_t before = 0;
      for (int32_t j = 0; j < num_blocks; ++j) before += block_max[j] > block_max[i] || (block_max[j] == block_max[i] && j < i);
      if (before == k - 1) s.low = block_max[i];
    }
  }
  __syncthreads();
  const float low = s.low;
  constexpr int32_t kBits[3] = {11, 11, 10};
  uint32_t prefix = 0;
  uint32_t rank = static_cast<uint32_t>(k);
  int32_t shift = 32;
  for (int32_t level = 0; level < 3; ++level) {
    const int32_t num_bins = 1 << kBits[level];
    const int32_t above_shift = shift;  // bits [above_shift, 32) are found already
    shift -= kBits[level];
    for (int32_t i = threadIdx.x; i < num_bins; i += kRowThreads) s.histogram[i] = 0;
    __syncthreads();
    for (int32_t block = 0; block < num_blocks; ++block) {
      if (block_max[block] < low) continue;
      const int32_t first = block * kSamplingBlock, count = BlockCount(vocab_size, block);
      for (int32_t i = threadIdx.x; i < count; i += kRowThreads) {
        const float logit = logits[first + i];
        if (!(logit >= low)) continue;
        const uint32_t key = OrderedBits(logit);
        if (level > 0 && key >> above_shift != prefix) continue;
        atomicAdd(&s.histogram[key >> shift & static_cast<uint32_t>(num_bins - 1)], 1u);
      }
    }
    __syncthreads();
    const int32_t bins_per_thread = num_bins / kRowThreads;
    uint32_t partial = 0;
    for (int32_t i = 0; i < bins_per_thread; ++i) partial += s.histogram[static_cast<int32_t>(threadIdx.x) * bins_per_thread + i];
    s.partial[threadIdx.x] = partial;
    __syncthreads();
    if (threadIdx.x == 0) {
      int32_t thread = kRowThreads - 1;
      for (; thread > 0 && s.partial[thread] < rank; --thread) rank -= s.partial[thread];
      int32_t bin = thread * bins_per_thread + bins_per_thread - 1;
      for (; bin > thread * bins_per_thread && s.histogram[bin] < rank; --bin) rank -= s.histogram[bin];
      s.bin = static_cast<uint32_t>(bin);
      s.rank = rank;
    }
    __syncthreads();
    prefix = prefix << kBits[level] | s.bin;
    rank = s.rank;
  }
  return FromOrderedBits(prefix);
}

// The largest of `values`, in all lanes of the warp that calls it, and where it stands first.
__device__ float WarpMax(const float* values, int32_t count, int32_t* index) {
  float best = -Infinity();
  int32_t best_idx = 0;
  for (int32_t i = threadIdx.x % 32; i < count; i += 32) {
    if (values[i] > best) {
      best = values[i];
      best_idx = i;
    }
  }
  for (int32_t distance = 16; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(gpu::kAllLanes, best, distance);
    const int32_t other_idx = __shfl_xor_sync(gpu::kAllLanes, best_idx, distance);
    if (other > best || (other == best && other_idx < best_idx)) {
      best = other;
      best_idx = other_idx;
    }
  }
  *index = best_idx;
  return best;
}

__global__ void __launch_bounds__(kRowThreads) PrepareRows(Params params) {
  __shared__ TopKShared s;
  __shared__ int32_t finite;
  const int32_t row = blockIdx.x, vocab_size = params.slots.vocab_size, num_blocks = NumSamplingBlocks(vocab_size);
  const Task task = DescribeRow(params, row);
  if (!task.active) return;
  const int64_t blocks_before = static_cast<int64_t>(row) * num_blocks;
  const float* const block_max = params.scratch.block_max + blocks_before;
  const float* const logits = task.copy != nullptr ? task.copy : task.source;
  if (threadIdx.x < 32) {
    int32_t block, raw_block;
    const float max = WarpMax(block_max, num_blocks, &block);
    float raw_max = max;
    if (task.want_raw && task.num_banned > 0)
      raw_max = WarpMax(params.scratch.raw_block_max + blocks_before, num_blocks, &raw_block);
    if (threadIdx.x == 0) {
      DeviceDistribution out;
      out.logits = logits;
      out.finite = max > -Infinity() && max < Infinity() ? 1 : 0;
      finite = out.finite;
      out.max_logit = max;
      out.argmax = static_cast<uint32_t>(params.scratch.block_argmax[blocks_before + block]);
      out.logit_floor = -Infinity();
      out.tie_begin_excluded = vocab_size;
      if (task.one_hot) {
        // Of the ids of weight 1, argmax alone stays.
        out.scale = 1.0f;
        out.weight_floor = 1.0f;
        out.tie_begin_excluded = 0;
      } else {
        // A temperature so small that its inverse overflows still leaves exactly the ties of the maximum.
        out.scale = fminf(__fdiv_rn(1.0f, task.temperature), 3.40282347e38f);
        out.weight_floor = task.truncate_p ? 0.0f : task.min_p;
      }
      *task.out = out;
      params.scratch.raw_max[row] = raw_max;
    }
  }
  __syncthreads();
  if (finite == 0 || !task.truncate_k) return;
  const float logit_floor = KthLargest(logits, vocab_size, block_max, task.top_k, s);
  if (threadIdx.x == 0) task.out->logit_floor = logit_floor;
}

__global__ void __launch_bounds__(kChunkThreads) SumBlocks(Params params) {
  const int32_t row = blockIdx.y, vocab_size = params.slots.vocab_size, num_blocks = NumSamplingBlocks(vocab_size);
  const Task task = DescribeRow(params, row);
  if (!task.active) return;
  const DeviceDistribution out = *task.out;
  if (out.finite == 0) return;
  const int32_t block = static_cast<int32_t>(blockIdx.x) * kChunkBlocks + static_cast<int32_t>(threadIdx.x / 16);
  const bool writes = threadIdx.x % 16 == 0 && block < num_blocks;
  if (task.raw_apart) {
    // The banned logits come back for this sum; they are this thread block's own.
    const uint32_t first = blockIdx.x * static_cast<uint32_t>(kChunkIds), end = first + static_cast<uint32_t>(kChunkIds);
    const float* const kept = params.scratch.banned_logits + static_cast<int64_t>(row) * kMaxBannedIds;
    for (int32_t i = threadIdx.x; i < task.num_banned; i += kChunkThreads) {
      const uint32_t id = task.banned_ids[i];
      if (id >= first && id < end && id < static_cast<uint32_t>(vocab_size)) task.source[id] = kept[i];
    }
    __syncthreads();
    const float raw_max = params.scratch.raw_max[row];
    const double sum = SumBlock(block, vocab_size, [&](int32_t id) { return FastExp(__fsub_rn(task.source[id], raw_max)); });
    if (writes) params.scratch.raw_block_sum[static_cast<int64_t>(row) * num_blocks + block] = sum;
    __syncthreads();
    for (int32_t i = threadIdx.x; i < task.num_banned; i += kChunkThreads) {
      const uint32_t id = task.banned_ids[i];
      if (id >= first && id < end && id < static_cast<uint32_t>(vocab_size)) task.source[id] = -Infinity();
    }
    __syncthreads();
  }
  if (task.one_hot) return;
  const double sum = SumBlock(block, vocab_size, [&](int32_t id) { return WeightAt(out, id); });
  if (writes) task.block_sums[block] = sum;
}

// ---- Top-p ----

struct TopPShared {
  double block_sum[kMaxBlocks];
  uint32_t low[1024], high[1024];  // histogram of mantissas: sums of their low and high 12 bits (low alone: counts)
  double partial[kRowThreads];
  float list[kSamplingBlock];
  int32_t word_count[kSamplingBlock / 32];
  double total;
  // Result of a level of the search.
  double mass_above;
  uint32_t bin;
  uint32_t count;
  int32_t found;
  double sum;
  int32_t tie_id;
};

// Of 4 flags a thread (flags[k] of thread t belongs to element 256 k + t of 1024): how many flags stand before each of them, and
// how many there are. All threads call it, with a barrier behind the use of s.word_count.
__device__ int32_t RankFlags(const bool (&flags)[4], int32_t (&rank)[4], TopPShared& s) {
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t words[4];
#pragma unroll
  for (int32_t k = 0; k < 4; ++k) {
    words[k] = __ballot_sync(gpu::kAllLanes, flags[k]);
    if (lane == 0) s.word_count[8 * k + warp] = __popc(words[k]);
  }
  __syncthreads();
  int32_t total = 0;
  for (int32_t i = 0; i < kSamplingBlock / 32; ++i) {
#pragma unroll
    for (int32_t k = 0; k < 4; ++k) {
      if (i == 8 * k + warp) rank[k] = total + __popc(words[k] & ((1u << lane) - 1u));
    }
    total += s.word_count[i];
  }
  return total;
}

// cpu's mass_at_least(threshold) over the list of the weights in [least, most) in order of ids: 16 interleaved partial sums over
// the list's indices. *num_listed: its length. All threads call it and get the sum.
__device__ double MassInOrder(const DeviceDistribution& row, int32_t vocab_size, float least, float most, float threshold,
                              int32_t* num_listed, TopPShared& s) {
  double sum = 0.0;
  int32_t length = 0;
  for (int32_t first = 0; first < vocab_size; first += kSamplingBlock) {
    bool listed[4];
    float weight[4];
    int32_t rank[4];
#pragma unroll
    for (int32_t k = 0; k < 4; ++k) {
      const int32_t id = first + kRowThreads * k + static_cast<int32_t>(threadIdx.x);
      weight[k] = id < vocab_size ? WeightAt(row, id) : 0.0f;
      listed[k] = id < vocab_size && weight[k] >= least && weight[k] < most;
    }
    const int32_t count = RankFlags(listed, rank, s);
#pragma unroll
    for (int32_t k = 0; k < 4; ++k) {
      if (listed[k]) s.list[rank[k]] = weight[k];
    }
    __syncthreads();
    if (threadIdx.x < 16) {
      for (int32_t i = (static_cast<int32_t>(threadIdx.x) - length) & 15; i < count; i += 16) {
        if (!(s.list[i] < threshold)) sum = __dadd_rn(sum, static_cast<double>(s.list[i]));
      }
    }
    length += count;
    __syncthreads();
  }
  if (threadIdx.x < 32) {
    sum = HalvedSum(sum);
    if (threadIdx.x == 0) s.sum = sum;
  }
  __syncthreads();
  *num_listed = length;
  return s.sum;
}

// cpu's LargestThreshold for top-p, addition by addition: up to 40 passes of one thread block over the row. Only where rounding
// decides.
__device__ float BorderInOrder(const DeviceDistribution& row, int32_t vocab_size, float low, double goal, TopPShared& s) {
  uint32_t yes = __float_as_uint(low), no = __float_as_uint(1.0f) + 1u;
  float least = low, most = Infinity();
  double above = 0.0;
  for (int32_t pass = 1; no - yes > 1u; ++pass) {
    const uint32_t middle = yes + (no - yes) / 2u;
    int32_t count;
    const double mass = __dadd_rn(above, MassInOrder(row, vocab_size, least, most, __uint_as_float(middle), &count, s));
    if (mass >= goal) {
      yes = middle;
    } else {
      no = middle;
    }
    if (pass % 4 != 0 || count < kSamplingBlock) continue;
    const double dropped = MassInOrder(row, vocab_size, least, most, __uint_as_float(no), &count, s);
    above = __dadd_rn(above, dropped);
    least = __uint_as_float(yes);
    most = __uint_as_float(no);
  }
  return __uint_as_float(yes);
}

// One level of the radix search for the border over the bits of weights: 12, then 10, then 10 bits. Thread 0 leaves in s the
// largest bin from which on the mass, with `mass_above`, reaches `goal` (found = 0: none, by rounding), and the mass above that
// bin.
__device__ void SearchBorderLevel(const DeviceDistribution& row, int32_t vocab_size, int32_t level, uint32_t prefix, float low,
                                  double goal, double mass_above, TopPShared& s) {
  const int32_t shift = level == 0 ? 20 : level == 1 ? 10 : 0;
  for (int32_t i = threadIdx.x; i < 1024; i += kRowThreads) s.low[i] = s.high[i] = 0;
  // Arguments outside these bounds surely give weights outside the bin that is split; inside, the weight is computed. The margin
  // is far more than the error of logf and of the weights.
  const float bin_low = level == 0 ? low : __uint_as_float(prefix << (shift + 10));
  const float least_argument = logf(fmaxf(bin_low, kSmallestNormal)) - 1e-3f;
  const float most_argument = level == 0 ? 1.0f : logf(__uint_as_float((prefix + 1u) << (shift + 10))) + 1e-3f;
  __syncthreads();
#pragma unroll 4
  for (int32_t id = threadIdx.x; id < vocab_size; id += kRowThreads) {
    const float logit = row.logits[id];
    const float argument = WeightArgument(row, logit);
    if (!(argument >= least_argument && argument <= most_argument)) continue;
    const uint32_t bits = __float_as_uint(WeightOf(row, logit, id));
    if (bits == 0 || (level > 0 && bits >> (shift + 10) != prefix)) continue;
    const uint32_t bin = level == 0 ? bits >> shift : bits >> shift & 1023u;
    const uint32_t mantissa = (bits & 0x7fffffu) | 0x800000u;
    atomicAdd(&s.low[bin], level == 2 ? 1u : mantissa & 0xfffu);
    if (level < 2) atomicAdd(&s.high[bin], mantissa >> 12);
  }
  __syncthreads();
  // Exact in double: fewer than 2^20 mantissas of 24 bits, times a power of two.
  const auto mass_of = [&](uint32_t bin) {
    if (level == 2) return __dmul_rn(static_cast<double>(s.low[bin]), static_cast<double>(__uint_as_float(prefix << 10 | bin)));
    const uint32_t bits = level == 0 ? bin << shift : (prefix << 10 | bin) << shift;
    const double mantissas = static_cast<double>((static_cast<uint64_t>(s.high[bin]) << 12) + s.low[bin]);
    return ldexp(mantissas, static_cast<int>(bits >> 23) - 150);
  };
  constexpr uint32_t kBinsPerThread = 1024 / kRowThreads;
  double partial = 0.0;
  for (uint32_t i = kBinsPerThread; i-- > 0;) partial = __dadd_rn(partial, mass_of(threadIdx.x * kBinsPerThread + i));
  s.partial[threadIdx.x] = partial;
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t thread = kRowThreads;
    while (thread-- > 0 && __dadd_rn(mass_above, s.partial[thread]) < goal) mass_above = __dadd_rn(mass_above, s.partial[thread]);
    s.found = 0;
    for (uint32_t i = kBinsPerThread; i-- > 0 && thread < kRowThreads && s.found == 0;) {
      const uint32_t bin = thread * kBinsPerThread + i;
      const double mass = mass_of(bin);
      if (mass > 0.0 && __dadd_rn(mass_above, mass) >= goal) {
        s.found = 1;
        s.bin = bin;
        s.count = s.low[bin];
      } else {
        mass_above = __dadd_rn(mass_above, mass);
      }
    }
    s.mass_above = mass_above;
  }
  __syncthreads();
}

// The number of weights equal to `value`, argmax's among them if `with_argmax`; s.tie_id = the one with `skip` before it
// (vocab_size: none).
__device__ int32_t CountTies(const DeviceDistribution& row, int32_t vocab_size, float value, bool with_argmax, int32_t skip,
                             TopPShared& s) {
  if (threadIdx.x == 0) s.tie_id = vocab_size;
  __syncthreads();
  int32_t count = 0;
  for (int32_t first = 0; first < vocab_size; first += kSamplingBlock) {
    bool tied[4];
    int32_t rank[4];
#pragma unroll
    for (int32_t k = 0; k < 4; ++k) {
      const int32_t id = first + kRowThreads * k + static_cast<int32_t>(threadIdx.x);
      tied[k] = id < vocab_size && WeightAt(row, id) == value && (with_argmax || id != static_cast<int32_t>(row.argmax));
    }
    const int32_t in_block = RankFlags(tied, rank, s);
#pragma unroll
    for (int32_t k = 0; k < 4; ++k) {
      if (tied[k] && count + rank[k] == skip) s.tie_id = first + kRowThreads * k + static_cast<int32_t>(threadIdx.x);
    }
    count += in_block;
    __syncthreads();
  }
  return count;
}

// cpu's TruncateTopP: sets row->weight_floor and tie_begin_excluded. All threads call it with the same row.
__device__ void TruncateTopP(float top_p, float min_p, int32_t vocab_size, DeviceDistribution* row, TopPShared& s) {
  const double goal = __dmul_rn(static_cast<double>(top_p), row->total);
  const double least_mass = __ddiv_rn(__dmul_rn(__dmul_rn(0.5, __dsub_rn(1.0, static_cast<double>(top_p))), row->total),
                                      static_cast<double>(vocab_size));
  const float low = fmaxf(static_cast<float>(least_mass), kSmallestNormal);
  uint32_t prefix = 0;
  double mass_above = 0.0;
  bool certain = true;
  uint32_t count = 0;
  for (int32_t level = 0; level < 3 && certain; ++level) {
    SearchBorderLevel(*row, vocab_size, level, prefix, low, goal, mass_above, s);
    certain = s.found != 0;
    prefix = level == 0 ? s.bin : prefix << 10 | s.bin;
    mass_above = s.mass_above;
    count = s.count;
    __syncthreads();
  }
  float border = __uint_as_float(prefix);
  // Relative error of the CPU's sums: V / 16 additions a lane, the halving and up to 8 parts counted for good; of ours: 3 * 260
  // additions.
  const double error = (vocab_size / 16 + 2048) * 0x1.0p-52;
  const double mass_with = __dadd_rn(mass_above, __dmul_rn(static_cast<double>(count), static_cast<double>(border)));
  certain = certain && mass_with * (1.0 - error) >= goal && mass_above * (1.0 + error) < goal;
  int32_t num_ties = static_cast<int32_t>(count);
  if (!certain) {
    border = BorderInOrder(*row, vocab_size, low, goal, s);
    num_ties = CountTies(*row, vocab_size, border, true, 0, s);
  }
  int32_t first_excluded = vocab_size;
  if (num_ties > 1) {
    // How many of the equal weights at the border stay. A sum of nothing is exact.
    double missing = __ddiv_rn(__dsub_rn(goal, mass_above), static_cast<double>(border));
    const double slack = (mass_above * error) / static_cast<double>(border) + fabs(missing) * 0x1.0p-50;
    if (!certain || (mass_above > 0.0 && fabs(missing - rint(missing)) <= slack)) {
      const float above = __uint_as_float(__float_as_uint(border) + 1u);
      int32_t length;
      const double exact = MassInOrder(*row, vocab_size, -1.0f, Infinity(), above, &length, s);
      missing = __ddiv_rn(__dsub_rn(goal, exact), static_cast<double>(border));
    }
    missing = ceil(missing);
    if (missing < static_cast<double>(num_ties)) {
      int32_t left = max(1, static_cast<int32_t>(missing));
      if (border == 1.0f) --left;  // argmax is one of them and stays
      CountTies(*row, vocab_size, border, false, left, s);
      first_excluded = s.tie_id;
    }
  }
  row->weight_floor = fmaxf(border, min_p);
  // With a floor above the border all of these are out already.
  row->tie_begin_excluded = min_p > border ? vocab_size : first_excluded;
}

__global__ void __launch_bounds__(kRowThreads) FinishRows(Params params) {
  __shared__ TopPShared s;
  const int32_t row_idx = blockIdx.x, vocab_size = params.slots.vocab_size, num_blocks = NumSamplingBlocks(vocab_size);
  const Task task = DescribeRow(params, row_idx);
  if (!task.active) return;
  DeviceDistribution row = *task.out;
  if (row.finite == 0) return;
  for (int32_t block = threadIdx.x; block < num_blocks; block += kRowThreads) {
    if (task.one_hot) task.block_sums[block] = block == static_cast<int32_t>(row.argmax) / kSamplingBlock ? 1.0 : 0.0;
    s.block_sum[block] = task.block_sums[block];
  }
  __syncthreads();
  if (threadIdx.x == 0) s.total = SumAscending(s.block_sum, num_blocks);
  __syncthreads();
  row.total = s.total;
  if (threadIdx.x == 0 && task.want_raw) {
    const double raw_total =
        task.raw_apart ? SumAscending(params.scratch.raw_block_sum + static_cast<int64_t>(row_idx) * num_blocks, num_blocks)
                       : row.total;
    row.raw_lse = static_cast<double>(params.scratch.raw_max[row_idx]) + log(raw_total);
  }
  if (task.truncate_p) {
    TruncateTopP(task.top_p, task.min_p, vocab_size, &row, s);
    const float least_argument = logf(fmaxf(row.weight_floor, kSmallestNormal)) - 1e-3f;
    for (int32_t base = 0; base < num_blocks; base += kRowThreads / 16) {
      const int32_t block = base + static_cast<int32_t>(threadIdx.x / 16);
      const double sum = SumBlock(block, vocab_size, [&](int32_t id) {
        const float logit = row.logits[id];
        return WeightArgument(row, logit) < least_argument ? 0.0f : WeightOf(row, logit, id);
      });
      if (threadIdx.x % 16 == 0 && block < num_blocks) task.block_sums[block] = s.block_sum[block] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) row.total = SumAscending(s.block_sum, num_blocks);
  }
  if (threadIdx.x == 0) *task.out = row;
}

}  // namespace

void TransformRows(const TransformRowsArgs& args, Stream& stream) {
  const int32_t num_rows = args.draft_depth < 0 ? args.pass.num_judged : args.pass.num_sequences;
  const int32_t vocab_size = args.slots.vocab_size;
  BEBOP_CHECK(vocab_size >= 1 && vocab_size <= kMaxDecodeVocabSize && args.draft_depth < args.slots.max_drafts &&
              args.scratch != nullptr);
  if (num_rows == 0) return;
  Params params = {args.slots, args.pass, args.draft_depth, args.logits, {}};
  LayOut(num_rows, vocab_size, static_cast<char*>(args.scratch), &params.scratch);
  const dim3 chunks(static_cast<unsigned>(NumChunks(vocab_size)), static_cast<unsigned>(num_rows));
  const dim3 rows(static_cast<unsigned>(num_rows));
  BEBOP_CUDA_TRY(stream, gpu::Launch(MaxBlocks, chunks, kChunkThreads, 0, stream.handle(), params));
  BEBOP_CUDA_TRY(stream, gpu::Launch(PrepareRows, rows, kRowThreads, 0, stream.handle(), params));
  BEBOP_CUDA_TRY(stream, gpu::Launch(SumBlocks, chunks, kChunkThreads, 0, stream.handle(), params));
  BEBOP_CUDA_TRY(stream, gpu::Launch(FinishRows, rows, kRowThreads, 0, stream.handle(), params));
}

}  // namespace cuda

int64_t TransformScratchBytes(int32_t num_rows, int32_t vocab_size) {
  cuda::Scratch scratch;
  return cuda::LayOut(num_rows, vocab_size, nullptr, &scratch);
}

}  // namespace bebop
