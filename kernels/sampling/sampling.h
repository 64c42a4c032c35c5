// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <span>

#include "kernels/common/philox.h"

// From a row of logits to a token: the transform of algorithm.md section 2, the samplers over its result, and the scalars that
// are reported about it. Every function works on one row, allocates nothing (but for CoupledOverlap's per-thread scratch, kept),
// and may run on any thread: the executor spreads rows over its ThreadPool. All sums over the vocabulary are double, in an order
// that depends on V alone (see TokenDistribution), and the weights come from + - * and comparisons only, so that a row gives the
// same bits on every instruction set.

namespace bebop {

// Ids per block of the two-level inverse CDF (algorithm.md section 2): double block sums in ascending order, on every backend.
inline constexpr int32_t kSamplingBlock = 1024;
constexpr int32_t NumSamplingBlocks(int32_t vocab_size) { return (vocab_size + kSamplingBlock - 1) / kSamplingBlock; }

// A processed next-token distribution over V ids as unnormalised weights, borrowed storage:
//   prob(v) = weight[v] / total, weight[v] = exp((logit[v] - max_logit) / temperature) or 0 where the transform excludes v.
// The largest weight is exactly 1 and belongs to `argmax` (the lowest id on ties of the logits). Weights under 2^-126 are 0.
// block_sum[j] = Σ of the weights of block j in double, as 16 interleaved partial sums (partial l takes the ids with id mod 16 =
// l, in ascending order) that are then halved 16 -> 8 -> 4 -> 2 -> 1 by adding the upper half to the lower; total = Σ block_sum
// in ascending order. For greedy rows the distribution is one-hot at argmax. `finite` is false when the logits had NaN, +inf or
// nothing finite (all banned counts as that); the row is then unusable and everything else in the struct is unspecified.
struct TokenDistribution {
  float* weight = nullptr;      // [V]
  double* block_sum = nullptr;  // [NumSamplingBlocks(V)]
  int32_t vocab_size = 0;
  double total = 0.0;
  uint32_t argmax = 0;
  bool finite = false;
  // For the raw logits: raw log-probability of v = logit[v] - raw_lse (filled when asked for).
  double raw_lse = 0.0;

  double prob(uint32_t id) const { return static_cast<double>(weight[id]) / total; }
};

// The transform as plain numbers, in the order of algorithm.md section 2.
struct TransformArgs {
  const float* logits = nullptr;  // [V]; must not alias out->weight
  int32_t vocab_size = 0;         // V >= 1
  float temperature = 1.0f;       // finite, >= 0; 0: one-hot argmax
  int32_t top_k = 0;              // 0 (off) or more; ties at the k-th value stay
  float top_p = 1.0f;  // (0, 1]; 1: off. Equal weights: argmax first, then ascending ids; the id that crosses top_p stays
  float min_p = 0.0f;  // [0, 1]; keeps weight >= min_p * largest weight
  std::span<const uint32_t> banned_ids;  // get -inf before the temperature (min_new_tokens); ids >= V are ignored
  bool want_raw_lse = false;
  float* scratch = nullptr;  // [V]; only used when top_k or top_p truncate
};

// What log-probabilities and entropy are reported from: the same arguments, or at temperature 0 those of temperature 1 without
// truncation (bans stay). Greedy verification looks at `argmax` and `finite` alone, which are the same under both, so the
// executor may give Verify the report distribution of a greedy row and needs no second transform.
inline TransformArgs ReportTransformArgs(TransformArgs args) {
  if (args.temperature == 0.0f) {
    args.temperature = 1.0f;
    args.top_k = 0;
    args.top_p = 1.0f;
    args.min_p = 0.0f;
  }
  return args;
}

// log prob(id) of the processed distribution in nats; -inf where the transform excludes id.
inline double LogProb(const TokenDistribution& distribution, uint32_t id) {
  return std::log(static_cast<double>(distribution.weight[id])) - std::log(distribution.total);
}

// Log-probability of the raw logits: temperature 1, no truncation, nothing banned. REQUIRES: the transform ran with want_raw_lse.
inline double RawLogProb(const TokenDistribution& distribution, const float* logits, uint32_t id) {
  return static_cast<double>(logits[id]) - distribution.raw_lse;
}

// A row of logits divided by a temperature, summed up without storing weights: what Score needs.
struct LogitSummary {
  double log_normalizer = 0.0;  // log Σ exp(logit / temperature)
  double entropy = 0.0;         // nats, of softmax(logits / temperature)
  double inverse_temperature = 1.0;
  uint32_t argmax = 0;  // lowest id on ties
  bool finite = false;  // as in TokenDistribution; the rest is unspecified when false

  // Never -inf for a finite logit, however improbable (the weights of a TokenDistribution end at 2^-126).
  double LogProb(float logit) const { return static_cast<double>(logit) * inverse_temperature - log_normalizer; }
};

namespace cpu {

// Fills out->weight, block_sum and the scalars. out->weight and block_sum point to the caller's storage of size [V], [blocks].
// The exponential is a float polynomial (FastExp in sampling_kernels.inc): within 1 ulp of exp of its float argument.
void Transform(const TransformArgs& args, TokenDistribution* out);

// Two-level inverse CDF: block by `u_block`, id within the block by `u_within` (both in [0,1)). Never returns an id of weight 0.
uint32_t SampleInverseCdf(const TokenDistribution& distribution, double u_block, double u_within);
// From r(v) ∝ max(0, p(v) − q(v)) without materialising it; falls back to p when the residual mass is 0 by rounding.
uint32_t SampleResidual(const TokenDistribution& target, const TokenDistribution& draft, double u_block, double u_within);
// From p without `excluded`, renormalised (target-only's correction). Falls back to p when nothing else has weight (then a
// rejection has probability 0, but synthetic acceptance can ask).
uint32_t SampleExcluding(const TokenDistribution& target, uint32_t excluded, double u_block, double u_within);
// argmax_v log prob(v) + G_v with Gumbel noise keyed by (key, kCoupled, v): the coupled draft and the coupled target choice.
// Computed as argmin_v CoupledExponential(key, v) / weight[v] (G = -log E); lowest id on ties.
uint32_t SampleGumbel(const TokenDistribution& distribution, const RandomKey& key);
// The noise of one id: a unit exponential E = -log(1 - c), c a 53-bit uniform in (0,1). With id = 64 g + 16 w + i (w < 4, i < 16)
// the high 32 bits of c are word w of Philox lane 16 g + i, the low 21 bits the top of the same word of lane + 2^31.
double CoupledExponential(const RandomKey& key, uint32_t id);

double Entropy(const TokenDistribution& distribution);                            // nats
double Overlap(const TokenDistribution& target, const TokenDistribution& draft);  // Σ min(p, q)
// Acceptance probability of the coupled mode: Σ_v 1 / Σ_u max(p_u/p_v, q_u/q_v) over v with p_v, q_v > 0.
// Sorts ids by p/q; those with p and q both under 1e-9 / V are left out (error of the result under 2e-9). The only slow
// function here: up to 20 ms at V = 248,320.
double CoupledOverlap(const TokenDistribution& target, const TokenDistribution& draft);

// REQUIRES: temperature > 0 and finite.
LogitSummary Summarize(const float* logits, int32_t vocab_size, float temperature, bool want_entropy);
// The min(count, V) largest logits, descending, lowest id first on ties. ids: [count]; returns how many were written.
int32_t TopLogits(const float* logits, int32_t vocab_size, int32_t count, uint32_t* ids);

}  // namespace cpu
}  // namespace bebop
