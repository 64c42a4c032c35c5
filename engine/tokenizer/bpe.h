// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace bebop {

// The merges of a byte-level BPE (Sennrich, Haddow, Birch: "Neural machine translation of rare words with subword units", ACL 2016,
// over bytes): two adjacent tokens become one, lowest rank first, leftmost of equal ranks first.
class BpeMerges {
 public:
  // `byte_tokens[b]`: the token of byte b.
  explicit BpeMerges(const std::array<uint32_t, 256>& byte_tokens) : byte_tokens_(byte_tokens) {}

  void Reserve(size_t num_merges) { merges_.reserve(num_merges); }
  // Merging `left`, `right` gives `merged`. The last of two calls with the same pair holds.
  void Add(uint32_t left, uint32_t right, uint32_t rank, uint32_t merged) { merges_[Pair(left, right)] = {rank, merged}; }

  // Scratch of Encode: reused from piece to piece.
  struct Scratch {
    struct Symbol {
      uint32_t token;
      int32_t previous, next;  // -1: none
    };
    struct Candidate {
      uint32_t rank;
      int32_t position;
      uint32_t merged;
    };
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
    int64_t heap_pushes = 0;  // over all calls: the work done, for tests
  };

  // Appends the tokens of `piece` to `token_ids`. O(n log n) for n bytes, at most 3n candidates.
  void Encode(std::string_view piece, Scratch& scratch, std::vector<uint32_t>& token_ids) const;

 private:
  struct Merge {
    uint32_t rank, merged;
  };
  static uint64_t Pair(uint32_t left, uint32_t right) { return static_cast<uint64_t>(left) << 32 | right; }

  const std::array<uint32_t, 256> byte_tokens_;
  absl::flat_hash_map<uint64_t, Merge> merges_;
};

}  // namespace bebop
