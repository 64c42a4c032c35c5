// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/attention/attention.h"
#include "kernels/common/check.h"

namespace bebop::cpu {
namespace {

constexpr int32_t kMaxHeadDim = 256;

// Running softmax of one (row, q head).
struct Online {
  float max = -std::numeric_limits<float>::infinity();
  float sum = 0.0f;
  float acc[kMaxHeadDim] = {};

  template <typename Element>
  void Add(const float* query, const Element* key, const Element* value, int32_t dim, float scale) {
    float score = 0.0f;
    for (int32_t i = 0; i < dim; ++i) score += query[i] * ToFloat(key[i]);
    score *= scale;
    if (!(score <= max)) {
      const float factor = std::exp(max - score);
      sum *= factor;
      for (int32_t i = 0; i < dim; ++i) acc[i] *= factor;
      max = score;
    }
    const float weight = std::exp(score - max);
    sum += weight;
    for (int32_t i = 0; i < dim; ++i) acc[i] += weight * ToFloat(value[i]);
  }
};

template <typename Element>
void AttendRowHead(const AttentionArgs& args, int64_t row, int32_t head) {
  const KvPagesView& pages = args.pages;
  const int32_t dim = pages.head_dim, kv_head = head / (args.num_q_heads / pages.num_kv_heads);
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  const SequenceRows& sequence = args.batch.sequences[args.batch.row_sequence[row]];
  const float* query = args.q.Row<float>(row) + int64_t{head} * dim;
  Online online;
  const int32_t limit = args.batch.row_position[row] - args.num_chain;
  for (int32_t position = args.first_index; position <= limit; ++position) {
    const int64_t page = args.batch.page_ids[sequence.first_page + position / pages.page_tokens];
    const int64_t offset = ((page * pages.num_kv_heads + kv_head) * pages.page_tokens + position % pages.page_tokens) * dim;
    online.Add(query, static_cast<const Element*>(pages.k) + offset, static_cast<const Element*>(pages.v) + offset, dim, scale);
  }
  for (int32_t c = 0; c < args.num_chain; ++c) {
    online.Add(query, args.chain_k[c].Row<const Element>(row) + int64_t{kv_head} * dim,
               args.chain_v[c].Row<const Element>(row) + int64_t{kv_head} * dim, dim, scale);
  }
  const float* gate = args.q_gate.Row<float>(row) + int64_t{head} * 2 * dim + dim;
  float* out = args.out.Row<float>(row) + int64_t{head} * dim;
  const float inverse = online.sum > 0.0f ? 1.0f / online.sum : online.sum;
  for (int32_t i = 0; i < dim; ++i) out[i] = online.acc[i] * inverse / (1.0f + std::exp(-gate[i]));
}

}  // namespace

void Attention(const AttentionArgs& args, ThreadPool& pool) {
  BEBOP_CHECK(args.pages.head_dim > 0 && args.pages.head_dim <= kMaxHeadDim && args.num_q_heads % args.pages.num_kv_heads == 0);
  BEBOP_CHECK(args.batch.row_sequence != nullptr && args.batch.row_position != nullptr);
  pool.ParallelFor(int64_t{args.batch.num_rows} * args.num_q_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / args.num_q_heads;
      const int32_t head = static_cast<int32_t>(item % args.num_q_heads);
      if (args.pages.dtype == DType::kFloat32) {
        AttendRowHead<float>(args, row, head);
      } else {
        AttendRowHead<BFloat16>(args, row, head);
      }
    }
  });
}

}  // namespace bebop::cpu
