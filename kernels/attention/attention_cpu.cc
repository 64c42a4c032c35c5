// SPDX-License-Identifier: Apache-2.0
#include "kernels/attention/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>

#include "kernels/common/check.h"
#include "kernels/common/simd.h"

namespace bebop::cpu {
namespace {

using simd::Floats;
using simd::kWidth;

constexpr int32_t kMaxHeadDim = 256;
constexpr int32_t kMaxQueries = 16;  // (row, q head) pairs that read a key and a value together
constexpr int32_t kTile = kWidth;    // positions per step of the online softmax, counted from first_index
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// q heads [first_head, first_head + num_heads) of one sequence, which share `kv_head`.
struct HeadGroup {
  const AttentionArgs& args;
  const SequenceRows& sequence;
  int32_t kv_head;
  int32_t first_head;
  int32_t num_heads;
};

// The running softmax of up to kMaxQueries queries: acc / sum is the weighted mean of the values seen so far, with weights
// exp(score - max). Rows are padded to whole vectors with zeros.
struct Softmax {
  int32_t num_queries;
  int64_t dim;
  int64_t padded_dim;
  float max[kMaxQueries];
  float sum[kMaxQueries];
  alignas(64) float query[kMaxQueries][kMaxHeadDim];  // times 1/√head_dim
  alignas(64) float acc[kMaxQueries][kMaxHeadDim];
  alignas(64) float tile[kTile][kMaxHeadDim];  // keys, then values, of the current tile
  alignas(64) float weight[kMaxQueries][kTile];
  float factor[kMaxQueries];  // what acc and sum shrink by, as max grows
};

// The keys or values of a tile as float rows: where they are, or a copy in softmax->tile. Entries behind `count` repeat the first.
template <class Set, typename Element>
BEBOP_SIMD_INLINE void MakeRows(const Element* const* entries, int32_t count, Softmax* softmax, const float** rows) {
  for (int32_t p = 0; p < kTile; ++p) {
    if (p >= count) {
      rows[p] = rows[0];
      continue;
    }
    if constexpr (std::is_same_v<Element, float>) {
      if (softmax->dim == softmax->padded_dim) {
        rows[p] = entries[p];
        continue;
      }
    }
    for (int64_t i = 0; i < softmax->dim; i += kWidth) {
      simd::Store(simd::LoadPartial<Set>(entries[p] + i, softmax->dim - i), softmax->tile[p] + i);
    }
    rows[p] = softmax->tile[p];
  }
}

// weight[m][p] = query m · rows p, for num_rows queries from m on and all p.
template <class Set, int num_rows>
BEBOP_SIMD_INLINE void Scores(const float* const* rows, int32_t m, Softmax* softmax) {
  constexpr int kColumns = Set::kAccumulators / 2;
  const int64_t padded_dim = softmax->padded_dim;
  for (int32_t p = 0; p < kTile; p += kColumns) {
    Floats<Set> sum[num_rows][kColumns];
    BEBOP_UNROLL
    for (int r = 0; r < num_rows; ++r) {
      BEBOP_UNROLL
      for (int c = 0; c < kColumns; ++c) sum[r][c] = simd::Zero<Set>();
    }
    for (int64_t i = 0; i < padded_dim; i += kWidth) {
      Floats<Set> query[num_rows];
      BEBOP_UNROLL
      for (int r = 0; r < num_rows; ++r) query[r] = simd::Load<Set>(softmax->query[m + r] + i);
      BEBOP_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        const Floats<Set> key = simd::Load<Set>(rows[p + c] + i);
        BEBOP_UNROLL
        for (int r = 0; r < num_rows; ++r) sum[r][c] = simd::MulAdd(query[r], key, sum[r][c]);
      }
    }
    BEBOP_UNROLL
    for (int r = 0; r < num_rows; ++r) {
      if constexpr (kColumns == 4) {
        const simd::Float4 four = simd::SumFour(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
        std::memcpy(softmax->weight[m + r] + p, &four, sizeof four);
      } else {
        BEBOP_UNROLL
        for (int c = 0; c < kColumns; ++c) softmax->weight[m + r][p + c] = simd::Sum(sum[r][c]);
      }
    }
  }
}

// Scores -> weights of query m, of which the first `count` entries are visible.
template <class Set>
BEBOP_SIMD_INLINE void Weigh(int32_t m, int32_t count, Softmax* softmax) {
  softmax->factor[m] = 1.0f;
  if (count == 0) return;
  for (int32_t p = count; p < kTile; ++p) softmax->weight[m][p] = kMinusInfinity;
  const Floats<Set> score = simd::Load<Set>(softmax->weight[m]);
  const float max = simd::MaxOr(score, softmax->max[m]);
  const Floats<Set> weight = simd::Exp(score - simd::Broadcast<Set>(max));
  simd::Store(weight, softmax->weight[m]);
  if (max != softmax->max[m]) {
    float factor[kWidth];
    simd::Store(simd::Exp(simd::Broadcast<Set>(softmax->max[m] - max)), factor);
    softmax->factor[m] = factor[0];
    softmax->max[m] = max;
  }
  softmax->sum[m] = softmax->sum[m] * softmax->factor[m] + simd::Sum(weight);
}

// acc[m + r] = acc[m + r] · factor + Σ_p weight · rows p over the p visible to it, in order, for columns
// [column, column + 16·num_columns).
template <class Set, int num_rows, int num_columns>
BEBOP_SIMD_INLINE void AddValues(const float* const* rows, const int32_t* counts, int32_t m, int64_t column, Softmax* softmax) {
  Floats<Set> acc[num_rows][num_columns];
  BEBOP_UNROLL
  for (int r = 0; r < num_rows; ++r) {
    const Floats<Set> factor = simd::Broadcast<Set>(softmax->factor[m + r]);
    BEBOP_UNROLL
    for (int c = 0; c < num_columns; ++c) acc[r][c] = simd::Load<Set>(softmax->acc[m + r] + column + c * kWidth) * factor;
  }
  // What all rows see together, then each row the rest: a weight of 0 would not keep a NaN out.
  int32_t common = counts[m];
  if constexpr (num_rows == 2) common = std::min(counts[m], counts[m + 1]);
  for (int32_t p = 0; p < common; ++p) {
    Floats<Set> weight[num_rows];
    BEBOP_UNROLL
    for (int r = 0; r < num_rows; ++r) weight[r] = simd::Broadcast<Set>(softmax->weight[m + r][p]);
    BEBOP_UNROLL
    for (int c = 0; c < num_columns; ++c) {
      const Floats<Set> value = simd::Load<Set>(rows[p] + column + c * kWidth);
      BEBOP_UNROLL
      for (int r = 0; r < num_rows; ++r) acc[r][c] = simd::MulAdd(weight[r], value, acc[r][c]);
    }
  }
  BEBOP_UNROLL
  for (int r = 0; r < num_rows; ++r) {
    for (int32_t p = common; p < counts[m + r]; ++p) {
      const Floats<Set> weight = simd::Broadcast<Set>(softmax->weight[m + r][p]);
      BEBOP_UNROLL
      for (int c = 0; c < num_columns; ++c) {
        acc[r][c] = simd::MulAdd(weight, simd::Load<Set>(rows[p] + column + c * kWidth), acc[r][c]);
      }
    }
    BEBOP_UNROLL
    for (int c = 0; c < num_columns; ++c) simd::Store(acc[r][c], softmax->acc[m + r] + column + c * kWidth);
  }
}

template <class Set, int num_rows>
BEBOP_SIMD_INLINE void AddValuesAllColumns(const float* const* rows, const int32_t* counts, int32_t m, Softmax* softmax) {
  constexpr int kColumns = Set::kAccumulators / 2;
  int64_t column = 0;
  for (; column + kColumns * kWidth <= softmax->padded_dim; column += kColumns * kWidth) {
    AddValues<Set, num_rows, kColumns>(rows, counts, m, column, softmax);
  }
  for (; column < softmax->padded_dim; column += kWidth) AddValues<Set, num_rows, 1>(rows, counts, m, column, softmax);
}

// One tile of at most kTile keys and values; query m of [begin, end) sees the first counts[m] of them.
template <class Set, typename Element>
BEBOP_SIMD_INLINE void AddTile(const Element* const* keys, const Element* const* values, int32_t count, const int32_t* counts,
                               int32_t begin, int32_t end, Softmax* softmax) {
  const float* rows[kTile];
  MakeRows<Set>(keys, count, softmax, rows);
  int32_t m = begin;
  for (; m + 2 <= end; m += 2) Scores<Set, 2>(rows, m, softmax);
  if (m < end) Scores<Set, 1>(rows, m, softmax);
  for (m = begin; m < end; ++m) Weigh<Set>(m, counts[m], softmax);
  MakeRows<Set>(values, count, softmax, rows);
  m = begin;
  for (; m + 2 <= end; m += 2) AddValuesAllColumns<Set, 2>(rows, counts, m, softmax);
  if (m < end) AddValuesAllColumns<Set, 1>(rows, counts, m, softmax);
}

// Rows [begin, end) of the batch for a group of heads. Query m is head m % num_heads of row begin + m / num_heads.
template <class Set, typename Element>
BEBOP_SIMD_INLINE void AttendElements(const HeadGroup& group, int64_t begin, int64_t end) {
  const AttentionArgs& args = group.args;
  const KvPagesView& pages = args.pages;
  Softmax softmax;
  softmax.num_queries = static_cast<int32_t>(end - begin) * group.num_heads;
  softmax.dim = pages.head_dim;
  softmax.padded_dim = (softmax.dim + kWidth - 1) / kWidth * kWidth;
  const Floats<Set> scale = simd::Broadcast<Set>(1.0f / std::sqrt(static_cast<float>(pages.head_dim)));
  int32_t limit[kMaxQueries];  // last visible position in the pages
  int32_t last = -1;
  for (int32_t m = 0; m < softmax.num_queries; ++m) {
    const int64_t row = begin + m / group.num_heads, head = group.first_head + m % group.num_heads;
    const float* query = args.q.Row<float>(row) + head * softmax.dim;
    for (int64_t i = 0; i < softmax.dim; i += kWidth) {
      simd::Store(simd::LoadPartial<Set>(query + i, softmax.dim - i) * scale, softmax.query[m] + i);
      simd::Store(simd::Zero<Set>(), softmax.acc[m] + i);
    }
    softmax.max[m] = kMinusInfinity;
    softmax.sum[m] = 0.0f;
    limit[m] = args.batch.row_position[row] - args.num_chain;
    last = std::max(last, limit[m]);
  }

  const Element* keys[kTile];
  const Element* values[kTile];
  int32_t counts[kMaxQueries];
  for (int32_t first = args.first_index; first <= last; first += kTile) {
    const int32_t count = std::min(kTile, last - first + 1);
    for (int32_t p = 0; p < count; ++p) {
      const int32_t position = first + p;
      const int64_t page = args.batch.page_ids[group.sequence.first_page + position / pages.page_tokens];
      BEBOP_DCHECK(page >= 0 && page < pages.num_pages);
      const int64_t entry = (page * pages.num_kv_heads + group.kv_head) * pages.page_tokens + position % pages.page_tokens;
      keys[p] = static_cast<const Element*>(pages.k) + entry * softmax.dim;
      values[p] = static_cast<const Element*>(pages.v) + entry * softmax.dim;
    }
    for (int32_t m = 0; m < softmax.num_queries; ++m) counts[m] = std::clamp(limit[m] - first + 1, 0, count);
    AddTile<Set>(keys, values, count, counts, 0, softmax.num_queries, &softmax);
  }
  for (int64_t row = begin; args.num_chain > 0 && row < end; ++row) {
    const int32_t first_query = static_cast<int32_t>(row - begin) * group.num_heads;
    for (int32_t first = 0; first < args.num_chain; first += kTile) {
      const int32_t count = std::min(kTile, args.num_chain - first);
      for (int32_t c = 0; c < count; ++c) {
        keys[c] = args.chain_k[first + c].Row<Element>(row) + group.kv_head * softmax.dim;
        values[c] = args.chain_v[first + c].Row<Element>(row) + group.kv_head * softmax.dim;
      }
      std::fill_n(counts + first_query, group.num_heads, count);
      AddTile<Set>(keys, values, count, counts, first_query, first_query + group.num_heads, &softmax);
    }
  }

  for (int32_t m = 0; m < softmax.num_queries; ++m) {
    const int64_t row = begin + m / group.num_heads, head = group.first_head + m % group.num_heads;
    const float* gate = args.q_gate.Row<float>(row) + (2 * head + 1) * softmax.dim;
    float* out = args.out.Row<float>(row) + head * softmax.dim;
    // The largest weight is 1, so a sum of 0 means that the row sees nothing: it gives 0.
    const Floats<Set> inverse = simd::Broadcast<Set>(softmax.sum[m] == 0.0f ? 0.0f : 1.0f / softmax.sum[m]);
    for (int64_t i = 0; i < softmax.dim; i += kWidth) {
      const Floats<Set> opened = simd::Sigmoid(simd::LoadPartial<Set>(gate + i, softmax.dim - i));
      simd::StorePartial(simd::Load<Set>(softmax.acc[m] + i) * inverse * opened, out + i, softmax.dim - i);
    }
  }
}

template <class Set>
BEBOP_SIMD_INLINE void Attend(const HeadGroup& group, int64_t begin, int64_t end) {
  if (group.args.pages.dtype == DType::kFloat32) {
    AttendElements<Set, float>(group, begin, end);
  } else {
    AttendElements<Set, BFloat16>(group, begin, end);
  }
}
BEBOP_SIMD_RANGE_KERNEL(Attend, HeadGroup)

int64_t DivideUp(int64_t count, int64_t size) { return (count + size - 1) / size; }

// How a call is cut into units: rows and q heads that read the same keys. Larger units read the keys less often, smaller ones occupy
// more threads; the result is the same.
struct Cut {
  int64_t rows;
  int64_t heads;

  int64_t HeadUnits(const AttentionArgs& args) const {
    return args.pages.num_kv_heads * DivideUp(args.num_q_heads / args.pages.num_kv_heads, heads);
  }
  int64_t Units(const AttentionArgs& args) const {
    int64_t row_units = 0;
    for (int32_t s = 0; s < args.batch.num_sequences; ++s) row_units += DivideUp(args.batch.sequences[s].num_rows, rows);
    return row_units * HeadUnits(args);
  }
};

Cut ChooseCut(const AttentionArgs& args, int num_threads) {
  const int64_t group = args.num_q_heads / args.pages.num_kv_heads;
  Cut cut;
  cut.heads = std::min<int64_t>(group, kMaxQueries);
  cut.rows = kMaxQueries / cut.heads;
  if (num_threads == 1) return cut;
  while (cut.Units(args) < num_threads && (cut.rows > 1 || cut.heads > 1)) {
    (cut.rows > 1 ? cut.rows : cut.heads) /= 2;
  }
  return cut;
}

}  // namespace

void Attention(const AttentionArgs& args, ThreadPool& pool) { AttentionWith(DetectInstructionSet(), args, pool); }

void AttentionWith(InstructionSet set, const AttentionArgs& args, ThreadPool& pool) {
  BEBOP_CHECK(args.pages.head_dim > 0 && args.pages.head_dim <= kMaxHeadDim);
  BEBOP_CHECK(args.pages.num_kv_heads > 0 && args.num_q_heads % args.pages.num_kv_heads == 0);
  BEBOP_CHECK(args.batch.row_position != nullptr && args.first_index >= 0 && args.num_chain >= 0);
  const auto kernel = AttendFor(set);
  const Cut cut = ChooseCut(args, pool.num_threads());
  const int64_t num_units = cut.Units(args), head_units = cut.HeadUnits(args), group = args.num_q_heads / args.pages.num_kv_heads;
  const int64_t units_per_kv_head = head_units / args.pages.num_kv_heads;
  // Units differ in length by the positions they see, so threads take them one at a time.
  std::atomic<int64_t> next{0};
  pool.ParallelFor(std::min<int64_t>(pool.num_threads(), num_units), 1, [&](int64_t, int64_t) {
    int32_t s = 0;
    int64_t first_unit = 0;  // of sequence s; a thread's units only grow
    for (int64_t unit = next.fetch_add(1); unit < num_units; unit = next.fetch_add(1)) {
      int64_t row_units = DivideUp(args.batch.sequences[s].num_rows, cut.rows);
      while (unit >= first_unit + row_units * head_units) {
        first_unit += row_units * head_units;
        row_units = DivideUp(args.batch.sequences[++s].num_rows, cut.rows);
      }
      const SequenceRows& sequence = args.batch.sequences[s];
      const int64_t head_unit = (unit - first_unit) / row_units, kv_head = head_unit / units_per_kv_head;
      const int64_t first_head = head_unit % units_per_kv_head * cut.heads, first_row = (unit - first_unit) % row_units * cut.rows;
      const HeadGroup heads{args, sequence, static_cast<int32_t>(kv_head), static_cast<int32_t>(kv_head * group + first_head),
                            static_cast<int32_t>(std::min(cut.heads, group - first_head))};
      const int64_t last_row = std::min<int64_t>(first_row + cut.rows, sequence.num_rows);
      kernel(heads, sequence.first_row + first_row, sequence.first_row + last_row);
    }
  });
}

}  // namespace bebop::cpu
