// SPDX-License-Identifier: Apache-2.0
#include "engine/tokenizer/bpe.h"

#include <algorithm>

namespace bebop {

void BpeMerges::Encode(std::string_view piece, Scratch& scratch, std::vector<uint32_t>& token_ids) const {
  auto& symbols = scratch.symbols;
  auto& heap = scratch.heap;
  using Candidate = Scratch::Candidate;
  // Heap order: the best candidate on top.
  const auto worse = [](const Candidate& a, const Candidate& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
  };

  symbols.clear();
  heap.clear();
  const int32_t length = static_cast<int32_t>(piece.size());
  for (int32_t i = 0; i < length; ++i) {
    const uint8_t byte = static_cast<uint8_t>(piece[static_cast<size_t>(i)]);
    symbols.push_back({byte_tokens_[byte], i - 1, i + 1 < length ? i + 1 : -1});
  }
  const auto symbol = [&symbols](int32_t position) -> Scratch::Symbol& { return symbols[static_cast<size_t>(position)]; };
  const auto candidate = [&](int32_t position, Candidate& out) {
    const int32_t next = symbol(position).next;
    if (next < 0) return false;
    const auto merge = merges_.find(Pair(symbol(position).token, symbol(next).token));
    if (merge == merges_.end()) return false;
    out = {merge->second.rank, position, merge->second.merged};
    ++scratch.heap_pushes;
    return true;
  };

  Candidate found;
  for (int32_t i = 0; i + 1 < length; ++i) {
    if (candidate(i, found)) heap.push_back(found);
  }
  std::make_heap(heap.begin(), heap.end(), worse);
  constexpr int32_t kMerged = -2;  // in Symbol::next: this symbol is part of the one before it
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), worse);
    const Candidate best = heap.back();
    heap.pop_back();
    Scratch::Symbol& left = symbol(best.position);
    if (left.next < 0) continue;  // merged away, or the last
    // A candidate is stale once either side has changed: then the pair is another one, or none.
    const auto merge = merges_.find(Pair(left.token, symbol(left.next).token));
    if (merge == merges_.end() || merge->second.merged != best.merged) continue;

    Scratch::Symbol& right = symbol(left.next);
    left.token = best.merged;
    left.next = right.next;
    right.next = kMerged;
    if (left.next >= 0) symbol(left.next).previous = best.position;
    for (const int32_t position : {left.previous, best.position}) {
      if (position >= 0 && candidate(position, found)) {
        heap.push_back(found);
        std::push_heap(heap.begin(), heap.end(), worse);
      }
    }
  }
  for (int32_t i = 0; i >= 0 && i < length; i = symbol(i).next) token_ids.push_back(symbol(i).token);
}

}  // namespace bebop
