// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace bebop {

// Byte-level BPE as `tokenizer.json` describes it (normaliser, regex pre-tokeniser, merges, added tokens): equal to the Hugging Face
// `tokenizers` package, in time linear in the text. Immutable after loading; safe to use from any thread.
class Tokenizer {
 public:
  // Reads tokenizer.json. Anything it does not implement is refused by name (INVALID_ARGUMENT); NOT_FOUND if there is no file.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromFile(const std::string& path);
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromJson(std::string_view json);
  ~Tokenizer();

  // Token ids of `text`. Invalid UTF-8 is replaced by U+FFFD first (one per maximal bad prefix, as Python's errors="replace").
  // `parse_special`: special added tokens in the text become their ids; otherwise they are encoded as ordinary text.
  std::vector<uint32_t> Encode(std::string_view text, bool parse_special) const;

  // Text of `token_ids` as raw bytes, possibly not UTF-8. `skip_special` leaves special added tokens out. Unknown ids give nothing.
  std::string DecodeBytes(std::span<const uint32_t> token_ids, bool skip_special) const;
  // The same with invalid UTF-8 replaced by U+FFFD.
  std::string Decode(std::span<const uint32_t> token_ids, bool skip_special) const;

  // The bytes that one token stands for; empty for unknown ids.
  std::string_view TokenBytes(uint32_t token_id) const;
  bool IsSpecial(uint32_t token_id) const;
  int32_t vocab_size() const;  // 1 + the largest id

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Decodes a token stream piece by piece and never emits half a character: bytes that may still become a character are held back.
// The concatenation of all pieces and Finish() equals Tokenizer::Decode of all ids.
class IncrementalDecoder {
 public:
  // `tokenizer` must outlive the decoder.
  IncrementalDecoder(const Tokenizer* tokenizer, bool skip_special);
  // Text that has become certain with this token (may be empty).
  std::string Push(uint32_t token_id);
  // What is left, with an incomplete character as U+FFFD.
  std::string Finish();

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_;
  std::string pending_;
};

}  // namespace bebop
