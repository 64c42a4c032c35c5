// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/stream.h"

namespace bebop {

// One small write: `num_words` 32-bit words from ScatterArgs::words + source to `destination`, both aligned to 4 bytes.
struct ScatterWrite {
  void* destination = nullptr;
  int32_t source = 0;
  int32_t num_words = 0;
};

// Many small writes in one go: what the host changes about sequences between two iterations (a page more here, a new request
// there) would be dozens of copies of a few bytes, each with the price of a launch. Destinations must not overlap.
struct ScatterArgs {
  int32_t num_writes = 0;
  const ScatterWrite* writes = nullptr;  // [num_writes]
  const uint32_t* words = nullptr;
};

namespace cpu {
void Scatter(const ScatterArgs& args);
}  // namespace cpu
namespace cuda {
void Scatter(const ScatterArgs& args, Stream& stream);
}  // namespace cuda

}  // namespace bebop
