// SPDX-License-Identifier: Apache-2.0
// Sampling on the CPU. The vocabulary passes work on blocks of kSamplingBlock ids with 16-lane vectors; each pass is compiled for
// AVX-512, AVX2 and the baseline and chosen at load time. All three do the same IEEE operations in the same order (no contraction:
// the build sets -ffp-contract=off), so they agree bit for bit.
#include "kernels/sampling/sampling.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/common/check.h"

// Sanitizer runtimes are not ready when the loader picks a clone; those builds take the baseline (same bits, slower).
#if defined(__x86_64__) && !defined(BEBOP_SANITIZED)
#define BEBOP_SAMPLING_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define BEBOP_SAMPLING_CLONES
#endif
#define BEBOP_ALWAYS_INLINE inline __attribute__((always_inline))

namespace bebop::cpu {
namespace {

constexpr int32_t kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Ints = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));
using Doubles = double __attribute__((vector_size(kLanes * sizeof(double))));

// Vectors are passed by reference: passing them by value would depend on the instruction set of the caller.
BEBOP_ALWAYS_INLINE void Load(const float* source, Floats* vector) { std::memcpy(vector, source, sizeof(*vector)); }
BEBOP_ALWAYS_INLINE void Store(const Floats& vector, float* destination) {
  std::memcpy(destination, &vector, sizeof(vector));
}
// The last, partial vector of a block: missing lanes get `fill`.
BEBOP_ALWAYS_INLINE void LoadPartial(const float* source, int32_t count, float fill, Floats* vector) {
  float lanes[kLanes];
  for (int32_t i = 0; i < kLanes; ++i) lanes[i] = i < count ? source[i] : fill;
  Load(lanes, vector);
}
// Halving sum: the fixed order that TokenDistribution documents.
BEBOP_ALWAYS_INLINE double ReduceAdd(const Doubles& vector) {
  double lanes[kLanes];
  std::memcpy(lanes, &vector, sizeof(vector));
  for (int32_t half = kLanes / 2; half > 0; half /= 2) {
    for (int32_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// exp(x) for x <= 0 (also -inf) to 2 ulp; 0 below log(2^-126). Cody-Waite reduction x = n log 2 + r, |r| <= log(2)/2, then the
// degree-6 Taylor polynomial of e^r (remainder r^7/5040 < 1.2e-7 relative, under an ulp) and 2^n through the exponent bits.
BEBOP_ALWAYS_INLINE void FastExp(const Floats& x, Floats* result) {
  constexpr float kLog2E = 1.44269504f, kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kSmallest = -87.3365402f;  // the last float whose exp is normal
  const Floats clamped = x < kSmallest ? Floats{} + kSmallest : x;
  const Floats shifted = clamped * kLog2E + kRounder;
  const Floats n = shifted - kRounder;
  const Floats r = (clamped - n * kLn2High) - n * kLn2Low;
  Floats polynomial = r * (1.0f / 720.0f) + (1.0f / 120.0f);
  polynomial = polynomial * r + (1.0f / 24.0f);
  polynomial = polynomial * r + (1.0f / 6.0f);
  polynomial = polynomial * r + 0.5f;
  polynomial = (polynomial * (r * r) + r) + 1.0f;
  Ints bits, exponent;
  std::memcpy(&bits, &polynomial, sizeof(bits));
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  bits += exponent << 23;  // the rounder's own bits leave at the top
  Floats scaled;
  std::memcpy(&scaled, &bits, sizeof(scaled));
  *result = x < kSmallest ? Floats{} : scaled;
}

// log(w) for normal w > 0, about 1e-7 relative and exactly 0 at 1; 0 for w = 0 (its only use is w log w).
// w = 2^n m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s), s = (m-1)/(m+1), |s| < 0.1716, by its odd series up to s^9.
BEBOP_ALWAYS_INLINE void FastLog(const Floats& w, Floats* result) {
  Ints bits;
  std::memcpy(&bits, &w, sizeof(bits));
  const Ints n = (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3: sqrt(1/2)
  bits -= n << 23;
  Floats m;
  std::memcpy(&m, &bits, sizeof(m));
  const Floats s = (m - 1.0f) / (m + 1.0f);
  const Floats s2 = s * s;
  Floats series = s2 * (2.0f / 9.0f) + (2.0f / 7.0f);
  series = series * s2 + (2.0f / 5.0f);
  series = series * s2 + (2.0f / 3.0f);
  series = series * s2 + 2.0f;
  const Floats exponent = __builtin_convertvector(n, Floats);
  const Floats value = exponent * 0.693359375f + (series * s + exponent * -2.12194440e-4f);
  *result = w > 0.0f ? value : Floats{};
}

struct BlockMax {
  float max;
  bool unusable;  // NaN or +inf
};

BEBOP_SAMPLING_CLONES BlockMax MaxOfBlock(const float* logits, int32_t count) {
  Floats max = Floats{} - kInfinity;
  Ints usable = ~Ints{};
  const int32_t whole = count / kLanes * kLanes;
  for (int32_t i = 0; i < whole; i += kLanes) {
    Floats logit;
    Load(logits + i, &logit);
    usable &= logit < kInfinity;
    max = logit > max ? logit : max;
  }
  if (whole < count) {
    Floats logit;
    LoadPartial(logits + whole, count - whole, -kInfinity, &logit);
    usable &= logit < kInfinity;
    max = logit > max ? logit : max;
  }
  BlockMax result{-kInfinity, false};
  for (int32_t i = 0; i < kLanes; ++i) {
    result.max = std::max(result.max, max[i]);
    result.unusable |= usable[i] == 0;
  }
  return result;
}

// weight = exp((logit - max) * scale), 0 where logit < logit_floor or weight < weight_floor; returns the block's sum.
// logits and weight may be the same array.
BEBOP_SAMPLING_CLONES double ExpBlock(const float* logits, int32_t count, float max, float scale, float logit_floor,
                                      float weight_floor, float* weight) {
  Doubles sum{};
  const auto step = [&](const Floats& logit, Floats* result) __attribute__((always_inline)) {
    FastExp((logit - max) * scale, result);
    *result = logit < logit_floor ? Floats{} : *result;
    *result = *result < weight_floor ? Floats{} : *result;
    sum += __builtin_convertvector(*result, Doubles);
  };
  const int32_t whole = count / kLanes * kLanes;
  Floats logit, result;
  for (int32_t i = 0; i < whole; i += kLanes) {
    Load(logits + i, &logit);
    step(logit, &result);
    Store(result, weight + i);
  }
  if (whole < count) {
    LoadPartial(logits + whole, count - whole, -kInfinity, &logit);
    step(logit, &result);
    for (int32_t i = whole; i < count; ++i) weight[i] = result[i - whole];
  }
  return ReduceAdd(sum);
}

struct ExpSums {
  double sum;           // Σ w
  double weighted_log;  // Σ w log w
};

// The sums of ExpBlock without storing weights.
BEBOP_SAMPLING_CLONES ExpSums SumExpBlock(const float* logits, int32_t count, float max, float scale) {
  Doubles sum{}, weighted_log{};
  const auto step = [&](const Floats& logit) __attribute__((always_inline)) {
    const Floats x = (logit - max) * scale;
    Floats weight;
    FastExp(x, &weight);
    sum += __builtin_convertvector(weight, Doubles);
    const Floats product = weight > 0.0f ? weight * x : Floats{};  // 0 * -inf
    weighted_log += __builtin_convertvector(product, Doubles);
  };
  const int32_t whole = count / kLanes * kLanes;
  Floats logit;
  for (int32_t i = 0; i < whole; i += kLanes) {
    Load(logits + i, &logit);
    step(logit);
  }
  if (whole < count) {
    LoadPartial(logits + whole, count - whole, -kInfinity, &logit);
    step(logit);
  }
  return {ReduceAdd(sum), ReduceAdd(weighted_log)};
}

// Zeroes weights under `floor`; returns the sum of the rest.
BEBOP_SAMPLING_CLONES double FilterBlock(float* weight, int32_t count, float floor) {
  Doubles sum{};
  const int32_t whole = count / kLanes * kLanes;
  Floats value;
  for (int32_t i = 0; i < whole; i += kLanes) {
    Load(weight + i, &value);
    value = value < floor ? Floats{} : value;
    sum += __builtin_convertvector(value, Doubles);
    Store(value, weight + i);
  }
  if (whole < count) {
    LoadPartial(weight + whole, count - whole, 0.0f, &value);
    value = value < floor ? Floats{} : value;
    sum += __builtin_convertvector(value, Doubles);
    for (int32_t i = whole; i < count; ++i) weight[i] = value[i - whole];
  }
  return ReduceAdd(sum);
}

// How many of the values are >= threshold.
BEBOP_SAMPLING_CLONES int32_t CountAtLeast(const float* values, int32_t count, float threshold) {
  Ints matches{};
  const int32_t whole = count / kLanes * kLanes;
  Floats value;
  for (int32_t i = 0; i < whole; i += kLanes) {
    Load(values + i, &value);
    matches -= value >= threshold;  // a true lane is -1
  }
  int32_t total = 0;
  for (int32_t i = 0; i < kLanes; ++i) total += matches[i];
  for (int32_t i = whole; i < count; ++i) total += values[i] >= threshold;
  return total;
}

// Σ of the values >= threshold (all values >= 0).
BEBOP_SAMPLING_CLONES double MassAtLeast(const float* values, int32_t count, float threshold) {
  Doubles sum{};
  const int32_t whole = count / kLanes * kLanes;
  Floats value;
  for (int32_t i = 0; i < whole; i += kLanes) {
    Load(values + i, &value);
    value = value < threshold ? Floats{} : value;
    sum += __builtin_convertvector(value, Doubles);
  }
  if (whole < count) {
    LoadPartial(values + whole, count - whole, 0.0f, &value);
    value = value < threshold ? Floats{} : value;
    sum += __builtin_convertvector(value, Doubles);
  }
  return ReduceAdd(sum);
}

// Copies the values >= threshold to `out`, in order; returns how many. out may hold `count` values.
int32_t Compact(const float* values, int32_t count, float threshold, float* out) {
  int32_t kept = 0;
  for (int32_t i = 0; i < count; ++i) {
    out[kept] = values[i];
    kept += values[i] >= threshold;
  }
  return kept;
}

// Σ max(0, p - q) of a block, p = target_weight * target_scale, q = draft_weight * draft_scale.
BEBOP_SAMPLING_CLONES double ResidualBlock(const float* target_weight, const float* draft_weight, int32_t count,
                                           double target_scale, double draft_scale) {
  Doubles sum{};
  const auto step = [&](const Floats& target, const Floats& draft) __attribute__((always_inline)) {
    const Doubles excess =
        __builtin_convertvector(target, Doubles) * target_scale - __builtin_convertvector(draft, Doubles) * draft_scale;
    sum += excess > 0.0 ? excess : Doubles{};
  };
  const int32_t whole = count / kLanes * kLanes;
  Floats target, draft;
  for (int32_t i = 0; i < whole; i += kLanes) {
    Load(target_weight + i, &target);
    Load(draft_weight + i, &draft);
    step(target, draft);
  }
  if (whole < count) {
    LoadPartial(target_weight + whole, count - whole, 0.0f, &target);
    LoadPartial(draft_weight + whole, count - whole, 0.0f, &draft);
    step(target, draft);
  }
  return ReduceAdd(sum);
}

// Σ min(p, q) of a block.
BEBOP_SAMPLING_CLONES double OverlapBlock(const float* target_weight, const float* draft_weight, int32_t count,
                                          double target_scale, double draft_scale) {
  Doubles sum{};
  const auto step = [&](const Floats& target, const Floats& draft) __attribute__((always_inline)) {
    const Doubles target_prob = __builtin_convertvector(target, Doubles) * target_scale;
    const Doubles draft_prob = __builtin_convertvector(draft, Doubles) * draft_scale;
    sum += target_prob < draft_prob ? target_prob : draft_prob;
  };
  const int32_t whole = count / kLanes * kLanes;
  Floats target, draft;
  for (int32_t i = 0; i < whole; i += kLanes) {
    Load(target_weight + i, &target);
    Load(draft_weight + i, &draft);
    step(target, draft);
  }
  if (whole < count) {
    LoadPartial(target_weight + whole, count - whole, 0.0f, &target);
    LoadPartial(draft_weight + whole, count - whole, 0.0f, &draft);
    step(target, draft);
  }
  return ReduceAdd(sum);
}

// Σ w log w of a block.
BEBOP_SAMPLING_CLONES double WeightedLogBlock(const float* weight, int32_t count) {
  Doubles sum{};
  const int32_t whole = count / kLanes * kLanes;
  Floats value, log_value;
  for (int32_t i = 0; i < whole; i += kLanes) {
    Load(weight + i, &value);
    FastLog(value, &log_value);
    sum += __builtin_convertvector(value * log_value, Doubles);
  }
  if (whole < count) {
    LoadPartial(weight + whole, count - whole, 0.0f, &value);
    FastLog(value, &log_value);
    sum += __builtin_convertvector(value * log_value, Doubles);
  }
  return ReduceAdd(sum);
}

constexpr int32_t kPhiloxBatch = 16;                     // Philox blocks computed side by side
constexpr int32_t kNoiseBatch = 4 * kPhiloxBatch;        // ids they serve
constexpr uint32_t kLowWordLane = 0x80000000u;           // lanes of the low noise words
static_assert(kSamplingBlock % kNoiseBatch == 0);

// The high noise words of ids [first_id, first_id + 64): high[4 i + w] = word w of lane first_id/4 + i. Same function as Philox4x32,
// laid out for the vectoriser.
BEBOP_SAMPLING_CLONES bool NoiseCandidates(const RandomKey& key, uint32_t first_id, const float* weight, float limit,
                                           uint32_t* high) {
  uint32_t counter[4][kPhiloxBatch];
  for (int32_t i = 0; i < kPhiloxBatch; ++i) {
    counter[0][i] = key.position;
    counter[1][i] = key.sample_index;
    counter[2][i] = static_cast<uint32_t>(DrawPurpose::kCoupled);
    counter[3][i] = first_id / 4 + static_cast<uint32_t>(i);
  }
  uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
  for (int32_t round = 0; round < 10; ++round) {
    for (int32_t i = 0; i < kPhiloxBatch; ++i) {
      const uint64_t product0 = uint64_t{0xD2511F53u} * counter[0][i];
      const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter[2][i];
      counter[0][i] = static_cast<uint32_t>(product1 >> 32) ^ counter[1][i] ^ key0;
      counter[1][i] = static_cast<uint32_t>(product1);
      counter[2][i] = static_cast<uint32_t>(product0 >> 32) ^ counter[3][i] ^ key1;
      counter[3][i] = static_cast<uint32_t>(product0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int32_t i = 0; i < kPhiloxBatch; ++i) {
    for (int32_t word = 0; word < 4; ++word) high[4 * i + word] = counter[word][i];
  }
  int32_t any = 0;
  for (int32_t i = 0; i < kNoiseBatch; ++i) any |= static_cast<float>(high[i] >> 1) < weight[i] * limit;
  return any != 0;
}

double ExponentialFromWords(uint32_t high, uint32_t low) {
  const uint64_t bits = static_cast<uint64_t>(high) << 21 | low >> 11;
  return -std::log1p(-(static_cast<double>(bits) + 0.5) * 0x1.0p-53);
}

int32_t BlockCount(int32_t vocab_size, int32_t block) {
  return std::min(kSamplingBlock, vocab_size - block * kSamplingBlock);
}

// Floats as integers in the same order, for bisection over all values.
uint32_t OrderedBits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
float FromOrderedBits(uint32_t ordered) {
  return std::bit_cast<float>(ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered);
}

// The largest float t in [low, high] with enough(t), where enough is monotone (true below some value) and enough(low) holds.
template <typename Enough>
float LargestThreshold(float low, float high, Enough&& enough) {
  uint32_t yes = OrderedBits(low), no = OrderedBits(high) + 1;
  while (no - yes > 1) {
    const uint32_t middle = yes + (no - yes) / 2;
    (enough(FromOrderedBits(middle)) ? yes : no) = middle;
  }
  return FromOrderedBits(yes);
}

// The k-th largest logit. block_max: largest logit of each block. If k <= number of blocks, the k-th largest block maximum bounds the
// answer from below, which leaves few candidates to search.
float KthLargest(const float* logits, int32_t vocab_size, int32_t k, float max, const double* block_max, float* scratch) {
  float low = -kInfinity;
  const int32_t num_blocks = NumSamplingBlocks(vocab_size);
  if (k <= num_blocks) {
    for (int32_t block = 0; block < num_blocks; ++block) scratch[block] = static_cast<float>(block_max[block]);
    std::nth_element(scratch, scratch + (k - 1), scratch + num_blocks, std::greater<float>());
    low = scratch[k - 1];
  }
  const int32_t num_candidates = Compact(logits, vocab_size, low, scratch);
  return LargestThreshold(low, max, [&](float t) { return CountAtLeast(scratch, num_candidates, t) >= k; });
}

// Keeps the smallest set in descending order whose mass reaches top_p * total, and of those the weights >= min_p. Equal weights at the
// border: argmax first, then ascending ids.
void TruncateTopP(float top_p, float min_p, float* scratch, TokenDistribution* out) {
  const double goal = static_cast<double>(top_p) * out->total;
  // All weights under (1 - top_p) total / V together weigh less than (1 - top_p) total, so the border lies above them. Half of that
  // absorbs rounding.
  const float low = std::max(static_cast<float>(0.5 * (1.0 - static_cast<double>(top_p)) * out->total / out->vocab_size),
                             std::numeric_limits<float>::min());
  const int32_t num_candidates = Compact(out->weight, out->vocab_size, low, scratch);
  const float border =
      LargestThreshold(low, 1.0f, [&](float t) { return MassAtLeast(scratch, num_candidates, t) >= goal; });
  const float above = std::nextafter(border, kInfinity);
  const int32_t num_ties = CountAtLeast(scratch, num_candidates, border) - CountAtLeast(scratch, num_candidates, above);
  double missing_ties = std::ceil((goal - MassAtLeast(scratch, num_candidates, above)) / static_cast<double>(border));
  if (missing_ties < num_ties) {
    int32_t left = std::max(1, static_cast<int32_t>(missing_ties));
    if (out->weight[out->argmax] == border) --left;
    for (int32_t id = 0; id < out->vocab_size; ++id) {
      if (out->weight[id] != border || static_cast<uint32_t>(id) == out->argmax) continue;
      if (left > 0) {
        --left;
      } else {
        out->weight[id] = 0.0f;
      }
    }
  }
  const float floor = std::max(border, min_p);
  for (int32_t block = 0; block < NumSamplingBlocks(out->vocab_size); ++block) {
    out->block_sum[block] =
        FilterBlock(out->weight + block * kSamplingBlock, BlockCount(out->vocab_size, block), floor);
  }
}

double SumBlocks(const TokenDistribution& distribution) {
  double total = 0.0;
  for (int32_t block = 0; block < NumSamplingBlocks(distribution.vocab_size); ++block) {
    total += distribution.block_sum[block];
  }
  return total;
}

// The id of a block whose cumulative mass first exceeds u * block_mass; mass_of(id) >= 0. Rounding can leave the sum short: then the
// last id with mass.
template <typename MassOf>
uint32_t PickInBlock(int32_t block, int32_t count, double block_mass, double u, MassOf&& mass_of) {
  const uint32_t first = static_cast<uint32_t>(block) * kSamplingBlock;
  const double goal = u * block_mass;
  double cumulative = 0.0;
  uint32_t last = first;
  for (uint32_t id = first; id < first + static_cast<uint32_t>(count); ++id) {
    const double mass = mass_of(id);
    if (!(mass > 0.0)) continue;
    cumulative += mass;
    last = id;
    if (cumulative > goal) break;
  }
  return last;
}

// The first block whose cumulative mass exceeds u * total, total = the same sums in the same order. Blocks without mass are never
// taken; rounding cannot run past the last block with mass, as u * total < total.
template <typename MassOf>
int32_t PickBlock(int32_t num_blocks, double total, double u, double* block_mass, MassOf&& mass_of) {
  const double goal = u * total;
  double cumulative = 0.0;
  int32_t last = 0;
  for (int32_t block = 0; block < num_blocks; ++block) {
    const double mass = mass_of(block);
    if (!(mass > 0.0)) continue;
    cumulative += mass;
    last = block;
    *block_mass = mass;
    if (cumulative > goal) break;
  }
  return last;
}

}  // namespace

void Transform(const TransformArgs& args, TokenDistribution* out) {
  const int32_t vocab_size = args.vocab_size;
  const int32_t num_blocks = NumSamplingBlocks(vocab_size);
  BEBOP_DCHECK(vocab_size >= 1 && args.temperature >= 0.0f && args.top_k >= 0);
  out->vocab_size = vocab_size;
  out->finite = false;
  bool unusable = false;

  // Raw pass, only where the raw sum is not the processed one.
  const bool plain_raw = args.temperature == 1.0f && args.banned_ids.empty();
  if (args.want_raw_lse && !plain_raw) {
    const LogitSummary raw = Summarize(args.logits, vocab_size, 1.0f, /*want_entropy=*/false);
    if (!raw.finite) return;
    out->raw_lse = raw.log_normalizer;
  }

  // Bans work on a copy, which the exponential then replaces in place.
  const float* logits = args.logits;
  if (!args.banned_ids.empty()) {
    std::memcpy(out->weight, args.logits, sizeof(float) * static_cast<size_t>(vocab_size));
    for (const uint32_t id : args.banned_ids) {
      if (id >= static_cast<uint32_t>(vocab_size)) continue;
      unusable |= !(args.logits[id] < kInfinity);  // a ban does not hide a broken row
      out->weight[id] = -kInfinity;
    }
    logits = out->weight;
  }

  float max = -kInfinity;
  int32_t max_block = 0;
  for (int32_t block = 0; block < num_blocks; ++block) {
    const BlockMax result = MaxOfBlock(logits + block * kSamplingBlock, BlockCount(vocab_size, block));
    unusable |= result.unusable;
    out->block_sum[block] = result.max;  // lent to KthLargest
    if (result.max > max) {
      max = result.max;
      max_block = block;
    }
  }
  if (unusable || max == -kInfinity) return;
  out->argmax = static_cast<uint32_t>(max_block) * kSamplingBlock;
  while (logits[out->argmax] != max) ++out->argmax;
  out->finite = true;

  if (args.temperature == 0.0f) {
    std::fill_n(out->weight, vocab_size, 0.0f);
    std::fill_n(out->block_sum, num_blocks, 0.0);
    out->weight[out->argmax] = 1.0f;
    out->block_sum[out->argmax / kSamplingBlock] = 1.0;
    out->total = 1.0;
    return;
  }

  float logit_floor = -kInfinity;
  const bool truncate_k = args.top_k > 0 && args.top_k < vocab_size;
  const bool truncate_p = args.top_p < 1.0f;
  if (truncate_k) {
    BEBOP_DCHECK(args.scratch != nullptr);
    logit_floor = KthLargest(logits, vocab_size, args.top_k, max, out->block_sum, args.scratch);
  }
  // A temperature so small that its inverse overflows still leaves exactly the ties of the maximum.
  const float scale = std::min(1.0f / args.temperature, std::numeric_limits<float>::max());
  const bool raw_from_here = args.want_raw_lse && plain_raw;
  if (raw_from_here && (truncate_k || args.min_p > 0.0f)) {
    double raw_total = 0.0;
    for (int32_t block = 0; block < num_blocks; ++block) {
      raw_total += SumExpBlock(logits + block * kSamplingBlock, BlockCount(vocab_size, block), max, 1.0f).sum;
    }
    out->raw_lse = static_cast<double>(max) + std::log(raw_total);
  }
  const float weight_floor = truncate_p ? 0.0f : args.min_p;
  for (int32_t block = 0; block < num_blocks; ++block) {
    const int32_t first = block * kSamplingBlock;
    out->block_sum[block] =
        ExpBlock(logits + first, BlockCount(vocab_size, block), max, scale, logit_floor, weight_floor, out->weight + first);
  }
  out->total = SumBlocks(*out);
  if (raw_from_here && !truncate_k && !(args.min_p > 0.0f)) {
    out->raw_lse = static_cast<double>(max) + std::log(out->total);
  }
  if (truncate_p) {
    BEBOP_DCHECK(args.scratch != nullptr);
    TruncateTopP(args.top_p, args.min_p, args.scratch, out);
    out->total = SumBlocks(*out);
  }
}

uint32_t SampleInverseCdf(const TokenDistribution& distribution, double u_block, double u_within) {
  double block_mass = 0.0;
  const int32_t block = PickBlock(NumSamplingBlocks(distribution.vocab_size), distribution.total, u_block, &block_mass,
                                  [&](int32_t j) { return distribution.block_sum[j]; });
  return PickInBlock(block, BlockCount(distribution.vocab_size, block), block_mass, u_within,
                     [&](uint32_t id) { return static_cast<double>(distribution.weight[id]); });
}

uint32_t SampleResidual(const TokenDistribution& target, const TokenDistribution& draft, double u_block, double u_within) {
  BEBOP_DCHECK(target.vocab_size == draft.vocab_size);
  const int32_t vocab_size = target.vocab_size;
  const double target_scale = 1.0 / target.total, draft_scale = 1.0 / draft.total;
  const auto block_residual = [&](int32_t block) {
    if (target.block_sum[block] == 0.0) return 0.0;
    const int32_t first = block * kSamplingBlock;
    return ResidualBlock(target.weight + first, draft.weight + first, BlockCount(vocab_size, block), target_scale, draft_scale);
  };
  const int32_t num_blocks = NumSamplingBlocks(vocab_size);
  double total = 0.0;
  for (int32_t block = 0; block < num_blocks; ++block) total += block_residual(block);
  if (!(total > 0.0)) return SampleInverseCdf(target, u_block, u_within);
  // Block sums are computed again rather than stored: no storage, same bits, and half a pass on average.
  double block_mass = 0.0;
  const int32_t block = PickBlock(num_blocks, total, u_block, &block_mass, block_residual);
  return PickInBlock(block, BlockCount(vocab_size, block), block_mass, u_within, [&](uint32_t id) {
    return static_cast<double>(target.weight[id]) * target_scale - static_cast<double>(draft.weight[id]) * draft_scale;
  });
}

uint32_t SampleExcluding(const TokenDistribution& target, uint32_t excluded, double u_block, double u_within) {
  // The excluded id's block is summed anew: subtracting a weight near the total would leave only rounding.
  const int32_t excluded_block = static_cast<int32_t>(excluded / kSamplingBlock);
  const auto mass_of = [&](uint32_t id) { return id == excluded ? 0.0 : static_cast<double>(target.weight[id]); };
  double rest_of_block = 0.0;
  const uint32_t first = static_cast<uint32_t>(excluded_block) * kSamplingBlock;
  for (int32_t i = 0; i < BlockCount(target.vocab_size, excluded_block); ++i) {
    rest_of_block += mass_of(first + static_cast<uint32_t>(i));
  }
  const auto block_rest = [&](int32_t block) { return block == excluded_block ? rest_of_block : target.block_sum[block]; };
  const int32_t num_blocks = NumSamplingBlocks(target.vocab_size);
  double total = 0.0;
  for (int32_t block = 0; block < num_blocks; ++block) total += block_rest(block);
  if (!(total > 0.0)) return SampleInverseCdf(target, u_block, u_within);
  double block_mass = 0.0;
  const int32_t block = PickBlock(num_blocks, total, u_block, &block_mass, block_rest);
  return PickInBlock(block, BlockCount(target.vocab_size, block), block_mass, u_within, mass_of);
}

double CoupledExponential(const RandomKey& key, uint32_t id) {
  const auto words = [&](uint32_t lane) {
    return Philox4x32(key.seed, {key.position, key.sample_index, static_cast<uint32_t>(DrawPurpose::kCoupled), lane});
  };
  return ExponentialFromWords(words(id / 4)[id % 4], words(id / 4 + kLowWordLane)[id % 4]);
}

uint32_t SampleGumbel(const TokenDistribution& distribution, const RandomKey& key) {
  uint32_t best_id = distribution.argmax;
  double best = CoupledExponential(key, best_id) / static_cast<double>(distribution.weight[best_id]);
  const auto consider = [&](uint32_t id) {
    const double candidate = CoupledExponential(key, id) / static_cast<double>(distribution.weight[id]);
    if (candidate < best || (candidate == best && id < best_id)) {
      best = candidate;
      best_id = id;
    }
  };
  // E > c >= high 2^-32, so an id can only win when high 2^-32 < best * weight: one comparison in place of a logarithm. The slack
  // covers float rounding; the kernel compares high / 2.
  const auto limit = [&] { return static_cast<float>(std::min(best * 0x1.0p31 * 1.00001, 1e30)); };
  for (int32_t block = 0; block < NumSamplingBlocks(distribution.vocab_size); ++block) {
    // E > 2^-54 for all ids, so a block this light cannot hold a winner.
    if (!(best * distribution.block_sum[block] >= 0x1.0p-54)) continue;
    const int32_t first = block * kSamplingBlock;
    const int32_t count = BlockCount(distribution.vocab_size, block);
    for (int32_t i = 0; i < count; i += kNoiseBatch) {
      uint32_t high[kNoiseBatch];
      const float* weight = distribution.weight + first + i;
      float padded[kNoiseBatch];
      if (count - i < kNoiseBatch) {
        std::fill(std::copy_n(weight, count - i, padded), padded + kNoiseBatch, 0.0f);
        weight = padded;
      }
      const float current = limit();
      if (!NoiseCandidates(key, static_cast<uint32_t>(first + i), weight, current, high)) continue;
      for (int32_t j = 0; j < kNoiseBatch; ++j) {
        if (static_cast<float>(high[j] >> 1) < weight[j] * current) consider(static_cast<uint32_t>(first + i + j));
      }
    }
  }
  return best_id;
}

double Entropy(const TokenDistribution& distribution) {
  double weighted_log = 0.0;
  for (int32_t block = 0; block < NumSamplingBlocks(distribution.vocab_size); ++block) {
    weighted_log +=
        WeightedLogBlock(distribution.weight + block * kSamplingBlock, BlockCount(distribution.vocab_size, block));
  }
  return std::max(0.0, std::log(distribution.total) - weighted_log / distribution.total);
}

double Overlap(const TokenDistribution& target, const TokenDistribution& draft) {
  BEBOP_DCHECK(target.vocab_size == draft.vocab_size);
  double sum = 0.0;
  for (int32_t block = 0; block < NumSamplingBlocks(target.vocab_size); ++block) {
    if (target.block_sum[block] == 0.0 || draft.block_sum[block] == 0.0) continue;
    const int32_t first = block * kSamplingBlock;
    sum += OverlapBlock(target.weight + first, draft.weight + first, BlockCount(target.vocab_size, block), 1.0 / target.total,
                        1.0 / draft.total);
  }
  return sum;
}

double CoupledOverlap(const TokenDistribution& target, const TokenDistribution& draft) {
  BEBOP_DCHECK(target.vocab_size == draft.vocab_size);
  // With r = p_v / q_v, Σ_u max(p_u / p_v, q_u / q_v) = (Σ_{p_u/q_u >= r} p_u + r Σ_{p_u/q_u < r} q_u) / p_v: two running sums over
  // the ids in descending order of p/q.
  struct Entry {
    double ratio, target_prob, draft_prob;
  };
  thread_local std::vector<Entry> entries;  // kept between calls: no allocation once grown
  entries.clear();
  const double least = 1e-9 / target.vocab_size;
  double draft_below = 0.0;  // Σ q over ids whose ratio lies below the current one
  for (int32_t id = 0; id < target.vocab_size; ++id) {
    const double target_prob = static_cast<double>(target.weight[id]) / target.total;
    const double draft_prob = static_cast<double>(draft.weight[id]) / draft.total;
    if (target_prob < least && draft_prob < least) continue;
    entries.push_back({target_prob / draft_prob, target_prob, draft_prob});  // q = 0: +inf, never below any r
    draft_below += draft_prob;
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.ratio > b.ratio; });
  double target_at_or_above = 0.0, acceptance = 0.0;
  for (const Entry& entry : entries) {
    target_at_or_above += entry.target_prob;
    draft_below -= entry.draft_prob;
    if (entry.target_prob == 0.0 || entry.draft_prob == 0.0) continue;
    // Ids of equal ratio may stand on either side: p_u = r q_u.
    acceptance += entry.target_prob / (target_at_or_above + entry.ratio * std::max(draft_below, 0.0));
  }
  return std::min(acceptance, 1.0);
}

LogitSummary Summarize(const float* logits, int32_t vocab_size, float temperature, bool want_entropy) {
  LogitSummary summary;
  float max = -kInfinity;
  int32_t max_block = 0;
  const int32_t num_blocks = NumSamplingBlocks(vocab_size);
  for (int32_t block = 0; block < num_blocks; ++block) {
    const BlockMax result = MaxOfBlock(logits + block * kSamplingBlock, BlockCount(vocab_size, block));
    if (result.unusable) return summary;
    if (result.max > max) {
      max = result.max;
      max_block = block;
    }
  }
  if (max == -kInfinity) return summary;
  summary.argmax = static_cast<uint32_t>(max_block) * kSamplingBlock;
  while (logits[summary.argmax] != max) ++summary.argmax;
  const float scale = std::min(1.0f / temperature, std::numeric_limits<float>::max());
  double sum = 0.0, weighted_log = 0.0;
  for (int32_t block = 0; block < num_blocks; ++block) {
    const ExpSums sums = SumExpBlock(logits + block * kSamplingBlock, BlockCount(vocab_size, block), max, scale);
    sum += sums.sum;
    weighted_log += sums.weighted_log;
  }
  summary.inverse_temperature = scale;
  summary.log_normalizer = static_cast<double>(max) * scale + std::log(sum);
  if (want_entropy) summary.entropy = std::max(0.0, std::log(sum) - weighted_log / sum);
  summary.finite = true;
  return summary;
}

int32_t TopLogits(const float* logits, int32_t vocab_size, int32_t count, uint32_t* ids) {
  count = std::min(count, vocab_size);
  int32_t size = 0;
  for (int32_t id = 0; id < vocab_size && count > 0; ++id) {
    const float logit = logits[id];
    if (size == count && !(logit > logits[ids[size - 1]])) continue;
    int32_t place = size < count ? size++ : size - 1;
    for (; place > 0 && logit > logits[ids[place - 1]]; --place) ids[place] = ids[place - 1];
    ids[place] = static_cast<uint32_t>(id);
  }
  return size;
}

}  // namespace bebop::cpu
