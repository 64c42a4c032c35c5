// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "engine/formats/strings.h"
#include "engine/tokenizer/utf8.h"

namespace bebop {

// A tokenizer.json whose byte tokens have the byte as id; then `ab` 256, `abc` 257, `aa` 258 (merged in the order ab, abc, aa) and the special
// token `<|end|>` 259. Qwen2's expression, NFC.
inline std::string SmallTokenizerJson() {
  std::string vocab;
  int stand_in = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const bool prints = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    std::string token;
    AppendUtf8(static_cast<char32_t>(prints ? byte : stand_in++), token);
    if (token == "\"" || token == "\\") token.insert(0, "\\");
    vocab += StrCat("\"", token, "\":", byte, ",");
  }
  return StrCat(
      R"({"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":259,"content":"<|end|>","single_word":false,"lstrip":false,)",
      R"("rstrip":false,"normalized":false,"special":true}],"normalizer":{"type":"NFC"},"pre_tokenizer":{"type":"Sequence","pretokenizers":[)",
      R"({"type":"Split","pattern":{"Regex":"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|)",
      R"(\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},"behavior":"Isolated","invert":false},{"type":"ByteLevel","add_prefix_space":false,)",
      R"("trim_offsets":false,"use_regex":false}]},"post_processor":null,"decoder":{"type":"ByteLevel"},"model":{"type":"BPE","dropout":null,)",
      R"("unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"vocab":{)", vocab,
      R"("ab":256,"abc":257,"aa":258},"merges":[["a","b"],["ab","c"],["a","a"]]}})");
}

}  // namespace bebop
