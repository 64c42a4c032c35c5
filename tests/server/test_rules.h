// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "server/translation.h"

namespace bebop {

// A small server's rules: vocabulary 100, model length 64, drafts up to 5.
inline RequestRules SmallRules() {
  return {.max_model_len = 64,
          .vocab_size = 100,
          .max_draft_tokens = 5,
          .has_mtp = true,
          .has_tokenizer = true,
          .allow_synthetic_acceptance = true,
          .allow_unknown_fields = false,
          .default_mode = SpeculationMode::kRejection,
          .default_num_draft_tokens = 3};
}

inline RequestContext FixedContext() {
  return {.fresh_request_id = "fresh", .fresh_seed = 77, .deadline = absl::UnixEpoch() + absl::Seconds(9)};
}

inline v1::GenerateRequest ValidRequest() {
  v1::GenerateRequest request;
  for (uint32_t id = 1; id <= 4; ++id) request.add_prompt_token_ids(id);
  return request;
}

inline v1::ScoreRequest ValidScore() {
  v1::ScoreRequest request;
  for (uint32_t id = 1; id <= 4; ++id) {
    if (request.sequences_size() == 0) request.add_sequences();
    request.mutable_sequences(0)->add_token_ids(id);
  }
  return request;
}

}  // namespace bebop
