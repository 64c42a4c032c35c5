// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <string_view>

#include "absl/status/statusor.h"

namespace bebop {

// Cuts text into the pieces that BPE may not merge across, by the regular expression of a tokenizer.json (`Split` with behaviour
// `Isolated`, or the built-in one of `ByteLevel`).
//
// The expression must be an alternation of forms that the engine knows to run in linear time: those of the Qwen, Llama 3, cl100k and
// GPT-2 tokenizers (the table in pre_tokenizer.cc). RE2 matches them, with its Unicode tables; `\s+(?!\S)|\s+`, which needs a
// lookahead, is resolved here. Immutable; safe to use from any thread.
class PreTokenizer {
 public:
  // The expression that `ByteLevel` uses with use_regex.
  static constexpr std::string_view kGpt2Pattern =
      R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

  // INVALID_ARGUMENT naming the alternative that is not known.
  static absl::StatusOr<std::unique_ptr<PreTokenizer>> Create(std::string_view pattern);
  ~PreTokenizer();

  // Bytes of the piece of `text` that begins at `begin`, which must be 0 or the end of the piece before. Never 0.
  // REQUIRES: text is valid UTF-8, begin < text.size().
  size_t PieceLength(std::string_view text, size_t begin) const;

 private:
  struct Impl;
  explicit PreTokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace bebop
