// SPDX-License-Identifier: Apache-2.0
#include "kernels/common/philox.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace bebop {
namespace {

using Words = std::array<uint32_t, 4>;

// The known answers for philox4x32 with 10 rounds that Random123 publishes (kat_vectors).
TEST(Philox, KnownAnswers) {
  EXPECT_EQ(Philox4x32(0, {0, 0, 0, 0}), (Words{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}));
  EXPECT_EQ(Philox4x32(~uint64_t{0}, {~0u, ~0u, ~0u, ~0u}), (Words{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}));
  EXPECT_EQ(Philox4x32(0x299f31d0a4093822u, {0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}),
            (Words{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}));
}

TEST(Uniform53, IsTheTopOfTwoWordsOfTheDocumentedCounter) {
  const RandomKey key{0x0123456789abcdefu, 7, 1000};
  const Words words = Philox4x32(key.seed, {1000, 7, static_cast<uint32_t>(DrawPurpose::kResidual), 1});
  const double expected = std::ldexp(static_cast<double>(words[0]), -32) + std::ldexp(static_cast<double>(words[1] >> 11), -53);
  EXPECT_EQ(Uniform53(key, DrawPurpose::kResidual, 1), expected);
}

TEST(Uniform53, EveryPartOfTheKeyGivesItsOwnNumbers) {
  std::set<double> seen;
  int made = 0;
  for (uint64_t seed : {0ull, 1ull, 1ull << 32}) {
    for (uint32_t sample = 0; sample < 4; ++sample) {
      for (uint32_t position = 0; position < 50; ++position) {
        for (uint32_t purpose = 0; purpose <= static_cast<uint32_t>(DrawPurpose::kSynthetic); ++purpose) {
          for (uint32_t lane = 0; lane < 2; ++lane) {
            seen.insert(Uniform53({seed, sample, position}, static_cast<DrawPurpose>(purpose), lane));
            ++made;
          }
        }
      }
    }
  }
  EXPECT_EQ(static_cast<int>(seen.size()), made);
}

// Kolmogorov-Smirnov along positions, lanes and samples; 2.7 / sqrt(n) has a false alarm rate under 1e-6.
TEST(Uniform53, IsUniformAlongEveryCounterWord) {
  constexpr int kCount = 100000;
  for (int word = 0; word < 3; ++word) {
    std::vector<double> draws;
    for (uint32_t i = 0; i < kCount; ++i) {
      const RandomKey key{42, word == 1 ? i : 0, word == 0 ? i : 0};
      draws.push_back(Uniform53(key, DrawPurpose::kDraft, word == 2 ? i : 0));
    }
    std::sort(draws.begin(), draws.end());
    EXPECT_GE(draws.front(), 0.0);
    EXPECT_LT(draws.back(), 1.0);
    double distance = 0.0;
    for (int i = 0; i < kCount; ++i) {
      distance = std::max({distance, (i + 1.0) / kCount - draws[i], draws[i] - static_cast<double>(i) / kCount});
    }
    EXPECT_LT(distance, 2.7 / std::sqrt(kCount)) << "counter word " << word;
  }
}

}  // namespace
}  // namespace bebop
