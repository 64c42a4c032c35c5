// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace bebop {

// The code point at the start of `text`.
struct Utf8Char {
  char32_t code_point = 0;
  int32_t length = 0;    // bytes it takes; of a malformed one: its maximal bad prefix (>= 1)
  bool valid = false;
  bool cut_off = false;  // malformed only because the text ends here
};

// Decodes by table 3-7 of the Unicode standard: no surrogates, no overlong forms, nothing above U+10FFFF.
// REQUIRES: text is not empty.
Utf8Char DecodeUtf8(std::string_view text);

void AppendUtf8(char32_t code_point, std::string& out);

// Appends `text` with every maximal bad prefix replaced by U+FFFD (as Python's errors="replace" and Rust's from_utf8_lossy do).
// With `hold_back`, an incomplete character at the very end is not replaced but left out; returns the bytes consumed.
size_t AppendReplacingInvalid(std::string_view text, bool hold_back, std::string& out);

}  // namespace bebop
