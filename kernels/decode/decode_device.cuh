// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/common/gpu.h"
#include "kernels/common/gpu_vector.h"
#include "kernels/common/philox.h"
#include "kernels/decode/decode.h"
#include "kernels/sampling/sampling.h"

// Sampling on the device: what the kernels of this folder share. Included by .cu files alone.
//
// Everything that decides a token repeats the CPU's operations one by one (kernels/sampling/sampling_kernels.inc and
// sampling_cpu.cc): the same polynomial, the same order of additions. The intrinsics with a stated rounding are there because
// nvcc would otherwise contract a multiplication and an addition to one rounding, and a weight, a block sum and in the end a
// token would differ. Only what goes through the library's logarithm may differ from the CPU in the last bit or two:
// log-probabilities, entropy and Gumbel noise.
namespace bebop::cuda {

// The vocabulary passes split a row into chunks of 8 blocks: one thread block a chunk, 16 threads a sampling block (thread l has
// partial sum l).
inline constexpr int32_t kChunkBlocks = 8;
inline constexpr int32_t kChunkIds = kChunkBlocks * kSamplingBlock;
inline constexpr int32_t kChunkThreads = 16 * kChunkBlocks;
// Arrays over the sampling blocks of a row fit in shared memory.
inline constexpr int32_t kMaxBlocks = 1024;
static_assert(kMaxBlocks * kSamplingBlock == kMaxDecodeVocabSize);

inline int32_t NumChunks(int32_t vocab_size) { return (vocab_size + kChunkIds - 1) / kChunkIds; }

__device__ inline float Infinity() { return __uint_as_float(0x7f800000u); }

// FastExp of sampling_kernels.inc.
__device__ inline float FastExp(float x) {
  constexpr float kLog2E = 1.44269504f, kRounder = 12582912.0f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kSmallest = -87.3365402f;
  const float clamped = x < kSmallest ? kSmallest : x;
  const float shifted = __fadd_rn(__fmul_rn(clamped, kLog2E), kRounder);
  const float n = __fsub_rn(shifted, kRounder);
  const float r = __fsub_rn(__fsub_rn(clamped, __fmul_rn(n, kLn2High)), __fmul_rn(n, kLn2Low));
  float polynomial = __fadd_rn(__fmul_rn(r, 1.0f / 5040.0f), 1.0f / 720.0f);
  polynomial = __fadd_rn(__fmul_rn(polynomial, r), 1.0f / 120.0f);
  polynomial = __fadd_rn(__fmul_rn(polynomial, r), 1.0f / 24.0f);
  polynomial = __fadd_rn(__fmul_rn(polynomial, r), 1.0f / 6.0f);
  polynomial = __fadd_rn(__fmul_rn(polynomial, r), 0.5f);
  polynomial = __fadd_rn(__fadd_rn(__fmul_rn(polynomial, __fmul_rn(r, r)), r), 1.0f);
  const uint32_t bits = __float_as_uint(polynomial) + (__float_as_uint(shifted) << 23);
  return x < kSmallest ? 0.0f : __uint_as_float(bits);
}

// FastLog of sampling_kernels.inc.
__device__ inline float FastLog(float w) {
  const int32_t n = static_cast<int32_t>(__float_as_uint(w) - 0x3f3504f3u) >> 23;
  const float m = __uint_as_float(__float_as_uint(w) - (static_cast<uint32_t>(n) << 23));
  const float s = __fdiv_rn(__fsub_rn(m, 1.0f), __fadd_rn(m, 1.0f));
  const float s2 = __fmul_rn(s, s);
  float series = __fadd_rn(__fmul_rn(s2, 2.0f / 9.0f), 2.0f / 7.0f);
  series = __fadd_rn(__fmul_rn(series, s2), 2.0f / 5.0f);
  series = __fadd_rn(__fmul_rn(series, s2), 2.0f / 3.0f);
  series = __fadd_rn(__fmul_rn(series, s2), 2.0f);
  const float exponent = static_cast<float>(n);
  const float rest = __fadd_rn(__fmul_rn(series, s), __fmul_rn(exponent, -2.12194440e-4f));
  const float value = __fadd_rn(__fmul_rn(exponent, 0.693359375f), rest);
  return w > 0.0f ? value : 0.0f;
}

__device__ inline float WeightArgument(const DeviceDistribution& row, float logit) {
  return __fmul_rn(__fsub_rn(logit, row.max_logit), row.scale);
}

// TokenDistribution::weight[id] from the id's logit. REQUIRES: row.finite.
__device__ inline float WeightOf(const DeviceDistribution& row, float logit, int32_t id) {
  float weight = FastExp(WeightArgument(row, logit));
  if (logit < row.logit_floor || weight < row.weight_floor) weight = 0.0f;
  if (weight == row.weight_floor && id >= row.tie_begin_excluded && id != static_cast<int32_t>(row.argmax)) weight = 0.0f;
  return weight;
}
__device__ inline float WeightAt(const DeviceDistribution& row, int32_t id) { return WeightOf(row, row.logits[id], id); }
__device__ inline double ProbAt(const DeviceDistribution& row, int32_t id) {
  return __ddiv_rn(static_cast<double>(WeightAt(row, id)), row.total);
}

__device__ inline int32_t BlockCount(int32_t vocab_size, int32_t block) {
  return min(kSamplingBlock, vocab_size - block * kSamplingBlock);
}

// 16 partial sums, in the lanes of half a warp, halved as TokenDistribution documents. The result is in the half's first lane.
// All 32 lanes call it.
__device__ inline double HalvedSum(double partial) {
  for (int32_t half = 8; half > 0; half /= 2) partial = __dadd_rn(partial, __shfl_down_sync(gpu::kAllLanes, partial, half, 16));
  return partial;
}

// Σ term(id) over sampling block `block` in the order of TokenDistribution::block_sum, by 16 threads; a block past the end gives
// 0. The result is in the first of the 16 threads. All 32 lanes of a warp call it, with one or two blocks.
template <typename Term>
__device__ double SumBlock(int32_t block, int32_t vocab_size, Term term) {
  const int32_t first = block * kSamplingBlock;
  const int32_t end = min(vocab_size, first + kSamplingBlock);
  double sum = 0.0;
#pragma unroll 8
  for (int32_t id = first + static_cast<int32_t>(threadIdx.x % 16); id < end; id += 16)
    sum = __dadd_rn(sum, static_cast<double>(term(id)));
  return HalvedSum(sum);
}

// ---- Draws ----

__device__ inline RandomKey KeyAt(const SlotRequest& request, int32_t position) {
  return {request.seed, request.sample_index, static_cast<uint32_t>(position)};
}

struct TwoLevelShared {
  double block_mass[kMaxBlocks];
  double id_mass[kSamplingBlock];
  double mass;
  int32_t block;
  int32_t id;
};

// The walk of the inverse CDF over masses in shared memory: the index whose cumulative mass first exceeds u * total, or the last
// one with mass. One thread; the additions depend on each other, so the bound is their latency (estimated: 2 µs for half a
// block).
__device__ inline int32_t PickIndex(const double* masses, int32_t count, double total, double u) {
  const double goal = __dmul_rn(u, total);
  double cumulative = 0.0;
  int32_t last = 0;
#pragma unroll 4
  for (int32_t i = 0; i < count; ++i) {
    const double mass = masses[i];
    if (!(mass > 0.0)) continue;
    cumulative = __dadd_rn(cumulative, mass);
    last = i;
    if (cumulative > goal) break;
  }
  return last;
}

__device__ inline double SumAscending(const double* values, int32_t count) {
  double sum = 0.0;
#pragma unroll 8
  for (int32_t i = 0; i < count; ++i) sum = __dadd_rn(sum, values[i]);
  return sum;
}

// The second half of every two-level draw: s.block_mass is filled (and a barrier passed). mass_of(id) is the mass of one id. All
// threads of the block call it and get the id.
template <typename MassOf>
__device__ int32_t PickToken(int32_t vocab_size, double total, double u_block, double u_within, MassOf mass_of,
                             TwoLevelShared& s) {
  if (threadIdx.x == 0) s.block = PickIndex(s.block_mass, NumSamplingBlocks(vocab_size), total, u_block);
  __syncthreads();
  const int32_t first = s.block * kSamplingBlock, count = BlockCount(vocab_size, s.block);
  for (int32_t i = threadIdx.x; i < count; i += blockDim.x) s.id_mass[i] = mass_of(first + i);
  __syncthreads();
  if (threadIdx.x == 0) s.id = first + PickIndex(s.id_mass, count, s.block_mass[s.block], u_within);
  __syncthreads();
  return s.id;
}

// cpu::SampleInverseCdf with the two uniforms of `purpose`. All threads of the block call it.
__device__ inline int32_t SampleInverseCdf(const DeviceDistribution& row, const double* block_sums, int32_t vocab_size,
                                           const RandomKey& key, DrawPurpose purpose, TwoLevelShared& s) {
  __syncthreads();
  for (int32_t i = threadIdx.x; i < NumSamplingBlocks(vocab_size); i += blockDim.x) s.block_mass[i] = block_sums[i];
  __syncthreads();
  return PickToken(
      vocab_size, row.total, Uniform53(key, purpose, 0), Uniform53(key, purpose, 1),
      [&](int32_t id) { return static_cast<double>(WeightAt(row, id)); }, s);
}

// ---- Gumbel noise (coupled mode) ----

struct Candidate {
  double value;
  uint32_t id;
};
__device__ inline bool Better(const Candidate& a, const Candidate& b) {
  return a.value < b.value || (a.value == b.value && a.id < b.id);
}

__device__ inline std::array<uint32_t, 4> NoiseWords(const RandomKey& key, uint32_t lane) {
  return Philox4x32(key.seed, {key.position, key.sample_index, static_cast<uint32_t>(DrawPurpose::kCoupled), lane});
}

// cpu::CoupledExponential, given the high word.
__device__ inline double ExponentialOf(const RandomKey& key, uint32_t id, uint32_t high) {
  const uint32_t lane = id / 64 * 16 + id % 16, word = id / 16 % 4;
  const std::array<uint32_t, 4> words = NoiseWords(key, lane + 0x80000000u);
  const uint32_t low = word == 0 ? words[0] : word == 1 ? words[1] : word == 2 ? words[2] : words[3];
  const uint64_t bits = static_cast<uint64_t>(high) << 21 | low >> 11;
  return -log1p(__dmul_rn(-__dadd_rn(static_cast<double>(bits), 0.5), 0x1.0p-53));
}

struct GumbelShared {
  double value[kChunkThreads / 32];
  uint32_t id[kChunkThreads / 32];
  double first;
};

// The best id of a chunk under cpu::SampleGumbel's order, or argmax if that beats the chunk. All kChunkThreads threads of the
// block call it; the result is in thread 0.
//
// Every thread keeps its own best, which begins as argmax's value. E > high 2^-32, so an id can only win where high 2^-32 < best
// * weight: one comparison spares most ids the logarithm and the low word. An id's lane and word make 16 threads read 16
// neighbours.
__device__ inline Candidate BestOfChunk(const DeviceDistribution& row, int32_t vocab_size, int32_t chunk, const RandomKey& key,
                                        GumbelShared& s) {
  if (threadIdx.x == 0) {
    const uint32_t id = row.argmax;
    const std::array<uint32_t, 4> words = NoiseWords(key, id / 64 * 16 + id % 16);
    const uint32_t word = id / 16 % 4;
    const uint32_t high = word == 0 ? words[0] : word == 1 ? words[1] : word == 2 ? words[2] : words[3];
    s.first = __ddiv_rn(ExponentialOf(key, id, high), static_cast<double>(WeightAt(row, static_cast<int32_t>(id))));
  }
  __syncthreads();
  Candidate best = {s.first, row.argmax};
  const uint32_t lane = threadIdx.x % 16;
  const int32_t end = min(vocab_size, (chunk + 1) * kChunkIds);
  for (int32_t group = chunk * kChunkIds + static_cast<int32_t>(threadIdx.x / 16) * 64; group < end;
       group += kChunkThreads / 16 * 64) {
    float logits[4];
#pragma unroll
    for (int32_t word = 0; word < 4; ++word) {
      const int32_t id = group + 16 * word + static_cast<int32_t>(lane);
      logits[word] = id < end ? row.logits[id] : -Infinity();
    }
    const std::array<uint32_t, 4> words = NoiseWords(key, static_cast<uint32_t>(group) / 4 + lane);
#pragma unroll
    for (int32_t word = 0; word < 4; ++word) {
      const int32_t id = group + 16 * word + static_cast<int32_t>(lane);
      const float weight = WeightOf(row, logits[word], id);  // 0 past the end
      const float limit = static_cast<float>(fmin(__dmul_rn(best.value, 0x1.0p31 * 1.00001), 1e30));
      if (!(static_cast<float>(words[word] >> 1) < __fmul_rn(weight, limit))) continue;
      const Candidate candidate = {
          __ddiv_rn(ExponentialOf(key, static_cast<uint32_t>(id), words[word]), static_cast<double>(weight)),
          static_cast<uint32_t>(id)};
      if (Better(candidate, best)) best = candidate;
    }
  }
  for (int32_t distance = 16; distance > 0; distance /= 2) {
    const Candidate other = {__shfl_xor_sync(gpu::kAllLanes, best.value, distance),
                             __shfl_xor_sync(gpu::kAllLanes, best.id, distance)};
    if (Better(other, best)) best = other;
  }
  if (threadIdx.x % 32 == 0) {
    s.value[threadIdx.x / 32] = best.value;
    s.id[threadIdx.x / 32] = best.id;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int32_t warp = 1; warp < kChunkThreads / 32; ++warp) {
      if (Better({s.value[warp], s.id[warp]}, best)) best = {s.value[warp], s.id[warp]};
    }
  }
  return best;
}

__device__ inline uint32_t BestOfChunks(const double* values, const uint32_t* ids, int32_t num_chunks) {
  Candidate best = {values[0], ids[0]};
  for (int32_t chunk = 1; chunk < num_chunks; ++chunk) {
    if (Better({values[chunk], ids[chunk]}, best)) best = {values[chunk], ids[chunk]};
  }
  return best.id;
}

}  // namespace bebop::cuda
