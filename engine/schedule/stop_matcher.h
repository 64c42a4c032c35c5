// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/schedule/request.h"

namespace bebop {

// Bytes that a token decodes to, on its own and out of context (byte-level BPE: concatenation gives the text's bytes).
using TokenBytes = std::function<std::string_view(uint32_t)>;

// When a request's samples stop, compiled once and shared by them: end-of-sequence ids (unless ignore_eos), stop ids, and stop strings
// over the bytes of output tokens. Immutable.
class StopRules {
 public:
  // `token_bytes` may be null when there are no stop strings, and outlives the rules. REQUIRES: no stop string is empty.
  StopRules(const StoppingParams& stopping, const std::vector<uint32_t>& eos_token_ids, const TokenBytes* token_bytes);

  // Ids that end a sample, ascending without repeats; they are what is banned while fewer than min_new_tokens are out.
  const std::vector<uint32_t>& stop_ids() const { return stop_ids_; }

 private:
  friend class StopMatcher;
  struct Pattern {
    std::string text;
    // border[i]: length of the longest proper prefix of text that ends text[0..i] (the failure function of Knuth, Morris and Pratt,
    // "Fast Pattern Matching in Strings", 1977).
    std::vector<int32_t> border;
  };
  std::vector<uint32_t> stop_ids_;
  std::vector<Pattern> patterns_;
  const TokenBytes* token_bytes_;
  int32_t min_new_tokens_;
};

struct StopMatch {
  std::optional<uint32_t> token_id;    // the token is a stop id
  std::optional<int32_t> string_index; // into StoppingParams::stop_strings; of several in one token, the one whose last byte comes
                                       // first, then the first listed. A stop id wins over strings.
};

// The state of one sample: feed its output tokens in order. A match may begin in one token and end in another; only the token that
// holds its last byte stops. Tokens before number min_new_tokens never stop (their bytes still count as the beginning of a match).
//
// Time: linear in the bytes pushed, times the number of stop strings. Allocates only at construction.
class StopMatcher {
 public:
  explicit StopMatcher(const StopRules* rules);  // `rules` outlives the matcher
  // The stop that `token` completes, if any. After a match the sample is over: do not push again.
  std::optional<StopMatch> Push(uint32_t token);

 private:
  const StopRules* rules_;
  std::vector<int32_t> matched_;  // per pattern: bytes matched so far
  int64_t num_tokens_ = 0;
};

}  // namespace bebop
