// SPDX-License-Identifier: Apache-2.0
// Bytes -> GenerateRequest -> validation: whatever comes in, a status comes out, and what passes is in range.
#include <cstdint>

#include "kernels/common/check.h"
#include "server/limits.h"
#include "server/status_details.h"
#include "tests/server/test_rules.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace bebop;  // NOLINT: a single function
  if (size < 1) return 0;
  RequestRules rules = SmallRules();
  rules.has_mtp = (data[0] & 1) != 0;
  rules.has_tokenizer = (data[0] & 2) != 0;
  rules.allow_synthetic_acceptance = (data[0] & 4) != 0;
  rules.allow_unknown_fields = (data[0] & 8) != 0;
  if (!rules.has_mtp) rules.default_mode = SpeculationMode::kOff;
  if ((data[0] & 16) != 0) {
    v1::ScoreRequest message;
    if (!message.ParseFromArray(data + 1, static_cast<int>(size) - 1)) return 0;
    const auto requests = ToEngine(message, rules, FixedContext());
    if (!requests.ok()) {
      BEBOP_CHECK(!ErrorReason(requests.status()).empty());
      return 0;
    }
    for (const ScoreRequest& request : *requests) {
      BEBOP_CHECK(!request.token_ids.empty() && request.token_ids.size() <= 64);
      BEBOP_CHECK(request.score_start >= 0 && static_cast<size_t>(request.score_start) < request.token_ids.size());
      BEBOP_CHECK(request.temperature > 0.0f && request.temperature <= limits::kMaxTemperature);
      BEBOP_CHECK(request.draft_depth == 0 || rules.has_mtp);
    }
    return 0;
  }
  v1::GenerateRequest message;
  if (!message.ParseFromArray(data + 1, static_cast<int>(size) - 1)) return 0;
  const auto request = ToEngine(message, rules, FixedContext());
  if (!request.ok()) {
    BEBOP_CHECK(!ErrorReason(request.status()).empty());
    BEBOP_CHECK(request.status().message().size() < 512);
    return 0;
  }
  BEBOP_CHECK(IsValidRequestId(request->request_id));
  BEBOP_CHECK(!request->prompt.empty());
  for (const uint32_t id : request->prompt) BEBOP_CHECK(id < 100);
  BEBOP_CHECK(request->num_samples >= 1 && request->num_samples <= limits::kNumSamples);
  BEBOP_CHECK(request->stopping.max_new_tokens >= 1);
  BEBOP_CHECK(static_cast<int32_t>(request->prompt.size()) + request->stopping.max_new_tokens <= rules.max_model_len);
  BEBOP_CHECK(request->stopping.min_new_tokens >= 0 && request->stopping.min_new_tokens <= request->stopping.max_new_tokens);
  BEBOP_CHECK(request->stopping.stop_strings.empty() || rules.has_tokenizer);
  BEBOP_CHECK(request->speculation.num_draft_tokens >= 0 && request->speculation.num_draft_tokens <= rules.max_draft_tokens);
  BEBOP_CHECK(request->speculation.mode == SpeculationMode::kOff || rules.has_mtp);
  BEBOP_CHECK(request->speculation.synthetic_acceptance < 0.0 || rules.allow_synthetic_acceptance);
  BEBOP_CHECK(BodyHash(message) == request->body_hash);
  return 0;
}
