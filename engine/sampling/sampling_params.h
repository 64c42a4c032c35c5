// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/sampling/sampling.h"

namespace bebop {

// How a request drafts (algorithm.md section 2). kOff has no MTP state and pays nothing for it.
enum class SpeculationMode : uint8_t { kOff, kTargetOnly, kRejection, kCoupled };
const char* SpeculationModeName(SpeculationMode mode);

// Most draft tokens per iteration, for servers and requests.
inline constexpr int32_t kMaxDraftTokens = 8;

// The transform of target and draft logits (algorithm.md section 2): temperature, top-k (0 = off; ties at the k-th value stay),
// softmax, top-p on what is left (the token that crosses it stays), min-p relative to the largest, renormalise.
// Temperature 0 means greedy: the argmax (lowest id on ties); reported log-probabilities are then those of temperature 1 without
// truncation.
struct SamplingParams {
  float temperature = 1.0f;  // >= 0
  int32_t top_k = 0;         // >= 0
  float top_p = 1.0f;        // (0, 1]
  float min_p = 0.0f;        // [0, 1]
  uint64_t seed = 0;

  bool greedy() const { return temperature == 0.0f; }
};

// INVALID_ARGUMENT names the first field out of its range, its value and the range. Everything else may rely on the ranges above.
absl::Status ValidateSamplingParams(const SamplingParams& params);

// Copies temperature, top_k, top_p and min_p into the kernel's arguments; target and draft rows of a request get the same.
void SetTransform(const SamplingParams& params, TransformArgs* args);

// Which per-token values a request wants; each may cost passes over the vocabulary.
struct OutputParams {
  bool logprobs = false;      // of the processed target distribution
  bool raw_logprobs = false;  // of the raw logits: temperature 1, no truncation, nothing banned
  bool entropy = false;       // nats, of the processed target distribution
  bool token_source = false;
  bool draft_logprobs = false;  // log q of the emitted token where a q existed, else NaN
  bool spec_detail = false;     // overlap_per_pos
};

}  // namespace bebop
