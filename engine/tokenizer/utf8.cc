// SPDX-License-Identifier: Apache-2.0
#include "engine/tokenizer/utf8.h"

namespace bebop {

Utf8Char DecodeUtf8(std::string_view text) {
  const auto byte = [text](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return {lead, 1, true, false};
  if (lead < 0xC2 || lead > 0xF4) return {0, 1, false, false};
  const int32_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  // The second byte's range excludes overlong forms, surrogates and what lies above U+10FFFF.
  const uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  char32_t code_point = lead & (0xFF >> (length + 1));
  for (int32_t i = 1; i < length; ++i) {
    if (static_cast<size_t>(i) == text.size()) return {0, i, false, true};
    const uint8_t next = byte(static_cast<size_t>(i));
    if (next < (i == 1 ? low : 0x80) || next > (i == 1 ? high : 0xBF)) return {0, i, false, false};
    code_point = code_point << 6 | (next & 0x3F);
  }
  return {code_point, length, true, false};
}

void AppendUtf8(char32_t code_point, std::string& out) {
  const auto put = [&out](char32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (code_point < 0x80) {
    put(code_point);
    return;
  }
  if (code_point < 0x800) {
    put(0xC0 | code_point >> 6);
  } else {
    if (code_point < 0x10000) {
      put(0xE0 | code_point >> 12);
    } else {
      put(0xF0 | code_point >> 18);
      put(0x80 | (code_point >> 12 & 0x3F));
    }
    put(0x80 | (code_point >> 6 & 0x3F));
  }
  put(0x80 | (code_point & 0x3F));
}

size_t AppendReplacingInvalid(std::string_view text, bool hold_back, std::string& out) {
  size_t good_begin = 0, i = 0;
  while (i < text.size()) {
    const Utf8Char next = DecodeUtf8(text.substr(i));
    if (next.valid) {
      i += static_cast<size_t>(next.length);
      continue;
    }
    out.append(text.substr(good_begin, i - good_begin));
    if (next.cut_off && hold_back) return i;
    out.append("\xEF\xBF\xBD");
    i += static_cast<size_t>(next.length);
    good_begin = i;
  }
  out.append(text.substr(good_begin));
  return text.size();
}

}  // namespace bebop
