// SPDX-License-Identifier: Apache-2.0
#include "engine/schedule/stop_matcher.h"

#include <algorithm>

#include "kernels/common/check.h"

namespace bebop {

StopRules::StopRules(const StoppingParams& stopping, const std::vector<uint32_t>& eos_token_ids, const TokenBytes* token_bytes)
    : stop_ids_(stopping.stop_token_ids), token_bytes_(token_bytes), min_new_tokens_(stopping.min_new_tokens) {
  if (!stopping.ignore_eos) stop_ids_.insert(stop_ids_.end(), eos_token_ids.begin(), eos_token_ids.end());
  std::sort(stop_ids_.begin(), stop_ids_.end());
  stop_ids_.erase(std::unique(stop_ids_.begin(), stop_ids_.end()), stop_ids_.end());
  for (const std::string& text : stopping.stop_strings) {
    BEBOP_CHECK(!text.empty() && token_bytes != nullptr);
    Pattern pattern{text, std::vector<int32_t>(text.size(), 0)};
    int32_t length = 0;
    for (size_t i = 1; i < text.size(); ++i) {
      while (length > 0 && text[i] != text[length]) length = pattern.border[length - 1];
      if (text[i] == text[length]) ++length;
      pattern.border[i] = length;
    }
    patterns_.push_back(std::move(pattern));
  }
}

StopMatcher::StopMatcher(const StopRules* rules) : rules_(rules), matched_(rules->patterns_.size(), 0) {}

std::optional<StopMatch> StopMatcher::Push(uint32_t token) {
  ++num_tokens_;
  const bool may_stop = num_tokens_ >= rules_->min_new_tokens_;
  if (may_stop && std::binary_search(rules_->stop_ids_.begin(), rules_->stop_ids_.end(), token)) {
    return StopMatch{.token_id = token, .string_index = std::nullopt};
  }
  if (matched_.empty()) return std::nullopt;
  for (const char byte : (*rules_->token_bytes_)(token)) {
    int32_t found = -1;
    for (size_t i = 0; i < matched_.size(); ++i) {
      const StopRules::Pattern& pattern = rules_->patterns_[i];
      int32_t& length = matched_[i];
      // A pattern matched in full before (a match that min_new_tokens forbade) goes on from its border.
      if (length == static_cast<int32_t>(pattern.text.size())) length = pattern.border[length - 1];
      while (length > 0 && byte != pattern.text[length]) length = pattern.border[length - 1];
      if (byte == pattern.text[length]) ++length;
      if (length == static_cast<int32_t>(pattern.text.size()) && found < 0) found = static_cast<int32_t>(i);
    }
    if (may_stop && found >= 0) return StopMatch{.token_id = std::nullopt, .string_index = found};
  }
  return std::nullopt;
}

}  // namespace bebop
