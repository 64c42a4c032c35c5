// SPDX-License-Identifier: Apache-2.0
#include "engine/tokenizer/pre_tokenizer.h"

#include <re2/re2.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "engine/formats/strings.h"
#include "engine/tokenizer/utf8.h"

namespace bebop {
namespace {

constexpr std::string_view kLineEnds = R"(\s*[\r\n]+)";
constexpr std::string_view kTrailingSpace = R"(\s+(?!\S))";
constexpr std::string_view kSpace = R"(\s+)";
// White_Space, as the regular expressions of tokenizer.json mean `\s`; RE2's own is ASCII.
constexpr std::string_view kSpaceClass = R"(\t\n\v\f\r \x{85}\p{Z})";

// The alternatives that are implemented. Each either consumes all it looks at but one character, or fails at once; except kLineEnds,
// which may look at a whole run of blanks in vain: kSpace then consumes that run, so no character is looked at more than a few times.
constexpr std::string_view kAlternatives[] = {
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d))",
    R"('(?i:[sdmt]|ll|ve|re))",
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    R"([^\r\n\p{L}\p{N}]?\p{L}+)",
    R"([^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+)",
    R"( ?\p{L}+)",
    R"(\p{N})",
    R"(\p{N}{1,3})",
    R"( ?\p{N}+)",
    R"( ?[^\s\p{L}\p{N}]+[\r\n]*)",
    R"( ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*)",
    R"( ?[^\s\p{L}\p{N}]+[\r\n/]*)",
    R"( ?[^\s\p{L}\p{N}]+)",
    kLineEnds,
};

// Cuts at every `|` that stands in no group and no class.
std::vector<std::string_view> TopLevelAlternatives(std::string_view pattern) {
  std::vector<std::string_view> alternatives;
  size_t begin = 0;
  int depth = 0;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c == '\\') {
      ++i;
    } else if (in_class) {
      in_class = c != ']';
    } else if (c == '[') {
      in_class = true;
    } else if (c == '(') {
      ++depth;
    } else if (c == ')') {
      --depth;
    } else if (c == '|' && depth == 0) {
      alternatives.push_back(pattern.substr(begin, i - begin));
      begin = i + 1;
    }
  }
  alternatives.push_back(pattern.substr(std::min(begin, pattern.size())));
  return alternatives;
}

// `\s` in RE2's spelling, inside a class or alone.
std::string TranslateSpace(std::string_view alternative) {
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < alternative.size(); ++i) {
    if (alternative.substr(i).starts_with("\\s")) {
      out += in_class ? std::string(kSpaceClass) : StrCat("[", kSpaceClass, "]");
      ++i;
      continue;
    }
    if (alternative[i] == '[') in_class = true;
    if (alternative[i] == ']') in_class = false;
    out += alternative[i];
  }
  return out;
}

// Length of the match of `expression` at text[begin...]; 0 for none.
size_t MatchLength(const RE2& expression, std::string_view text, size_t begin) {
  const re2::StringPiece input(text.data() + begin, text.size() - begin);
  re2::StringPiece match;
  return expression.Match(input, 0, input.size(), RE2::ANCHOR_START, &match, 1) ? match.size() : 0;
}

}  // namespace

struct PreTokenizer::Impl {
  std::unique_ptr<RE2> words;   // all alternatives but those of blanks; null: none
  std::unique_ptr<RE2> blanks;  // \s+; null: the expression has none
  bool leaves_last_blank = false;  // \s+(?!\S) comes before \s+

  // Length of the match of the whole expression at text[begin...]; 0 for none.
  size_t Match(std::string_view text, size_t begin) const {
    if (words != nullptr) {
      if (const size_t length = MatchLength(*words, text, begin); length > 0) return length;
    }
    if (blanks == nullptr) return 0;
    size_t length = MatchLength(*blanks, text, begin);
    if (length == 0 || !leaves_last_blank || begin + length == text.size()) return length;
    // Something follows the run: \s+(?!\S) gives up the last blank, unless it is the only one and plain \s+ takes it.
    size_t last = length - 1;
    while (last > 0 && (static_cast<uint8_t>(text[begin + last]) & 0xC0) == 0x80) --last;
    return last > 0 ? last : length;
  }
};

PreTokenizer::PreTokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
PreTokenizer::~PreTokenizer() = default;

absl::StatusOr<std::unique_ptr<PreTokenizer>> PreTokenizer::Create(std::string_view pattern) {
  const auto refuse = [](std::string_view alternative, std::string_view why) {
    return absl::InvalidArgumentError(StrCat("regular expression: alternative ", Quoted(alternative), " ", why));
  };
  auto impl = std::make_unique<Impl>();
  std::vector<std::string_view> alternatives = TopLevelAlternatives(pattern);
  bool has_blanks = false;
  if (alternatives.back() == kSpace) {
    has_blanks = true;
    alternatives.pop_back();
    if (!alternatives.empty() && alternatives.back() == kTrailingSpace) {
      impl->leaves_last_blank = true;
      alternatives.pop_back();
    }
  }
  std::string words;
  for (const std::string_view alternative : alternatives) {
    if (alternative == kTrailingSpace || alternative == kSpace) return refuse(alternative, R"(is implemented only in "\s+(?!\S)|\s+" at the end)");
    if (std::find(std::begin(kAlternatives), std::end(kAlternatives), alternative) == std::end(kAlternatives)) {
      return refuse(alternative, "is not implemented");
    }
    if (alternative == kLineEnds && !has_blanks) return refuse(alternative, R"(is implemented only with "\s+" at the end)");
    words += StrCat(words.empty() ? "" : "|", TranslateSpace(alternative));
  }
  RE2::Options options;
  options.set_log_errors(false);
  if (!words.empty()) impl->words = std::make_unique<RE2>(words, options);
  if (has_blanks) impl->blanks = std::make_unique<RE2>(TranslateSpace(kSpace), options);
  if ((impl->words != nullptr && !impl->words->ok()) || (impl->blanks != nullptr && !impl->blanks->ok())) {
    return refuse(pattern, "does not compile");
  }
  return std::unique_ptr<PreTokenizer>(new PreTokenizer(std::move(impl)));
}

size_t PreTokenizer::PieceLength(std::string_view text, size_t begin) const {
  if (const size_t length = impl_->Match(text, begin); length > 0) return length;
  // Text between two matches is a piece of its own.
  size_t end = begin;
  do {
    end += static_cast<size_t>(DecodeUtf8(text.substr(end)).length);
  } while (end < text.size() && impl_->Match(text, end) == 0);
  return end - begin;
}

}  // namespace bebop
