// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>

namespace bebop {

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four 32-bit words that are
// a function of (key, counter) alone. bebop keys every draw by what it is for, never by where it runs (`algorithm.md` section 2).
constexpr std::array<uint32_t, 4> Philox4x32(uint64_t key, std::array<uint32_t, 4> counter) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kMultiplier0) * counter[0];
    const uint64_t product1 = static_cast<uint64_t>(kMultiplier1) * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key1, static_cast<uint32_t>(product0)};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

// What a draw is for: no two purposes share random numbers.
enum class DrawPurpose : uint32_t { kDraft = 0, kAccept = 1, kResidual = 2, kBonus = 3, kPlain = 4, kCoupled = 5, kSynthetic = 6 };

// Identifies the random numbers of one output token: seed of the request, sample within the group, and the token's absolute
// position in prompt + output. Batch mates, preemption and thread count change none of them.
struct RandomKey {
  uint64_t seed = 0;
  uint32_t sample_index = 0;
  uint32_t position = 0;
};

// A uniform in [0, 1) with 53 random bits. `lane` numbers the draws of one purpose at one position.
constexpr double Uniform53(const RandomKey& key, DrawPurpose purpose, uint32_t lane) {
  const auto words = Philox4x32(key.seed, {key.position, key.sample_index, static_cast<uint32_t>(purpose), lane});
  const uint64_t bits = (static_cast<uint64_t>(words[0]) << 32 | words[1]) >> 11;
  return static_cast<double>(bits) * 0x1.0p-53;
}

}  // namespace bebop
