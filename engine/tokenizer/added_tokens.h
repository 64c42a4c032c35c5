// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace bebop {

// Finds added tokens in text: leftmost match first, the longest of those that begin there (a trie). Linear: at most
// kMaxContentBytes steps a byte.
class AddedTokens {
 public:
  static constexpr size_t kMaxContentBytes = 256;

  // The first of two tokens with the same content holds.
  void Add(std::string_view content, uint32_t token_id, bool is_special);

  // Cuts `text` at its added tokens: calls on_text(part) for what lies between (never empty) and on_token(id), in order. Without
  // `parse_special`, special tokens found are left in the text whole, as `tokenizers` does with encode_special_tokens.
  template <typename OnText, typename OnToken>
  void Split(std::string_view text, bool parse_special, const OnText& on_text, const OnToken& on_token) const {
    size_t part_begin = 0;
    for (size_t i = 0; i < text.size();) {
      const Match match = LongestAt(text, i);
      if (match.length == 0) {
        ++i;
        continue;
      }
      if (!match.is_special || parse_special) {
        if (part_begin < i) on_text(text.substr(part_begin, i - part_begin));
        on_token(match.token_id);
        part_begin = i + match.length;
      }
      i += match.length;
    }
    if (part_begin < text.size()) on_text(text.substr(part_begin));
  }

 private:
  struct Match {
    size_t length = 0;  // 0: none
    uint32_t token_id = 0;
    bool is_special = false;
  };
  struct Node {
    std::vector<std::pair<char, int32_t>> children;  // sorted by byte
    bool ends_token = false;
    bool is_special = false;
    uint32_t token_id = 0;
  };
  Match LongestAt(std::string_view text, size_t begin) const;
  int32_t Child(int32_t node, char byte) const;  // -1: none

  std::vector<Node> nodes_ = std::vector<Node>(1);  // [0] is the root
};

}  // namespace bebop
