// SPDX-License-Identifier: Apache-2.0
#include "kernels/rms_norm/rms_norm_backward.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/common/check.h"

namespace bebop::cpu {
namespace {

constexpr int64_t kBlockRows = 64;  // rows whose part of dweight is summed before the blocks are

}  // namespace
}  // namespace bebop::cpu

#define BEBOP_SIMD_SOURCE "kernels/rms_norm/rms_norm_backward_simd.inc"
#include "kernels/common/simd_targets.inc"

namespace bebop::cpu {

void RmsNormBackward(const RmsNormBackwardArgs& args, ThreadPool& pool) {
  RmsNormBackwardWith(DetectInstructionSet(), args, pool);
}

void RmsNormBackwardWith(InstructionSet set, const RmsNormBackwardArgs& args, ThreadPool& pool) {
  const int64_t rows = args.x.rows, width = args.x.cols, num_blocks = (rows + kBlockRows - 1) / kBlockRows;
  BEBOP_CHECK(width > 0 && args.dy.rows == rows && args.dy.cols == width);
  BEBOP_CHECK(args.dx.data == nullptr || (args.dx.rows == rows && args.dx.cols == width));
  std::vector<float> partial(static_cast<size_t>(num_blocks * width), 0.0f);
  const auto kernel = BEBOP_SIMD_SELECT(set, NormBackwardBlock);
  pool.ParallelFor(num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      kernel(args, block * kBlockRows, std::min(rows, (block + 1) * kBlockRows), partial.data() + block * width);
    }
  });
  for (int64_t block = 0; block < num_blocks; ++block) {
    for (int64_t i = 0; i < width; ++i) args.dweight[i] += partial[static_cast<size_t>(block * width + i)];
  }
}

}  // namespace bebop::cpu
