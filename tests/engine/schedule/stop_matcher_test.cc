// SPDX-License-Identifier: Apache-2.0
#include "engine/schedule/stop_matcher.h"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace bebop {
namespace {

// Tokens are indexes into `texts`.
struct Case {
  std::vector<std::string> texts;
  StoppingParams stopping;
  std::vector<uint32_t> eos;

  // Place (0-based) of the token that stops, or -1; *match is set then.
  int32_t Run(const std::vector<uint32_t>& tokens, StopMatch* match) const {
    const TokenBytes bytes = [this](uint32_t token) { return std::string_view(texts.at(token)); };
    const StopRules rules(stopping, eos, &bytes);
    StopMatcher matcher(&rules);
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (const auto found = matcher.Push(tokens[i])) {
        *match = *found;
        return static_cast<int32_t>(i);
      }
    }
    return -1;
  }
};

TEST(StopMatcher, EosAndStopIds) {
  Case c;
  c.texts = {"a", "b", "c", "d"};
  c.stopping.stop_token_ids = {2};
  c.eos = {3};
  StopMatch match;
  EXPECT_EQ(c.Run({0, 1, 2, 3}, &match), 2);
  EXPECT_EQ(match.token_id, 2u);
  EXPECT_FALSE(match.string_index.has_value());
  EXPECT_EQ(c.Run({0, 3, 2}, &match), 1);
  EXPECT_EQ(match.token_id, 3u);
  c.stopping.ignore_eos = true;
  EXPECT_EQ(c.Run({0, 3, 1}, &match), -1);
  EXPECT_EQ(c.Run({0, 3, 2}, &match), 2);
}

TEST(StopRules, StopIdsAreUniqueAndSorted) {
  StoppingParams stopping;
  stopping.stop_token_ids = {9, 3, 9};
  EXPECT_EQ(StopRules(stopping, {7, 3}, nullptr).stop_ids(), (std::vector<uint32_t>{3, 7, 9}));
  stopping.ignore_eos = true;
  EXPECT_EQ(StopRules(stopping, {7}, nullptr).stop_ids(), (std::vector<uint32_t>{3, 9}));
}

TEST(StopMatcher, MatchSpansTokensAndStopsAtTheOneThatCompletesIt) {
  Case c;
  c.texts = {"he", "llo", " wor", "ld!", "", "x"};
  c.stopping.stop_strings = {"lo wo"};
  StopMatch match;
  EXPECT_EQ(c.Run({0, 1, 2, 3}, &match), 2);
  EXPECT_EQ(match.string_index, 0);
  EXPECT_EQ(c.Run({0, 1, 4, 4, 2}, &match), 4) << "tokens without bytes change nothing";
  EXPECT_EQ(c.Run({0, 1, 5, 2}, &match), -1);
}

TEST(StopMatcher, FailureFunctionFallsBackToTheLongestBorder) {
  Case c;
  c.texts = {"a", "b"};
  c.stopping.stop_strings = {"aabaaab"};
  StopMatch match;
  // After "aabaaa" another 'a' breaks the match, yet "aa" of the end starts the next.
  EXPECT_EQ(c.Run({0, 0, 1, 0, 0, 1, 0, 0, 0, 1}, &match), 9);
}

TEST(StopMatcher, OfSeveralTheFirstCompletedWinsThenTheFirstListed) {
  Case c;
  c.texts = {"abcd"};
  c.stopping.stop_strings = {"cd", "bc", "abc"};
  StopMatch match;
  EXPECT_EQ(c.Run({0}, &match), 0);
  EXPECT_EQ(match.string_index, 1);
}

TEST(StopMatcher, IdWinsOverString) {
  Case c;
  c.texts = {"stop"};
  c.stopping.stop_strings = {"stop"};
  c.stopping.stop_token_ids = {0};
  StopMatch match;
  EXPECT_EQ(c.Run({0}, &match), 0);
  EXPECT_EQ(match.token_id, 0u);
  EXPECT_FALSE(match.string_index.has_value());
}

TEST(StopMatcher, NothingStopsBeforeMinNewTokens) {
  Case c;
  c.texts = {"ab", "c", "e"};
  c.stopping.stop_strings = {"ab", "abc"};
  c.stopping.stop_token_ids = {2};
  c.stopping.min_new_tokens = 2;
  StopMatch match;
  EXPECT_EQ(c.Run({0, 1}, &match), 1) << "a match may begin before and end at the minimum";
  EXPECT_EQ(match.string_index, 1);
  EXPECT_EQ(c.Run({0, 0}, &match), 1);
  EXPECT_EQ(match.string_index, 0);
  EXPECT_EQ(c.Run({2, 2}, &match), 1);
  c.stopping.min_new_tokens = 3;
  EXPECT_EQ(c.Run({0, 1, 1}, &match), -1) << "a match completed before the minimum is past";
}

TEST(StopMatcher, EqualsSearchingTheTextSoFar) {
  std::mt19937 random(7);
  for (int round = 0; round < 3000; ++round) {
    Case c;
    for (int t = 0; t < 6; ++t) {
      std::string text(random() % 4, 'a');
      for (char& byte : text) byte = static_cast<char>('a' + random() % 2);
      c.texts.push_back(text);
    }
    for (size_t s = 0; s < 1 + random() % 3; ++s) {
      std::string text(1 + random() % 6, 'a');
      for (char& byte : text) byte = static_cast<char>('a' + random() % 2);
      c.stopping.stop_strings.push_back(text);
    }
    c.stopping.min_new_tokens = static_cast<int32_t>(random() % 5);
    std::vector<uint32_t> tokens(20);
    for (uint32_t& token : tokens) token = random() % 6;

    int32_t expected = -1, expected_string = -1;
    std::string text;
    for (size_t i = 0; i < tokens.size() && expected < 0; ++i) {
      const size_t old_length = text.size();
      text += c.texts[tokens[i]];
      if (static_cast<int32_t>(i) + 1 < c.stopping.min_new_tokens) continue;
      for (size_t end = old_length + 1; end <= text.size() && expected < 0; ++end) {
        for (size_t s = 0; s < c.stopping.stop_strings.size() && expected < 0; ++s) {
          const std::string& stop = c.stopping.stop_strings[s];
          if (end < stop.size() || text.compare(end - stop.size(), stop.size(), stop) != 0) continue;
          expected = static_cast<int32_t>(i);
          expected_string = static_cast<int32_t>(s);
        }
      }
    }
    StopMatch match;
    ASSERT_EQ(c.Run(tokens, &match), expected);
    if (expected >= 0) {
      ASSERT_EQ(match.string_index, expected_string);
    }
  }
}

}  // namespace
}  // namespace bebop
