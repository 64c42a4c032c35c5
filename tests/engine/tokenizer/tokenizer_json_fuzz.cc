// SPDX-License-Identifier: Apache-2.0
// Any bytes as tokenizer.json: a status, or a tokenizer that encodes and decodes.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "engine/tokenizer/tokenizer.h"
#include "kernels/common/check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto tokenizer = bebop::Tokenizer::FromJson({reinterpret_cast<const char*>(data), size});
  if (!tokenizer.ok()) {
    BEBOP_CHECK(tokenizer.status().message().find('\n') == absl::string_view::npos);
    return 0;
  }
  const auto ids = (*tokenizer)->Encode("a <|end|> caf\xC3\xA9 12\n\n  'll \xFF", true);
  for (const uint32_t id : ids) BEBOP_CHECK(static_cast<int64_t>(id) < (*tokenizer)->vocab_size());
  (*tokenizer)->Decode(ids, false);
  return 0;
}
