// SPDX-License-Identifier: Apache-2.0
// Any bytes as a safetensors file: a status, or a header that tiles the file.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "engine/formats/safetensors.h"
#include "kernels/common/check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const auto header = bebop::ParseSafetensorsHeader(bytes, "file");
  if (header.ok()) {
    uint64_t end = 0;
    for (const bebop::TensorEntry& entry : header->tensors) {
      BEBOP_CHECK(end == 0 || entry.begin == end);
      BEBOP_CHECK(entry.begin <= entry.end && entry.end <= size);
      BEBOP_CHECK(entry.num_elements() * bebop::SafetensorsElementBytes(entry.dtype) == static_cast<int64_t>(entry.end - entry.begin));
      end = entry.end;
    }
    BEBOP_CHECK(end == 0 || end == size);
  } else {
    BEBOP_CHECK(header.status().message().find('\n') == absl::string_view::npos);
  }
  return 0;
}
