// SPDX-License-Identifier: Apache-2.0
// Any bytes as model.safetensors.index.json: a status, or file names that stay in the folder.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "engine/formats/safetensors.h"
#include "kernels/common/check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto index = bebop::ParseSafetensorsIndex({reinterpret_cast<const char*>(data), size}, "index");
  if (!index.ok()) return 0;
  BEBOP_CHECK(!index->weight_map.empty());
  for (const auto& [tensor, file] : index->weight_map) {
    BEBOP_CHECK(!file.empty() && file.find('/') == std::string::npos && file != "." && file != "..");
  }
  return 0;
}
