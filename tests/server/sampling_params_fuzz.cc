// SPDX-License-Identifier: Apache-2.0
// Any bit pattern as sampling parameters: refused by name, or such that the transform is defined.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/common/check.h"
#include "server/limits.h"
#include "server/status_details.h"
#include "tests/server/test_rules.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace bebop;  // NOLINT: a single function
  // One byte of presence bits, then the values.
  struct Values {
    float temperature, top_p, min_p;
    int32_t top_k;
    uint64_t seed;
  } values;
  constexpr size_t kSize = 1 + 3 * sizeof(float) + sizeof(int32_t) + sizeof(uint64_t);
  if (size < kSize) return 0;
  std::memcpy(&values.temperature, data + 1, 4);
  std::memcpy(&values.top_p, data + 5, 4);
  std::memcpy(&values.min_p, data + 9, 4);
  std::memcpy(&values.top_k, data + 13, 4);
  std::memcpy(&values.seed, data + 17, 8);
  v1::GenerateRequest message = ValidRequest();
  auto* sampling = message.mutable_sampling();
  if (data[0] & 1) sampling->set_temperature(values.temperature);
  if (data[0] & 2) sampling->set_top_p(values.top_p);
  if (data[0] & 4) sampling->set_min_p(values.min_p);
  if (data[0] & 8) sampling->set_top_k(values.top_k);
  if (data[0] & 16) sampling->set_seed(values.seed);
  const auto request = ToEngine(message, SmallRules(), FixedContext());
  if (!request.ok()) {
    BEBOP_CHECK(ErrorReason(request.status()) == "INVALID_FIELD");
    BEBOP_CHECK(ErrorMetadata(request.status(), "field").rfind("sampling.", 0) == 0);
    return 0;
  }
  const SamplingParams& params = request->sampling;
  BEBOP_CHECK(params.greedy() || (std::isfinite(1.0f / params.temperature) && params.temperature <= limits::kMaxTemperature));
  BEBOP_CHECK(params.top_p > 0.0f && params.top_p <= 1.0f);
  BEBOP_CHECK(params.min_p >= 0.0f && params.min_p <= 1.0f);
  BEBOP_CHECK(params.top_k >= 0);
  BEBOP_CHECK((data[0] & 16) ? params.seed == values.seed : params.seed == FixedContext().fresh_seed);
  return 0;
}
