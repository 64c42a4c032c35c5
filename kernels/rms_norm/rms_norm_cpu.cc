// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "kernels/common/check.h"
#include "kernels/common/simd.h"
#include "kernels/rms_norm/rms_norm.h"

namespace bebop::cpu {
namespace {

using simd::Floats;
using simd::kWidth;

// Work (floats) that is worth waking a thread for.
constexpr int64_t kGrain = 8192;

template <class Set>
BEBOP_SIMD_INLINE float InverseRms(const float* x, int64_t count, float eps) {
  return static_cast<float>(1.0 / std::sqrt(simd::SumOfSquares<Set>(x, count) / static_cast<double>(count) + static_cast<double>(eps)));
}

template <class Set>
BEBOP_SIMD_INLINE void NormRows(const RmsNormArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.x.cols;
  for (int64_t row = begin; row < end; ++row) {
    float* x = args.x.Row<float>(row);
    if (args.residual.data != nullptr) {
      const float* residual = args.residual.Row<float>(row);
      for (int64_t i = 0; i < width; i += kWidth) {
        simd::StorePartial(simd::LoadPartial<Set>(x + i, width - i) + simd::LoadPartial<Set>(residual + i, width - i), x + i, width - i);
      }
    }
    const Floats<Set> scale = simd::Broadcast<Set>(InverseRms<Set>(x, width, args.eps)), one = simd::Broadcast<Set>(1.0f);
    float* out = args.out.Row<float>(row);
    for (int64_t i = 0; i < width; i += kWidth) {
      const Floats<Set> weight = one + simd::LoadPartial<Set>(args.weight + i, width - i);
      simd::StorePartial(simd::LoadPartial<Set>(x + i, width - i) * scale * weight, out + i, width - i);
    }
  }
}
BEBOP_SIMD_RANGE_KERNEL(NormRows, RmsNormArgs)

// An item is one head of one row.
template <class Set>
BEBOP_SIMD_INLINE void GatedNormHeads(const GatedRmsNormArgs& args, int64_t begin, int64_t end) {
  const int64_t dim = args.head_dim, num_heads = args.x.cols / dim;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / num_heads, offset = item % num_heads * dim;
    const float* x = args.x.Row<float>(row) + offset;
    const float* gate = args.gate.Row<float>(row) + offset;
    float* out = args.out.Row<float>(row) + offset;
    const Floats<Set> scale = simd::Broadcast<Set>(InverseRms<Set>(x, dim, args.eps));
    for (int64_t i = 0; i < dim; i += kWidth) {
      const Floats<Set> normed =
          simd::LoadPartial<Set>(x + i, dim - i) * scale * simd::LoadPartial<Set>(args.weight + i, dim - i);
      simd::StorePartial(normed * simd::Silu(simd::LoadPartial<Set>(gate + i, dim - i)), out + i, dim - i);
    }
  }
}
BEBOP_SIMD_RANGE_KERNEL(GatedNormHeads, GatedRmsNormArgs)

}  // namespace

void RmsNorm(const RmsNormArgs& args, ThreadPool& pool) { RmsNormWith(DetectInstructionSet(), args, pool); }

void RmsNormWith(InstructionSet set, const RmsNormArgs& args, ThreadPool& pool) {
  BEBOP_CHECK(args.x.cols > 0 && args.out.rows == args.x.rows && args.out.cols == args.x.cols);
  const auto kernel = NormRowsFor(set);
  pool.ParallelFor(args.x.rows, kGrain / args.x.cols + 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void GatedRmsNorm(const GatedRmsNormArgs& args, ThreadPool& pool) { GatedRmsNormWith(DetectInstructionSet(), args, pool); }

void GatedRmsNormWith(InstructionSet set, const GatedRmsNormArgs& args, ThreadPool& pool) {
  BEBOP_CHECK(args.head_dim > 0 && args.x.cols % args.head_dim == 0);
  BEBOP_CHECK(args.gate.cols == args.x.cols && args.out.cols == args.x.cols);
  const auto kernel = GatedNormHeadsFor(set);
  pool.ParallelFor(args.x.rows * (args.x.cols / args.head_dim), kGrain / args.head_dim + 1,
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace bebop::cpu
