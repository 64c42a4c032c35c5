// SPDX-License-Identifier: Apache-2.0
// Any ids (two bytes each): the pieces are whole characters and add up to the text decoded at once.
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "engine/tokenizer/tokenizer.h"
#include "engine/tokenizer/utf8.h"
#include "kernels/common/check.h"
#include "tests/engine/tokenizer/small_tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto& tokenizer = *new auto(bebop::Tokenizer::FromJson(bebop::SmallTokenizerJson()).value());
  std::vector<uint32_t> ids;
  for (size_t i = 0; i + 1 < size; i += 2) ids.push_back(data[i] | static_cast<uint32_t>(data[i + 1] & 1) << 8);
  for (const bool skip_special : {false, true}) {
    bebop::IncrementalDecoder decoder(tokenizer.get(), skip_special);
    std::string text;
    for (const uint32_t id : ids) {
      const std::string piece = decoder.Push(id);
      std::string repaired;
      bebop::AppendReplacingInvalid(piece, false, repaired);
      BEBOP_CHECK(piece == repaired);
      text += piece;
    }
    text += decoder.Finish();
    BEBOP_CHECK(text == tokenizer->Decode(ids, skip_special));
  }
  return 0;
}
