// SPDX-License-Identifier: Apache-2.0
#include "kernels/qk_norm_rope/qk_norm_rope.h"

#include <cmath>

#include "kernels/common/check.h"

namespace bebop::cpu {
namespace {

constexpr int32_t kMaxHeadDim = 256;

struct Rotation {
  float cos[kMaxHeadDim / 2];
  float sin[kMaxHeadDim / 2];
};

void NormRotate(const float* x, const float* weight, float eps, int32_t head_dim, int32_t rotary_dim, const Rotation& rotation,
                float* out) {
  double sum = 0.0;
  for (int32_t i = 0; i < head_dim; ++i) sum += static_cast<double>(x[i]) * x[i];
  const float scale = static_cast<float>(1.0 / std::sqrt(sum / head_dim + eps));
  for (int32_t i = 0; i < head_dim; ++i) out[i] = x[i] * scale * (1.0f + weight[i]);
  const int32_t half = rotary_dim / 2;
  for (int32_t i = 0; i < half; ++i) {
    const float low = out[i], high = out[i + half];
    out[i] = low * rotation.cos[i] - high * rotation.sin[i];
    out[i + half] = high * rotation.cos[i] + low * rotation.sin[i];
  }
}

void Store(const float* source, int32_t count, DType dtype, void* destination, int64_t offset) {
  if (dtype == DType::kFloat32) {
    float* out = static_cast<float*>(destination) + offset;
    for (int32_t i = 0; i < count; ++i) out[i] = source[i];
  } else {
    BFloat16* out = static_cast<BFloat16*>(destination) + offset;
    for (int32_t i = 0; i < count; ++i) out[i] = ToBFloat16(source[i]);
  }
}

}  // namespace

void QkNormRope(const QkNormRopeArgs& args, ThreadPool& pool) {
  const int32_t dim = args.head_dim, half = args.rotary_dim / 2;
  BEBOP_CHECK(dim > 0 && dim <= kMaxHeadDim && args.rotary_dim >= 0 && args.rotary_dim <= dim && args.rotary_dim % 2 == 0);
  BEBOP_CHECK(args.batch.row_sequence != nullptr && args.batch.row_position != nullptr);
  pool.ParallelFor(args.batch.num_rows, 1, [&](int64_t begin, int64_t end) {
    double inv_freq[kMaxHeadDim / 2];
    for (int32_t i = 0; i < half; ++i) inv_freq[i] = std::pow(args.rope_theta, -2.0 * i / args.rotary_dim);
    Rotation rotation;
    float head[kMaxHeadDim];
    for (int64_t row = begin; row < end; ++row) {
      const int32_t position = args.batch.row_position[row];
      for (int32_t i = 0; i < half; ++i) {
        const double angle = position * inv_freq[i];
        rotation.cos[i] = static_cast<float>(std::cos(angle));
        rotation.sin[i] = static_cast<float>(std::sin(angle));
      }
      for (int32_t h = 0; h < args.num_q_heads; ++h) {
        NormRotate(args.q_gate.Row<float>(row) + int64_t{h} * 2 * dim, args.q_norm, args.eps, dim, args.rotary_dim, rotation,
                   args.q_out.Row<float>(row) + int64_t{h} * dim);
      }
      const SequenceRows& sequence = args.batch.sequences[args.batch.row_sequence[row]];
      for (int32_t h = 0; h < args.num_kv_heads; ++h) {
        NormRotate(args.k.Row<float>(row) + int64_t{h} * dim, args.k_norm, args.eps, dim, args.rotary_dim, rotation, head);
        const float* value = args.v.Row<float>(row) + int64_t{h} * dim;
        if (args.dense_k.data != nullptr) {
          Store(head, dim, args.dense_k.dtype, args.dense_k.data, row * args.dense_k.row_stride + int64_t{h} * dim);
          Store(value, dim, args.dense_v.dtype, args.dense_v.data, row * args.dense_v.row_stride + int64_t{h} * dim);
        } else {
          const int32_t page_tokens = args.pages.page_tokens;
          const int64_t page = args.batch.page_ids[sequence.first_page + position / page_tokens];
          BEBOP_DCHECK(page >= 0 && page < args.pages.num_pages);
          const int64_t offset = ((page * args.num_kv_heads + h) * page_tokens + position % page_tokens) * dim;
          Store(head, dim, args.pages.dtype, args.pages.k, offset);
          Store(value, dim, args.pages.dtype, args.pages.v, offset);
        }
      }
    }
  });
}

}  // namespace bebop::cpu
