// SPDX-License-Identifier: Apache-2.0
#include "engine/schedule/request.h"

namespace bebop {

void SpecCounts::Add(const SpecCounts& other) {
  num_spec_steps += other.num_spec_steps;
  num_draft_tokens += other.num_draft_tokens;
  num_accepted_draft_tokens += other.num_accepted_draft_tokens;
  num_trimmed_tokens += other.num_trimmed_tokens;
  for (int32_t i = 0; i < kMaxDraftTokens; ++i) {
    drafted_per_pos[i] += other.drafted_per_pos[i];
    accepted_per_pos[i] += other.accepted_per_pos[i];
    overlap_per_pos[i] += other.overlap_per_pos[i];
  }
}

}  // namespace bebop
