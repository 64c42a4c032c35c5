// SPDX-License-Identifier: Apache-2.0
// Any bytes as text: ids in range, and without normalisation the decoded ids are the text with invalid UTF-8 replaced.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "engine/tokenizer/tokenizer.h"
#include "engine/tokenizer/utf8.h"
#include "kernels/common/check.h"
#include "tests/engine/tokenizer/small_tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto& tokenizers = *new auto([] {
    std::string json = bebop::SmallTokenizerJson();
    auto normalizing = bebop::Tokenizer::FromJson(json).value();
    const std::string_view normalizer = R"({"type":"NFC"})";
    json.replace(json.find(normalizer), normalizer.size(), "null");
    return std::pair(std::move(normalizing), bebop::Tokenizer::FromJson(json).value());
  }());
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  std::string valid;
  bebop::AppendReplacingInvalid(text, false, valid);
  for (const bool parse_special : {false, true}) {
    BEBOP_CHECK(tokenizers.second->Decode(tokenizers.second->Encode(text, parse_special), false) == valid);
    const auto ids = tokenizers.first->Encode(text, parse_special);
    for (const uint32_t id : ids) BEBOP_CHECK(static_cast<int64_t>(id) < tokenizers.first->vocab_size());
    // Normal text stays as it is.
    const std::string normal = tokenizers.first->Decode(ids, false);
    BEBOP_CHECK(tokenizers.first->Decode(tokenizers.first->Encode(normal, parse_special), false) == normal);
  }
  return 0;
}
