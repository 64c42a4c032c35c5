// SPDX-License-Identifier: Apache-2.0
#include "engine/tokenizer/added_tokens.h"

#include <algorithm>

namespace bebop {
namespace {

bool ByteBefore(const std::pair<char, int32_t>& child, char byte) { return child.first < byte; }

}  // namespace

int32_t AddedTokens::Child(int32_t node, char byte) const {
  const auto& children = nodes_[static_cast<size_t>(node)].children;
  const auto child = std::lower_bound(children.begin(), children.end(), byte, ByteBefore);
  return child != children.end() && child->first == byte ? child->second : -1;
}

void AddedTokens::Add(std::string_view content, uint32_t token_id, bool is_special) {
  int32_t node = 0;
  for (const char byte : content) {
    int32_t child = Child(node, byte);
    if (child < 0) {
      child = static_cast<int32_t>(nodes_.size());
      nodes_.emplace_back();
      auto& children = nodes_[static_cast<size_t>(node)].children;
      children.insert(std::lower_bound(children.begin(), children.end(), byte, ByteBefore), {byte, child});
    }
    node = child;
  }
  Node& end = nodes_[static_cast<size_t>(node)];
  if (end.ends_token) return;
  end.ends_token = true;
  end.is_special = is_special;
  end.token_id = token_id;
}

AddedTokens::Match AddedTokens::LongestAt(std::string_view text, size_t begin) const {
  Match match;
  int32_t node = 0;
  for (size_t i = begin; i < text.size(); ++i) {
    node = Child(node, text[i]);
    if (node < 0) break;
    const Node& reached = nodes_[static_cast<size_t>(node)];
    if (reached.ends_token) match = {i + 1 - begin, reached.token_id, reached.is_special};
  }
  return match;
}

}  // namespace bebop
