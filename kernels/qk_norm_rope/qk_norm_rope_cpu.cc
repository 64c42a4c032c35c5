// SPDX-License-Identifier: Apache-2.0
#include "kernels/qk_norm_rope/qk_norm_rope.h"

#include <cmath>

#include "kernels/common/check.h"

namespace bebop::cpu {
namespace {

constexpr int32_t kMaxHeadDim = 256;

// Of one position: cos and sin of position·inv_freq_i.
struct Rotation {
  float cos[kMaxHeadDim / 2];
  float sin[kMaxHeadDim / 2];
};

// Element `offset` onwards of a k or v buffer <- source, in the buffer's type.
void Write(const float* source, int64_t count, DType dtype, void* buffer, int64_t offset) {
  if (dtype == DType::kFloat32) {
    float* out = static_cast<float*>(buffer) + offset;
    for (int64_t i = 0; i < count; ++i) out[i] = source[i];
  } else {
    BFloat16* out = static_cast<BFloat16*>(buffer) + offset;
    for (int64_t i = 0; i < count; ++i) out[i] = ToBFloat16(source[i]);
  }
}

}  // namespace
}  // namespace bebop::cpu

#define BEBOP_SIMD_SOURCE "kernels/qk_norm_rope/qk_norm_rope_simd.inc"
#include "kernels/common/simd_targets.inc"

namespace bebop::cpu {

void QkNormRope(const QkNormRopeArgs& args, ThreadPool& pool) { QkNormRopeWith(DetectInstructionSet(), args, pool); }

void QkNormRopeWith(InstructionSet set, const QkNormRopeArgs& args, ThreadPool& pool) {
  BEBOP_CHECK(args.head_dim > 0 && args.head_dim <= kMaxHeadDim);
  BEBOP_CHECK(args.rotary_dim >= 0 && args.rotary_dim <= args.head_dim && args.rotary_dim % 2 == 0);
  BEBOP_CHECK(args.batch.row_sequence != nullptr && args.batch.row_position != nullptr);
  const auto kernel = BEBOP_SIMD_SELECT(set, Rows);
  pool.ParallelFor(args.batch.num_rows, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace bebop::cpu
