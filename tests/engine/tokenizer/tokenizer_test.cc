// SPDX-License-Identifier: Apache-2.0
#include "engine/tokenizer/tokenizer.h"

#include <gtest/gtest.h>

#include <charconv>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "engine/formats/strings.h"
#include "engine/tokenizer/utf8.h"
#include "tests/engine/tokenizer/small_tokenizer.h"

namespace bebop {
namespace {

constexpr char kGoldens[] = "tests/golden/tokenizer/";

std::vector<std::string> Lines(const std::string& path) {
  std::ifstream file(path);
  EXPECT_TRUE(file.good()) << path;
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  return lines;
}

std::vector<std::string> SplitAt(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

uint64_t Hash(std::string_view bytes) {
  uint64_t hash = 0xCBF29CE484222325u;
  for (const char c : bytes) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001B3u;
  return hash;
}
uint64_t Hash(const std::vector<uint32_t>& ids) {
  std::string bytes;
  for (const uint32_t id : ids) {
    for (int shift = 0; shift < 32; shift += 8) bytes.push_back(static_cast<char>(id >> shift));
  }
  return Hash(bytes);
}
uint64_t Hex(std::string_view text) {
  uint64_t value = 0;
  std::from_chars(text.data(), text.data() + text.size(), value, 16);
  return value;
}

std::string FromHex(std::string_view hex) {
  std::string bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2) bytes.push_back(static_cast<char>(Hex(hex.substr(i, 2))));
  return bytes;
}

// A line of strings.txt as its bytes (tests/golden/tokenizer_golden.py says how).
std::string Render(const std::string& line) {
  std::string text;
  for (const std::string& segment : SplitAt(line, ' ')) {
    const std::string body = segment.substr(1);
    if (segment[0] == 'x') {
      const size_t star = body.find('*');
      const std::string unit = FromHex(body.substr(0, star));
      const int64_t count = star == std::string::npos ? 1 : std::atoll(body.c_str() + star + 1);
      for (int64_t i = 0; i < count; ++i) text += unit;
    } else {
      const size_t dash = body.find('-'), colon = body.find(':');
      const std::string separator = FromHex(body.substr(colon + 1));
      const uint64_t last = Hex(body.substr(dash + 1, colon - dash - 1));
      for (uint64_t code_point = Hex(body.substr(0, dash)); code_point <= last; ++code_point) {
        if (code_point >= 0xD800 && code_point <= 0xDFFF) continue;
        AppendUtf8(static_cast<char32_t>(code_point), text);
        text += separator;
      }
    }
  }
  return text;
}

std::vector<uint32_t> Ids(const std::string& text) {
  std::vector<uint32_t> ids;
  for (const std::string& id : SplitAt(text, ' ')) ids.push_back(static_cast<uint32_t>(std::atol(id.c_str())));
  return ids;
}

std::string DecodeInPieces(const Tokenizer& tokenizer, const std::vector<uint32_t>& ids, bool skip_special) {
  IncrementalDecoder decoder(&tokenizer, skip_special);
  std::string text;
  for (const uint32_t id : ids) {
    const std::string piece = decoder.Push(id);
    // A piece is whole characters.
    std::string repaired;
    AppendReplacingInvalid(piece, false, repaired);
    EXPECT_EQ(piece, repaired);
    text += piece;
  }
  return text + decoder.Finish();
}

class GoldenTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    auto tokenizer = Tokenizer::FromFile(StrCat(kGoldens, GetParam(), ".json"));
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = *std::move(tokenizer);
  }
  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_P(GoldenTest, StringsEqualTheTokenizersPackage) {
  const std::vector<std::string> strings = Lines(StrCat(kGoldens, "strings.txt"));
  const std::vector<std::string> goldens = Lines(StrCat(kGoldens, GetParam(), ".strings.tsv"));
  ASSERT_EQ(strings.size(), goldens.size());
  ASSERT_GE(strings.size(), 2000u);
  for (size_t i = 0; i < strings.size(); ++i) {
    const std::vector<std::string> golden = SplitAt(goldens[i], '\t');
    const std::string text = Render(strings[i]);
    const std::vector<uint32_t> parsed = tokenizer_->Encode(text, /*parse_special=*/true);
    EXPECT_EQ(StrCat(parsed.size()), golden[0]) << strings[i];
    EXPECT_EQ(Hash(parsed), Hex(golden[1])) << strings[i];
    EXPECT_EQ(Hash(tokenizer_->Decode(parsed, /*skip_special=*/true)), Hex(golden[4])) << strings[i];
    if (text.size() > 100'000) continue;  // half the time; special tokens are rare in runs
    const std::vector<uint32_t> plain = tokenizer_->Encode(text, /*parse_special=*/false);
    EXPECT_EQ(StrCat(plain.size()), golden[2]) << strings[i];
    EXPECT_EQ(Hash(plain), Hex(golden[3])) << strings[i];
  }
}

TEST_P(GoldenTest, IdsDecodeAsInTheTokenizersPackage) {
  const std::vector<std::string> goldens = Lines(StrCat(kGoldens, GetParam(), ".ids.tsv"));
  ASSERT_GE(goldens.size(), 300u);
  for (const std::string& line : goldens) {
    const std::vector<std::string> golden = SplitAt(line, '\t');
    const std::vector<uint32_t> ids = Ids(golden[0]);
    for (const bool skip_special : {false, true}) {
      const std::string text = tokenizer_->Decode(ids, skip_special);
      EXPECT_EQ(Hash(text), Hex(golden[skip_special ? 2 : 1])) << line;
      EXPECT_EQ(DecodeInPieces(*tokenizer_, ids, skip_special), text) << line;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, GoldenTest, testing::Values("qwen2", "qwen35", "llama3", "gpt2"));

TEST(TokenizerTest, BundledModelRoundTrips) {
  const auto tokenizer = Tokenizer::FromFile("tests/models/bebop-tiny/tokenizer.json");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  for (const std::string text : {"<|im_start|>user\n12 + 30 = ?<|im_end|>\n", "na\xC3\xAFve \xF0\x9F\x98\x80\n\n  x", ""}) {
    const std::vector<uint32_t> ids = (*tokenizer)->Encode(text, true);
    EXPECT_EQ((*tokenizer)->Decode(ids, false), text);
    EXPECT_EQ(DecodeInPieces(**tokenizer, ids, false), text);
  }
  const std::vector<uint32_t> special = (*tokenizer)->Encode("<|im_end|>", true);
  ASSERT_EQ(special.size(), 1u);
  EXPECT_TRUE((*tokenizer)->IsSpecial(special[0]));
  EXPECT_EQ((*tokenizer)->TokenBytes(special[0]), "<|im_end|>");
  EXPECT_EQ((*tokenizer)->Decode(special, true), "");
  EXPECT_GT((*tokenizer)->Encode("<|im_end|>", false).size(), 1u);
}

TEST(TokenizerTest, HalfACharacterIsHeldBack) {
  const auto tokenizer = Tokenizer::FromJson(SmallTokenizerJson()).value();
  IncrementalDecoder decoder(tokenizer.get(), true);
  // U+1F600 is f0 9f 98 80; ids of bytes are the bytes.
  EXPECT_EQ(decoder.Push(0xF0), "");
  EXPECT_EQ(decoder.Push(0x9F), "");
  EXPECT_EQ(decoder.Push(0x98), "");
  EXPECT_EQ(decoder.Push(0x80), "\xF0\x9F\x98\x80");
  EXPECT_EQ(decoder.Push('a'), "a");
  EXPECT_EQ(decoder.Push(0xE4), "");
  EXPECT_EQ(decoder.Push('b'), "\xEF\xBF\xBD" "b");  // it will never become one
  EXPECT_EQ(decoder.Push(0xC3), "");
  EXPECT_EQ(decoder.Finish(), "\xEF\xBF\xBD");
  EXPECT_EQ(decoder.Finish(), "");
}

TEST(TokenizerTest, UnknownIdsGiveNothing) {
  const auto tokenizer = Tokenizer::FromJson(SmallTokenizerJson()).value();
  EXPECT_EQ(tokenizer->vocab_size(), 260);
  const std::vector<uint32_t> ids = {'a', 260, 0xFFFFFFFF, 'b'};
  EXPECT_EQ(tokenizer->Decode(ids, false), "ab");
  EXPECT_EQ(tokenizer->TokenBytes(260), "");
  EXPECT_FALSE(tokenizer->IsSpecial(0xFFFFFFFF));
}

TEST(TokenizerTest, MergesByRankThenLeftmost) {
  const auto tokenizer = Tokenizer::FromJson(SmallTokenizerJson()).value();  // merges: a b, ab c, a a
  const auto encode = [&](std::string_view text) { return tokenizer->Encode(text, true); };
  EXPECT_EQ(encode("abc"), (std::vector<uint32_t>{257}));
  EXPECT_EQ(encode("aab"), (std::vector<uint32_t>{'a', 256}));    // a b ranks before a a
  EXPECT_EQ(encode("aaa"), (std::vector<uint32_t>{258, 'a'}));    // leftmost first
  EXPECT_EQ(encode("ab<|end|>ab"), (std::vector<uint32_t>{256, 259, 256}));
}

TEST(TokenizerTest, FileErrorsNameTheFile) {
  const absl::Status missing = Tokenizer::FromFile("/nonexistent/tokenizer.json").status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kNotFound);
  EXPECT_NE(missing.message().find("/nonexistent/tokenizer.json"), absl::string_view::npos);
}

struct BadTokenizer {
  const char* name;
  const char* from;  // replaced in the good JSON
  const char* to;
  const char* message;
};

TEST(TokenizerTest, RefusesByNameWhatItDoesNotImplement) {
  const std::vector<BadTokenizer> cases = {
      {"NotJson", "{", "[", "not valid JSON"},
      {"Normalizer", R"({"type":"NFC"})", R"({"type":"NFKC"})", "normalizer"},
      {"NormalizerStep", R"({"type":"NFC"})", R"({"type":"Sequence","normalizers":[{"type":"Lowercase"}]})", "\"Lowercase\""},
      {"NormalizerName", R"({"type":"NFC"})", R"({"type":"NFKC"})", "\"NFKC\""},
      {"PreTokenizer", R"("type":"Split")", R"("type":"Digits")", "\"Digits\""},
      {"NoPreTokenizer", R"("pre_tokenizer":)", R"("other":)", "pre_tokenizer"},
      {"Regex", R"(\\p{N}|)", R"((a+)+b|)", "alternative \"(a+)+b\""},
      {"BackReference", R"(\\p{N}|)", R"((.)\\1|)", "is not implemented"},
      {"Lookahead", R"(\\s+(?!\\S)|\\s+)", R"(\\s+(?!\\S))", "alternative"},
      {"EmptyRegex", R"(\\p{N}|)", R"(|)", "alternative \"\""},
      {"Behavior", R"("Isolated")", R"("Removed")", "behavior"},
      {"Invert", R"("invert":false)", R"("invert":true)", "invert"},
      {"UseRegex", R"("use_regex":false)", R"("use_regex":true)", "use_regex"},
      {"PrefixSpace", R"("add_prefix_space":false)", R"("add_prefix_space":true)", "add_prefix_space"},
      {"Decoder", R"("decoder":{"type":"ByteLevel"})", R"("decoder":{"type":"WordPiece"})", "\"WordPiece\""},
      {"NoDecoder", R"("decoder":{"type":"ByteLevel"})", R"("decoder":null)", "decoder"},
      {"PostProcessor", R"("post_processor":null)", R"("post_processor":{"type":"TemplateProcessing"})", "\"TemplateProcessing\""},
      {"Truncation", R"("truncation":null)", R"("truncation":{"max_length":3})", "truncation"},
      {"Padding", R"("padding":null)", R"("padding":{})", "padding"},
      {"Model", R"("type":"BPE")", R"("type":"Unigram")", "\"Unigram\""},
      {"NoModel", R"("model":)", R"("modell":)", "model"},
      {"Dropout", R"("dropout":null)", R"("dropout":0.1)", "dropout"},
      {"ByteFallback", R"("byte_fallback":false)", R"("byte_fallback":true)", "byte_fallback"},
      {"Prefix", R"("continuing_subword_prefix":null)", R"("continuing_subword_prefix":"##")", "continuing_subword_prefix"},
      {"Suffix", R"("end_of_word_suffix":null)", R"("end_of_word_suffix":"</w>")", "end_of_word_suffix"},
      {"MissingByte", R"("a":97)", R"("xyz":97)", "byte 97"},
      {"TokenTwice", R"("ab":256)", R"("a":256)", "duplicate key \"a\""},
      {"IdTwice", R"("ab":256)", R"("ab":97)", "id 97"},
      {"NegativeId", R"("ab":256)", R"("ab":-1)", "\"ab\""},
      {"HugeId", R"("ab":256)", R"("ab":4000000000)", "got 4000000000"},
      {"IdNoInteger", R"("ab":256)", R"("ab":1.5)", "got 1.5"},
      {"MergeUnknown", R"(["a","b"])", R"(["a","zz"])", "merges[0]"},
      {"MergeResultUnknown", R"(["a","b"])", R"(["b","b"])", "\"bb\""},
      {"MergeThreeParts", R"(["a","b"])", R"("a b c")", "merges[0]"},
      {"MergeNoPair", R"(["a","b"])", R"(["a"])", "two tokens"},
      {"AddedStrip", R"("lstrip":false)", R"("lstrip":true)", "lstrip"},
      {"AddedRightStrip", R"("rstrip":false)", R"("rstrip":true)", "rstrip"},
      {"AddedWord", R"("single_word":false)", R"("single_word":true)", "single_word"},
      {"AddedEmpty", R"("content":"<|end|>")", R"("content":"")", "content"},
      {"AddedIdTaken", R"("id":259)", R"("id":256)", "\"ab\""},
      {"AddedOtherId", R"("content":"<|end|>")", R"("content":"ab")", "256"},
      {"AddedNoList", R"("added_tokens":[)", R"("added_tokens":3,"x":[)", "added_tokens"},
  };
  const std::string good = SmallTokenizerJson();
  ASSERT_TRUE(Tokenizer::FromJson(good).ok()) << Tokenizer::FromJson(good).status();
  for (const BadTokenizer& bad : cases) {
    SCOPED_TRACE(bad.name);
    std::string json = good;
    const size_t place = json.find(bad.from);
    ASSERT_NE(place, std::string::npos);
    json.replace(place, std::string_view(bad.from).size(), bad.to);
    const absl::Status status = Tokenizer::FromJson(json).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    const std::string message(status.message());
    EXPECT_NE(message.find(bad.message), std::string::npos) << message;
    EXPECT_TRUE(message.starts_with("tokenizer.json: ")) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos);
  }
}

TEST(TokenizerTest, MergesMayBeStrings) {
  std::string json = SmallTokenizerJson();
  const std::string pair = R"(["a","b"])";
  json.replace(json.find(pair), pair.size(), R"("a b")");
  const auto tokenizer = Tokenizer::FromJson(json);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->Encode("abc", true), (std::vector<uint32_t>{257}));
}

}  // namespace
}  // namespace bebop
