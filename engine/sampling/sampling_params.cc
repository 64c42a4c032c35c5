// SPDX-License-Identifier: Apache-2.0
#include "engine/sampling/sampling_params.h"

#include <cmath>

#include "absl/strings/str_cat.h"

namespace bebop {

const char* SpeculationModeName(SpeculationMode mode) {
  switch (mode) {
    case SpeculationMode::kOff: return "off";
    case SpeculationMode::kTargetOnly: return "target_only";
    case SpeculationMode::kRejection: return "rejection";
    case SpeculationMode::kCoupled: return "coupled";
  }
  return "unknown";
}

absl::Status ValidateSamplingParams(const SamplingParams& params) {
  if (!std::isfinite(params.temperature) || params.temperature < 0.0f) {
    return absl::InvalidArgumentError(absl::StrCat("sampling.temperature is ", params.temperature, ", expected finite and >= 0"));
  }
  if (params.top_k < 0) return absl::InvalidArgumentError(absl::StrCat("sampling.top_k is ", params.top_k, ", expected >= 0"));
  if (!(params.top_p > 0.0f && params.top_p <= 1.0f)) {
    return absl::InvalidArgumentError(absl::StrCat("sampling.top_p is ", params.top_p, ", expected 0 < top_p <= 1"));
  }
  if (!(params.min_p >= 0.0f && params.min_p <= 1.0f)) {
    return absl::InvalidArgumentError(absl::StrCat("sampling.min_p is ", params.min_p, ", expected 0 <= min_p <= 1"));
  }
  return absl::OkStatus();
}

void SetTransform(const SamplingParams& params, TransformArgs* args) {
  args->temperature = params.temperature;
  args->top_k = params.top_k;
  args->top_p = params.top_p;
  args->min_p = params.min_p;
}

}  // namespace bebop
