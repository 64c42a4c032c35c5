// SPDX-License-Identifier: Apache-2.0
// Sampling on the CPU: everything but the vocabulary passes themselves, which sampling_kernels.h describes.
#include "kernels/sampling/sampling.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/sampling/sampling_kernels.h"

namespace bebop::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The table for this processor.
const SamplingKernels& Kernels() {
  static const SamplingKernels& kernels = SamplingKernelsFor(DetectInstructionSet());
  return kernels;
}

// Appends the values >= threshold to out[kept..], in order; returns the new size. out[kept, kept + count) is overwritten. Groups
// without such a value, the common case, cost one vector comparison.
int32_t Compact(const float* values, int32_t count, float threshold, float* out, int32_t kept) {
  constexpr int32_t kGroup = 16;
  for (int32_t first = 0; first < count; first += kGroup) {
    const int32_t end = std::min(first + kGroup, count);
    int32_t any = 0;
    for (int32_t i = first; i < end; ++i) any |= values[i] >= threshold;
    if (any == 0) continue;
    for (int32_t i = first; i < end; ++i) {  // no branch: which values pass is unpredictable
      out[kept] = values[i];
      kept += values[i] >= threshold;
    }
  }
  return kept;
}

double ExponentialFromWords(uint32_t high, uint32_t low) {
  const uint64_t bits = static_cast<uint64_t>(high) << 21 | low >> 11;
  return -std::log1p(-(static_cast<double>(bits) + 0.5) * 0x1.0p-53);
}

int32_t BlockCount(int32_t vocab_size, int32_t block) { return std::min(kSamplingBlock, vocab_size - block * kSamplingBlock); }

// Floats as integers in the same order, for bisection over all values.
uint32_t OrderedBits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
float FromOrderedBits(uint32_t ordered) { return std::bit_cast<float>(ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered); }

// The largest float t in [low, high] for which measure(values >= t) reaches `goal`; REQUIRES that it does at t = low.
// measure(values, count, t) adds something up over the values >= t, so it falls with t: bisection over all floats, at most 32
// passes. Every few passes the values outside the remaining interval are dropped (below it) or counted for good (above it).
// Overwrites `values`.
template <typename Measure>
float LargestThreshold(float* values, int32_t count, float low, float high, double goal, Measure&& measure) {
  uint32_t yes = OrderedBits(low), no = OrderedBits(high) + 1;
  double above = 0.0;
  for (int32_t pass = 1; no - yes > 1; ++pass) {
    const uint32_t middle = yes + (no - yes) / 2;
    (above + measure(values, count, FromOrderedBits(middle)) >= goal ? yes : no) = middle;
    if (pass % 4 != 0 || count < kSamplingBlock) continue;
    const float least = FromOrderedBits(yes), most = FromOrderedBits(no);
    above += measure(values, count, most);
    int32_t kept = 0;
    for (int32_t i = 0; i < count; ++i) {
      const float value = values[i];
      values[kept] = value;
      kept += (value >= least) & (value < most);
    }
    count = kept;
  }
  return FromOrderedBits(yes);
}

// The k-th largest logit. block_max: largest logit of each block. If k <= number of blocks, the k-th largest block maximum bounds
// the answer from below, which leaves few candidates to search.
float KthLargest(const float* logits, int32_t vocab_size, int32_t k, float max, const double* block_max, float* scratch) {
  float low = -kInfinity;
  const int32_t num_blocks = NumSamplingBlocks(vocab_size);
  if (k <= num_blocks) {
    for (int32_t block = 0; block < num_blocks; ++block) scratch[block] = static_cast<float>(block_max[block]);
    std::nth_element(scratch, scratch + (k - 1), scratch + num_blocks, std::greater<float>());
    low = scratch[k - 1];
  }
  int32_t num_candidates = 0;
  for (int32_t block = 0; block < num_blocks; ++block) {
    if (block_max[block] < low) continue;
    num_candidates = Compact(logits + block * kSamplingBlock, BlockCount(vocab_size, block), low, scratch, num_candidates);
  }
  return LargestThreshold(scratch, num_candidates, low, max, k, Kernels().count_at_least);
}

// Keeps the smallest set in descending order whose mass reaches top_p * total, and of those the weights >= min_p. Equal weights
// at the border: argmax first, then ascending ids.
void TruncateTopP(float top_p, float min_p, float* scratch, TokenDistribution* out) {
  const double goal = static_cast<double>(top_p) * out->total;
  // All weights under (1 - top_p) total / V together weigh less than (1 - top_p) total, so the border lies above them. Half of
  // that absorbs rounding.
  const float low = std::max(static_cast<float>(0.5 * (1.0 - static_cast<double>(top_p)) * out->total / out->vocab_size),
                             std::numeric_limits<float>::min());
  const int32_t num_candidates = Compact(out->weight, out->vocab_size, low, scratch, 0);
  const float border = LargestThreshold(scratch, num_candidates, low, 1.0f, goal, Kernels().mass_at_least);
  const float above = std::nextafter(border, kInfinity);
  const int32_t num_ties = Kernels().count_at_least(out->weight, out->vocab_size, border) -
                           Kernels().count_at_least(out->weight, out->vocab_size, above);
  const double mass_above = Kernels().mass_at_least(out->weight, out->vocab_size, above);
  const double missing_ties = std::ceil((goal - mass_above) / static_cast<double>(border));
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
        Kernels().filter_block(out->weight + block * kSamplingBlock, BlockCount(out->vocab_size, block), floor);
  }
}

double SumBlocks(const TokenDistribution& distribution) {
  double total = 0.0;
  for (int32_t block = 0; block < NumSamplingBlocks(distribution.vocab_size); ++block) {
    total += distribution.block_sum[block];
  }
  return total;
}

// The id of a block whose cumulative mass first exceeds u * block_mass; mass_of(id) >= 0. Rounding can leave the sum short: then
// the last id with mass.
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

const SamplingKernels& SamplingKernelsFor(InstructionSet set) {
#if defined(__x86_64__)
  if (set >= InstructionSet::kAvx512) return Avx512SamplingKernels();
  if (set >= InstructionSet::kAvx2) return Avx2SamplingKernels();
#endif
  static_cast<void>(set);
  return PortableSamplingKernels();
}

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
    const BlockMax result = Kernels().max_of_block(logits + block * kSamplingBlock, BlockCount(vocab_size, block));
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
      raw_total += Kernels().sum_exp_block(logits + block * kSamplingBlock, BlockCount(vocab_size, block), max, 1.0f).sum;
    }
    out->raw_lse = static_cast<double>(max) + std::log(raw_total);
  }
  const float weight_floor = truncate_p ? 0.0f : args.min_p;
  for (int32_t block = 0; block < num_blocks; ++block) {
    const int32_t first = block * kSamplingBlock;
    out->block_sum[block] = Kernels().exp_block(logits + first, BlockCount(vocab_size, block), max, scale, logit_floor,
                                                weight_floor, out->weight + first);
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
    return Kernels().residual_block(target.weight + first, draft.weight + first, BlockCount(vocab_size, block), target_scale,
                                    draft_scale);
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
  const uint32_t lane = id / 64 * 16 + id % 16, word = id / 16 % 4;
  return ExponentialFromWords(words(lane)[word], words(lane + kLowWordLane)[word]);
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
    for (int32_t i = 0; i < count; i += kNoiseGroup) {
      uint32_t high[kNoiseGroup];
      const float* weight = distribution.weight + first + i;
      float padded[kNoiseGroup];
      if (count - i < kNoiseGroup) {
        std::fill(std::copy_n(weight, count - i, padded), padded + kNoiseGroup, 0.0f);
        weight = padded;
      }
      const float current = limit();
      if (!Kernels().noise_group(key.seed, key.position, key.sample_index, static_cast<uint32_t>(DrawPurpose::kCoupled),
                                 static_cast<uint32_t>(first + i) / 4, weight, current, high)) {
        continue;
      }
      for (int32_t j = 0; j < kNoiseGroup; ++j) {
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
        Kernels().weighted_log_block(distribution.weight + block * kSamplingBlock, BlockCount(distribution.vocab_size, block));
  }
  return std::max(0.0, std::log(distribution.total) - weighted_log / distribution.total);
}

double Overlap(const TokenDistribution& target, const TokenDistribution& draft) {
  BEBOP_DCHECK(target.vocab_size == draft.vocab_size);
  double sum = 0.0;
  for (int32_t block = 0; block < NumSamplingBlocks(target.vocab_size); ++block) {
    if (target.block_sum[block] == 0.0 || draft.block_sum[block] == 0.0) continue;
    const int32_t first = block * kSamplingBlock;
    sum += Kernels().overlap_block(target.weight + first, draft.weight + first, BlockCount(target.vocab_size, block),
                                   1.0 / target.total, 1.0 / draft.total);
  }
  return sum;
}

double CoupledOverlap(const TokenDistribution& target, const TokenDistribution& draft) {
  BEBOP_DCHECK(target.vocab_size == draft.vocab_size);
  // With r = p_v / q_v, Σ_u max(p_u / p_v, q_u / q_v) = (Σ_{p_u/q_u >= r} p_u + r Σ_{p_u/q_u < r} q_u) / p_v: two running sums
  // over the ids in descending order of p/q.
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
    const BlockMax result = Kernels().max_of_block(logits + block * kSamplingBlock, BlockCount(vocab_size, block));
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
    const ExpSums sums = Kernels().sum_exp_block(logits + block * kSamplingBlock, BlockCount(vocab_size, block), max, scale);
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
