// SPDX-License-Identifier: Apache-2.0
// Bytes: number of stop strings, min_new_tokens, then strings and token texts, each a length byte and its bytes; the rest are tokens.
// Whatever they are, the matcher must agree with a search through the text so far.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "engine/schedule/stop_matcher.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  size_t at = 0;
  const auto next = [&]() -> uint8_t { return at < size ? data[at++] : 0; };
  const auto text = [&](size_t limit) {
    std::string bytes;
    for (size_t left = next() % (limit + 1); left > 0 && at < size; --left) bytes += static_cast<char>(next());
    return bytes;
  };
  bebop::StoppingParams stopping;
  const int num_strings = next() % 5;
  stopping.min_new_tokens = next() % 4;
  for (int i = 0; i < num_strings; ++i) {
    std::string stop = text(12);
    if (!stop.empty()) stopping.stop_strings.push_back(stop);
  }
  stopping.stop_token_ids = {7};
  std::vector<std::string> texts;
  for (int i = 0; i < 8; ++i) texts.push_back(text(6));
  const bebop::TokenBytes token_bytes = [&](uint32_t token) { return std::string_view(texts[token]); };
  const bebop::StopRules rules(stopping, {6}, &token_bytes);
  bebop::StopMatcher matcher(&rules);

  std::string seen;
  for (int32_t count = 1; at < size && count <= 512; ++count) {
    const uint32_t token = next() % 8;
    const size_t old_length = seen.size();
    seen += texts[token];
    const bool may_stop = count >= stopping.min_new_tokens;
    const bool id = may_stop && token >= 6;
    bool string = false;
    for (const std::string& stop : stopping.stop_strings) {
      const size_t from = old_length + 1 > stop.size() ? old_length + 1 - stop.size() : 0;
      string = string || (may_stop && seen.find(stop, from) != std::string::npos);
    }
    const auto match = matcher.Push(token);
    if (match.has_value() != (id || string)) std::abort();
    if (!match) continue;
    if (match->token_id.has_value() != id || match->string_index.has_value() == id) std::abort();
    break;
  }
  return 0;
}
