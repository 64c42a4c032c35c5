// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/cpu_features.h"

// The vocabulary passes of kernels/sampling, one table per instruction set. Internal to the folder and its tests.
//
// Every pass works on one block of at most kSamplingBlock ids and does the same IEEE operations in the same order on every
// instruction set (no contraction: the build sets -ffp-contract=off): the tables agree bit for bit. Sums are 16 interleaved
// partial sums in double, halved at the end, as TokenDistribution documents.
namespace bebop::cpu {

inline constexpr int32_t kNoiseGroup = 64;             // ids whose noise is made together
inline constexpr uint32_t kLowWordLane = 0x80000000u;  // Philox lanes of the low noise words

struct BlockMax {
  float max;
  bool unusable;  // NaN or +inf
};
struct ExpSums {
  double sum;           // Σ w
  double weighted_log;  // Σ w log w
};

struct SamplingKernels {
  BlockMax (*max_of_block)(const float* logits, int32_t count);
  // weight = exp((logit - max) * scale), 0 where logit < logit_floor or weight < weight_floor; returns the sum. May run in place.
  double (*exp_block)(const float* logits, int32_t count, float max, float scale, float logit_floor, float weight_floor,
                      float* weight);
  // The sums of exp_block, without floors and without storing weights.
  ExpSums (*sum_exp_block)(const float* logits, int32_t count, float max, float scale);
  // Zeroes weights under `floor`; returns the sum of the rest.
  double (*filter_block)(float* weight, int32_t count, float floor);
  // Number and sum of the values >= threshold (the sum: of values >= 0). Here `count` has no upper bound.
  int32_t (*count_at_least)(const float* values, int32_t count, float threshold);
  double (*mass_at_least)(const float* values, int32_t count, float threshold);
  // Σ max(0, p - q) and Σ min(p, q), p = target_weight * target_scale, q = draft_weight * draft_scale.
  double (*residual_block)(const float* target_weight, const float* draft_weight, int32_t count, double target_scale,
                           double draft_scale);
  double (*overlap_block)(const float* target_weight, const float* draft_weight, int32_t count, double target_scale,
                          double draft_scale);
  // Σ w log w.
  double (*weighted_log_block)(const float* weight, int32_t count);
  // Philox words 0..3 of lanes [first_lane, first_lane + 16) for counter (position, sample_index, purpose, lane):
  // high[16 w + i] = word w of lane first_lane + i. Returns whether float(high[j] / 2) < weight[j] * limit for some j of the 64.
  bool (*noise_group)(uint64_t seed, uint32_t position, uint32_t sample_index, uint32_t purpose, uint32_t first_lane,
                      const float* weight, float limit, uint32_t* high);
};

// The table of the best instruction set up to `set` that this binary has. REQUIRES: the processor has `set`.
const SamplingKernels& SamplingKernelsFor(InstructionSet set);

const SamplingKernels& PortableSamplingKernels();
#if defined(__x86_64__)
const SamplingKernels& Avx2SamplingKernels();
const SamplingKernels& Avx512SamplingKernels();
#endif

}  // namespace bebop::cpu
