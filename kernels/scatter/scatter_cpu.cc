// SPDX-License-Identifier: Apache-2.0
#include "kernels/scatter/scatter.h"

#include <cstring>

namespace bebop::cpu {

void Scatter(const ScatterArgs& args) {
  for (int32_t i = 0; i < args.num_writes; ++i) {
    const ScatterWrite& write = args.writes[i];
    std::memcpy(write.destination, args.words + write.source, static_cast<size_t>(write.num_words) * sizeof(uint32_t));
  }
}

}  // namespace bebop::cpu
