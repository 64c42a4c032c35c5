// SPDX-License-Identifier: Apache-2.0
#include "kernels/qk_norm_rope/qk_norm_rope.h"

#include <cmath>

#include "kernels/common/check.h"
#include "kernels/common/simd.h"

namespace bebop::cpu {
namespace {

using simd::Floats;
using simd::kWidth;

constexpr int32_t kMaxHeadDim = 256;

// Of one position: cos and sin of position·inv_freq_i.
struct Rotation {
  float cos[kMaxHeadDim / 2];
  float sin[kMaxHeadDim / 2];
};

template <class Set>
BEBOP_SIMD_INLINE void NormRotate(const float* x, const float* weight, const QkNormRopeArgs& args, const Rotation& rotation, float* out) {
  const int64_t dim = args.head_dim, half = args.rotary_dim / 2;
  const double mean = simd::SumOfSquares<Set>(x, dim) / static_cast<double>(dim);
  const Floats<Set> scale = simd::Broadcast<Set>(static_cast<float>(1.0 / std::sqrt(mean + static_cast<double>(args.eps))));
  const Floats<Set> one = simd::Broadcast<Set>(1.0f);
  for (int64_t i = 0; i < dim; i += kWidth) {
    const Floats<Set> weights = one + simd::LoadPartial<Set>(weight + i, dim - i);
    simd::StorePartial(simd::LoadPartial<Set>(x + i, dim - i) * scale * weights, out + i, dim - i);
  }
  for (int64_t i = 0; i < half; i += kWidth) {
    const int64_t count = half - i;
    const Floats<Set> low = simd::LoadPartial<Set>(out + i, count), high = simd::LoadPartial<Set>(out + half + i, count);
    const Floats<Set> cos = simd::LoadPartial<Set>(rotation.cos + i, count), sin = simd::LoadPartial<Set>(rotation.sin + i, count);
    simd::StorePartial(low * cos - high * sin, out + i, count);
    simd::StorePartial(high * cos + low * sin, out + half + i, count);
  }
}

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

// An item is a row.
template <class Set>
BEBOP_SIMD_INLINE void Rows(const QkNormRopeArgs& args, int64_t begin, int64_t end) {
  const int64_t dim = args.head_dim;
  const int32_t half = args.rotary_dim / 2;
  double inv_freq[kMaxHeadDim / 2];
  for (int32_t i = 0; i < half; ++i) inv_freq[i] = std::pow(args.rope_theta, -2.0 * i / args.rotary_dim);
  Rotation rotation;
  float key[kMaxHeadDim];
  for (int64_t row = begin; row < end; ++row) {
    const int32_t position = args.batch.row_position[row];
    for (int32_t i = 0; i < half; ++i) {
      const double angle = position * inv_freq[i];
      rotation.cos[i] = static_cast<float>(std::cos(angle));
      rotation.sin[i] = static_cast<float>(std::sin(angle));
    }
    for (int32_t h = 0; h < args.num_q_heads; ++h) {
      NormRotate<Set>(args.q_gate.Row<float>(row) + h * 2 * dim, args.q_norm, args, rotation, args.q_out.Row<float>(row) + h * dim);
    }
    const SequenceRows& sequence = args.batch.sequences[args.batch.row_sequence[row]];
    for (int32_t h = 0; h < args.num_kv_heads; ++h) {
      NormRotate<Set>(args.k.Row<float>(row) + h * dim, args.k_norm, args, rotation, key);
      const float* value = args.v.Row<float>(row) + h * dim;
      if (args.dense_k.data != nullptr) {
        Write(key, dim, args.dense_k.dtype, args.dense_k.data, row * args.dense_k.row_stride + h * dim);
        Write(value, dim, args.dense_v.dtype, args.dense_v.data, row * args.dense_v.row_stride + h * dim);
      } else {
        const int32_t page_tokens = args.pages.page_tokens;
        const int64_t page = args.batch.page_ids[sequence.first_page + position / page_tokens];
        BEBOP_DCHECK(page >= 0 && page < args.pages.num_pages);
        const int64_t offset = ((page * args.num_kv_heads + h) * page_tokens + position % page_tokens) * dim;
        Write(key, dim, args.pages.dtype, args.pages.k, offset);
        Write(value, dim, args.pages.dtype, args.pages.v, offset);
      }
    }
  }
}
BEBOP_SIMD_RANGE_KERNEL(Rows, QkNormRopeArgs)

}  // namespace

void QkNormRope(const QkNormRopeArgs& args, ThreadPool& pool) { QkNormRopeWith(DetectInstructionSet(), args, pool); }

void QkNormRopeWith(InstructionSet set, const QkNormRopeArgs& args, ThreadPool& pool) {
  BEBOP_CHECK(args.head_dim > 0 && args.head_dim <= kMaxHeadDim);
  BEBOP_CHECK(args.rotary_dim >= 0 && args.rotary_dim <= args.head_dim && args.rotary_dim % 2 == 0);
  BEBOP_CHECK(args.batch.row_sequence != nullptr && args.batch.row_position != nullptr);
  const auto kernel = RowsFor(set);
  pool.ParallelFor(args.batch.num_rows, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace bebop::cpu
