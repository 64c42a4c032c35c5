// SPDX-License-Identifier: Apache-2.0
// Hostile text costs work in proportion to its length: counted, not timed.
#include <gtest/gtest.h>

#include <array>
#include <numeric>
#include <string>
#include <vector>

#include "engine/tokenizer/bpe.h"
#include "engine/tokenizer/nfc.h"
#include "engine/tokenizer/pre_tokenizer.h"
#include "engine/tokenizer/tokenizer.h"
#include "tests/engine/tokenizer/small_tokenizer.h"

namespace bebop {
namespace {

constexpr int64_t kMebi = 1 << 20;

std::string Repeat(std::string_view unit, int64_t bytes) {
  std::string text;
  while (static_cast<int64_t>(text.size()) < bytes) text += unit;
  return text;
}

TEST(BoundedWorkTest, BpeTriesThreeCandidatesAByteAtMost) {
  std::array<uint32_t, 256> byte_tokens;
  std::iota(byte_tokens.begin(), byte_tokens.end(), 0u);
  BpeMerges merges(byte_tokens);
  // a a -> aa -> aaaa -> ... : every merge makes another possible.
  uint32_t token = 'a';
  for (uint32_t rank = 0; rank < 20; ++rank) {
    merges.Add(token, token, rank, 256 + rank);
    token = 256 + rank;
  }
  for (const int64_t bytes : {kMebi / 2, kMebi}) {
    BpeMerges::Scratch scratch;
    std::vector<uint32_t> token_ids;
    merges.Encode(Repeat("a", bytes), scratch, token_ids);
    EXPECT_EQ(token_ids.size(), 1u);
    EXPECT_LE(scratch.heap_pushes, 3 * bytes);
  }
}

// Each of these takes hours if anything is quadratic; the test's own time limit is the check.
TEST(BoundedWorkTest, MebibyteRunsEnd) {
  const auto tokenizer = Tokenizer::FromJson(SmallTokenizerJson()).value();
  for (const std::string_view unit :
       {"a", "ab", " ", "\n", " \n", "\r", "0", "'", ".", "<|end", "<|end|>", "\xCC\x81", "\xCC\x81\xCC\xA3", "a\xCC\xA3\xCC\x81", "\xE3\x80\x80", "\xFF",
        "\xF0\x9F\x98", "\xF0\x9F\x98\x80", "a ", "'s", "\xE1\x84\x92\xE1\x85\xA1\xE1\x86\xAB"}) {
    const std::vector<uint32_t> ids = tokenizer->Encode(Repeat(unit, kMebi), true);
    EXPECT_FALSE(ids.empty());
    EXPECT_LE(ids.size(), 3u * kMebi + 8);
  }
}

TEST(BoundedWorkTest, MarksInDescendingOrderAreSorted) {
  const std::string text = "a" + Repeat("\xCC\x81\xCC\xA3", kMebi);  // classes 230, 220, 230, ...
  const std::string normal = NormalizeNfc(text);
  EXPECT_EQ(normal.substr(0, 3), "\xE1\xBA\xA1");  // a with dot below; the acute accents come after all dots
  EXPECT_EQ(normal.substr(3, 2), "\xCC\xA3");
  EXPECT_EQ(normal.substr(normal.size() - 2), "\xCC\x81");
}

TEST(BoundedWorkTest, PiecesTileTheText) {
  const auto pre_tokenizer = PreTokenizer::Create(PreTokenizer::kGpt2Pattern).value();
  const std::string text = "I'll go   home\n\n  now \xE4\xBD\xA0\xE5\xA5\xBD 42!  ";
  std::vector<std::string> pieces;
  for (size_t begin = 0; begin < text.size();) {
    pieces.push_back(text.substr(begin, pre_tokenizer->PieceLength(text, begin)));
    begin += pieces.back().size();
  }
  EXPECT_EQ(pieces, (std::vector<std::string>{"I", "'ll", " go", "  ", " home", "\n\n ", " now", " \xE4\xBD\xA0\xE5\xA5\xBD", " 42", "!", "  "}));
}

TEST(BoundedWorkTest, TextBetweenMatchesIsAPiece) {
  const auto pre_tokenizer = PreTokenizer::Create("\\p{N}").value();
  const std::string text = "ab12cd";
  EXPECT_EQ(pre_tokenizer->PieceLength(text, 0), 2u);
  EXPECT_EQ(pre_tokenizer->PieceLength(text, 2), 1u);
  EXPECT_EQ(pre_tokenizer->PieceLength(text, 4), 2u);
}

}  // namespace
}  // namespace bebop
