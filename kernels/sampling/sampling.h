// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

#include "kernels/common/philox.h"

namespace bebop {

// Ids per block of the two-level inverse CDF (algorithm.md section 2): double block sums in ascending order, on every backend.
inline constexpr int32_t kSamplingBlock = 1024;
constexpr int32_t NumSamplingBlocks(int32_t vocab_size) { return (vocab_size + kSamplingBlock - 1) / kSamplingBlock; }

// A processed next-token distribution over V ids as unnormalised weights, borrowed storage:
//   prob(v) = weight[v] / total, weight[v] = exp((logit[v] - max_logit) / temperature) or 0 where the transform excludes v.
// block_sum[j] = Σ of the weights of block j in ascending order, in double; total = Σ block_sum in ascending order.
// For greedy rows the distribution is one-hot at argmax. `finite` is false when the logits had NaN, +inf or nothing finite; the row
// is then unusable and everything else in the struct is unspecified.
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
  const float* logits = nullptr;  // [V]
  int32_t vocab_size = 0;
  float temperature = 1.0f;  // 0: one-hot argmax
  int32_t top_k = 0;
  float top_p = 1.0f;
  float min_p = 0.0f;
  std::span<const uint32_t> banned_ids;  // get -inf before the temperature (min_new_tokens)
  bool want_raw_lse = false;
  float* scratch = nullptr;  // [V]; only used when top_k or top_p truncate
};

namespace cpu {

// Fills out->weight, block_sum and the scalars. out->weight and block_sum point to the caller's storage of size [V], [blocks].
void Transform(const TransformArgs& args, TokenDistribution* out);

// Two-level inverse CDF: block by `u_block`, id within the block by `u_within` (both in [0,1)). Never returns an id of weight 0.
uint32_t SampleInverseCdf(const TokenDistribution& distribution, double u_block, double u_within);
// From r(v) ∝ max(0, p(v) − q(v)) without materialising it; falls back to p when the residual mass is 0 by rounding.
uint32_t SampleResidual(const TokenDistribution& target, const TokenDistribution& draft, double u_block, double u_within);
// From p without `excluded`, renormalised (target-only's correction).
uint32_t SampleExcluding(const TokenDistribution& target, uint32_t excluded, double u_block, double u_within);
// argmax_v log prob(v) + G_v with Gumbel noise keyed by (key, kCoupled, v): the coupled draft and the coupled target choice.
uint32_t SampleGumbel(const TokenDistribution& distribution, const RandomKey& key);

double Entropy(const TokenDistribution& distribution);  // nats
double Overlap(const TokenDistribution& target, const TokenDistribution& draft);  // Σ min(p, q)
// Acceptance probability of the coupled mode: Σ_v 1 / Σ_u max(p_u/p_v, q_u/q_v) over v with p_v, q_v > 0.
double CoupledOverlap(const TokenDistribution& target, const TokenDistribution& draft);

}  // namespace cpu
}  // namespace bebop
