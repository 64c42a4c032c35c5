// SPDX-License-Identifier: Apache-2.0
#include "kernels/swiglu/swiglu.h"

#include <cmath>

#include "kernels/common/check.h"

namespace bebop::cpu {

void SwiGlu(const SwiGluArgs& args, ThreadPool& pool) {
  BEBOP_CHECK(args.gate.cols == args.up.cols && args.gate.cols == args.out.cols);
  pool.ParallelFor(args.gate.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* gate = args.gate.Row<float>(row);
      const float* up = args.up.Row<float>(row);
      float* out = args.out.Row<float>(row);
      for (int64_t i = 0; i < args.gate.cols; ++i) out[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    }
  });
}

}  // namespace bebop::cpu
