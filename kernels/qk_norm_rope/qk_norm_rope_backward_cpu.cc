// SPDX-License-Identifier: Apache-2.0
#include "kernels/qk_norm_rope/qk_norm_rope_backward.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/common/check.h"

namespace bebop::cpu {
namespace {

constexpr int64_t kBlockRows = 64;  // rows whose part of the weight gradients is summed before the blocks are
constexpr int32_t kMaxHeadDim = 256;

// Of one position: cos and sin of position·inv_freq_i, as in the forward.
struct Rotation {
  float cos[kMaxHeadDim / 2];
  float sin[kMaxHeadDim / 2];
};

}  // namespace
}  // namespace bebop::cpu

#define BEBOP_SIMD_SOURCE "kernels/qk_norm_rope/qk_norm_rope_backward_simd.inc"
#include "kernels/common/simd_targets.inc"

namespace bebop::cpu {

void QkNormRopeBackward(const QkNormRopeBackwardArgs& args, ThreadPool& pool) {
  QkNormRopeBackwardWith(DetectInstructionSet(), args, pool);
}

void QkNormRopeBackwardWith(InstructionSet set, const QkNormRopeBackwardArgs& args, ThreadPool& pool) {
  const int64_t rows = args.q_gate.rows, dim = args.head_dim, num_blocks = (rows + kBlockRows - 1) / kBlockRows;
  BEBOP_CHECK(dim > 0 && dim <= kMaxHeadDim && args.rotary_dim >= 0 && args.rotary_dim <= dim && args.rotary_dim % 2 == 0);
  BEBOP_CHECK(args.dq.rows == rows && args.dq.cols == args.num_q_heads * dim && args.q_gate.cols == 2 * args.dq.cols);
  BEBOP_CHECK(args.dk.rows == rows && args.dk.cols == args.num_kv_heads * dim && args.k.cols == args.dk.cols);
  std::vector<float> partial(static_cast<size_t>(num_blocks * 2 * dim), 0.0f);  // q's and k's
  const auto kernel = BEBOP_SIMD_SELECT(set, QkBackwardBlock);
  pool.ParallelFor(num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* sums = partial.data() + block * 2 * dim;
      kernel(args, block * kBlockRows, std::min(rows, (block + 1) * kBlockRows), sums, sums + dim);
    }
  });
  for (int64_t block = 0; block < num_blocks; ++block) {
    const float* sums = partial.data() + block * 2 * dim;
    for (int64_t i = 0; i < dim; ++i) {
      args.dq_norm[i] += sums[i];
      args.dk_norm[i] += sums[dim + i];
    }
  }
}

}  // namespace bebop::cpu
