// SPDX-License-Identifier: Apache-2.0
#include "kernels/attention/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>

#include "kernels/common/check.h"

namespace bebop::cpu {
namespace {

constexpr int32_t kMaxHeadDim = 256;
constexpr int32_t kMaxQueries = 16;  // (row, q head) pairs that read a key and a value together
constexpr int32_t kTile = 16;        // positions per step of the online softmax, counted from first_index
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

}  // namespace
}  // namespace bebop::cpu

#define BEBOP_SIMD_SOURCE "kernels/attention/attention_simd.inc"
#include "kernels/common/simd_targets.inc"

namespace bebop::cpu {
namespace {

int64_t DivideUp(int64_t count, int64_t size) { return (count + size - 1) / size; }

// How a call is cut into units: rows and q heads that read the same keys. Larger units read the keys less often, smaller ones
// occupy more threads; the result is the same.
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
  const auto kernel = BEBOP_SIMD_SELECT(set, Attend);
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
      const int64_t first_head = head_unit % units_per_kv_head * cut.heads,
                    first_row = (unit - first_unit) % row_units * cut.rows;
      const HeadGroup heads{args, sequence, static_cast<int32_t>(kv_head), static_cast<int32_t>(kv_head * group + first_head),
                            static_cast<int32_t>(std::min(cut.heads, group - first_head))};
      const int64_t last_row = std::min<int64_t>(first_row + cut.rows, sequence.num_rows);
      kernel(heads, sequence.first_row + first_row, sequence.first_row + last_row);
    }
  });
}

}  // namespace bebop::cpu
