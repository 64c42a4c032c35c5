// SPDX-License-Identifier: Apache-2.0
#include "kernels/attention/chain_attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/common/check.h"

namespace bebop::cpu {
namespace {

constexpr int64_t kRowTile = 32;
constexpr int64_t kKeyTile = 64;

// A tile's worth of work: a kv head, and rows (or, in the second pass of the backward, keys) [begin, end) of a document.
struct ChainTile {
  DocumentRows document;
  int64_t begin = 0;
  int64_t end = 0;
};

// One thread's buffers.
struct ChainScratch {
  explicit ChainScratch(int64_t dim, int64_t group)
      : keys(dim * kKeyTile),
        values(dim * kKeyTile),
        scores(kRowTile * kKeyTile),
        gradients(kRowTile * kKeyTile),
        rows(group * kRowTile * dim),
        maxima(group * kRowTile),
        sums(group * kRowTile),
        key_sums(kKeyTile * dim),
        value_sums(kKeyTile * dim) {}
  std::vector<float> keys, values;          // [dim, kKeyTile], transposed
  std::vector<float> scores, gradients;     // [kRowTile, kKeyTile]
  std::vector<float> rows;                  // [group, kRowTile, dim]
  std::vector<float> maxima, sums;          // [group, kRowTile]
  std::vector<float> key_sums, value_sums;  // [kKeyTile, dim]
};

std::vector<ChainTile> MakeTiles(const ChainAttentionArgs& args, int64_t size) {
  std::vector<ChainTile> tiles;
  for (int32_t i = 0; i < args.num_documents; ++i) {
    const DocumentRows& document = args.documents[i];
    for (int64_t row = 0; row < document.num_rows; row += size) {
      tiles.push_back({document, document.first_row + row, document.first_row + std::min(row + size, document.num_rows)});
    }
  }
  return tiles;
}

}  // namespace
}  // namespace bebop::cpu

#define BEBOP_SIMD_SOURCE "kernels/attention/chain_attention_simd.inc"
#include "kernels/common/simd_targets.inc"

namespace bebop::cpu {
namespace {

void CheckShapes(const ChainAttentionArgs& args) {
  const int64_t dim = args.head_dim, rows = args.q.rows;
  BEBOP_CHECK(dim > 0 && dim % 16 == 0 && args.num_kv_heads > 0 && args.num_q_heads % args.num_kv_heads == 0);
  BEBOP_CHECK(args.q.cols == args.num_q_heads * dim && args.q_gate.rows == rows && args.q_gate.cols == 2 * args.q.cols);
  BEBOP_CHECK(args.base_k.rows == rows && args.base_k.cols == args.num_kv_heads * dim && args.base_v.rows == rows);
  BEBOP_CHECK(args.attended.rows == rows && args.log_sum.rows == rows && args.log_sum.cols == args.num_q_heads);
}

// kernel(args, tile, kv head, scratch) for all tiles and kv heads.
template <typename Args, typename Kernel>
void RunTiles(const Args& args, const ChainAttentionArgs& shape, const std::vector<ChainTile>& tiles, Kernel kernel,
              ThreadPool& pool) {
  const auto num_tiles = static_cast<int64_t>(tiles.size());
  // Late tiles of a document see more keys than early ones, so that ranges of tiles would be uneven shares: thread i takes every
  // num_threads-th tile instead.
  const int64_t num_items = num_tiles * shape.num_kv_heads, num_threads = pool.num_threads();
  pool.ParallelFor(num_threads, 1, [&](int64_t begin, int64_t end) {
    ChainScratch scratch(shape.head_dim, shape.num_q_heads / shape.num_kv_heads);
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t item = thread; item < num_items; item += num_threads) {
        kernel(args, tiles[static_cast<size_t>(item / shape.num_kv_heads)], item % shape.num_kv_heads, scratch);
      }
    }
  });
}

}  // namespace

void ChainAttention(const ChainAttentionArgs& args, ThreadPool& pool) { ChainAttentionWith(DetectInstructionSet(), args, pool); }

void ChainAttentionWith(InstructionSet set, const ChainAttentionArgs& args, ThreadPool& pool) {
  CheckShapes(args);
  RunTiles(args, args, MakeTiles(args, kRowTile), BEBOP_SIMD_SELECT(set, ChainForwardTile), pool);
}

void ChainAttentionBackward(const ChainAttentionBackwardArgs& args, ThreadPool& pool) {
  ChainAttentionBackwardWith(DetectInstructionSet(), args, pool);
}

void ChainAttentionBackwardWith(InstructionSet set, const ChainAttentionBackwardArgs& args, ThreadPool& pool) {
  CheckShapes(args.forward);
  BEBOP_CHECK(args.dout.rows == args.forward.q.rows && args.dout.cols == args.forward.q.cols && args.dq.cols == args.dout.cols);
  RunTiles(args, args.forward, MakeTiles(args.forward, kRowTile), BEBOP_SIMD_SELECT(set, ChainBackwardRows), pool);
  RunTiles(args, args.forward, MakeTiles(args.forward, kKeyTile), BEBOP_SIMD_SELECT(set, ChainBackwardKeys), pool);
}

}  // namespace bebop::cpu
