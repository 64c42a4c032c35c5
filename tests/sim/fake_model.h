// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "engine/schedule/request.h"

namespace bebop::sim {

// A "language model" whose every value is a pure function of (seed, sample, position, prefix), in the shape of lossless sampling: what is
// drawn at a place depends on whether a draft stood there, exactly as in rejection sampling. So any run of a request, however chunked,
// forked or preempted, must give the tokens of Reference below.

inline constexpr uint32_t kVocab = 48;
inline constexpr uint64_t kEmptyPrefix = 0x9e3779b97f4a7c15ull;

inline uint64_t Mix(uint64_t a, uint64_t b) {
  uint64_t x = a * 0xbf58476d1ce4e5b9ull ^ (b + 0x9e3779b97f4a7c15ull + (a << 6) + (a >> 2));
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Hash of a prefix, token by token.
inline uint64_t Extend(uint64_t prefix, uint32_t token) { return Mix(prefix, token + 1); }

enum class Purpose : uint32_t { kDraft = 1, kAccept, kResidual, kBonus, kPlain, kCoupled, kValue, kNan, kCap };

// One place of one sample: the token at absolute position `place`, after the prefix with this hash.
struct Place {
  const GenerateRequest* request = nullptr;
  uint32_t sample_index = 0;
  int32_t place = 0;
  uint64_t prefix = 0;
  bool banned = false;                             // min_new_tokens not yet reached
  const std::vector<uint32_t>* banned_ids = nullptr;

  uint64_t Bits(Purpose purpose) const {
    return Mix(Mix(Mix(request->sampling.seed, sample_index), static_cast<uint64_t>(place) * 16 + static_cast<uint64_t>(purpose)), prefix);
  }
  uint32_t Token(Purpose purpose) const;
  bool Accepts() const { return Bits(Purpose::kAccept) % 100 < request->sampling.seed % 101; }
  // The target row that would give this place's token is not finite. Only requests with a seed divisible by 7 have such rows.
  bool NonFinite() const { return request->sampling.seed % 7 == 0 && Bits(Purpose::kNan) % 24 == 0; }
  float Value(int32_t which) const { return static_cast<float>(Mix(Bits(Purpose::kValue), which) % 1000) / 8.0f; }
};

// Most drafts the MTP layer "manages" behind the token at position `base`: usually all that are asked for.
inline int32_t DraftCap(const GenerateRequest& request, uint32_t sample_index, int32_t base) {
  const uint64_t bits = Mix(Mix(request.sampling.seed, sample_index), 1000003ull * base + static_cast<uint64_t>(Purpose::kCap));
  return bits % 5 == 0 ? static_cast<int32_t>(bits / 5 % 4) : kMaxDraftTokens;
}

// What is emitted at a place, given its draft if there is one.
struct Emission {
  uint32_t token = 0;
  bool accepted = false;
  int32_t source = 0;
};
Emission Emit(const Place& place, const uint32_t* draft, int32_t depth, bool any_draft);

std::string_view TokenText(uint32_t token);
const std::vector<uint32_t>& EosIds();

// The whole sample, computed directly: one sequence, no memory, no batch, no interruption; stops by searching the text so far.
SampleResult Reference(const GenerateRequest& request, int32_t sample_index);

}  // namespace bebop::sim
