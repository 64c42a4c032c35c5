// SPDX-License-Identifier: Apache-2.0
#include "kernels/linear/linear.h"

#include <algorithm>
#include <cstdlib>

#include "kernels/common/check.h"
#include "kernels/linear/linear_driver.h"
#include "kernels/linear/linear_tile.h"

namespace bebop::cpu {
namespace {

// How far ahead of its reads a streaming tile prefetches. A tile of few rows only waits for memory, and the out-of-order window
// already covers much of the latency. With more rows the window covers less than a hundred lines' worth of work, so that the
// prefetches must: measured on Zen 4, one core streams 27 GB/s for 8 rows with 8 KiB into L2, and 21 GB/s with 2 KiB into L1.
constexpr int64_t kNearPrefetchBytes = 2048;
constexpr int64_t kFarPrefetchBytes = 8192;
// Weights that a group of panels may hold at a time: half of a small L2 (1 MiB), the rest is for x and for the next group.
constexpr int64_t kGroupBytes = 512 * 1024;
// Less work than this (bytes of weights times rows) is not worth waking a thread for.
constexpr int64_t kMinRangeWork = 32 * 1024;
// x is packed by all threads from this many values on.
constexpr int64_t kParallelPackValues = 16 * 1024;

const TileSet& SelectTiles(InstructionSet set, DType dtype) {
  const bool bf16 = dtype == DType::kBFloat16;
  switch (set) {
#if defined(__x86_64__)
    case InstructionSet::kAvx512Bf16:
      return bf16 ? kAvx512DotBf16Tiles : kAvx512FloatTiles;
    case InstructionSet::kAvx512:
      return bf16 ? kAvx512Bf16WeightTiles : kAvx512FloatTiles;
    case InstructionSet::kAvx2:
      return bf16 ? kAvx2Bf16Tiles : kAvx2FloatTiles;
#endif
    default:
      return bf16 ? kPortableBf16Tiles : kPortableFloatTiles;
  }
}

// The rows of x in blocks of nearly equal size, none above `most`.
struct RowBlocks {
  int64_t rows, count;
  RowBlocks(int64_t rows, int64_t most) : rows(rows), count((rows + most - 1) / most) {}
  int64_t First(int64_t block) const { return rows * block / count; }
  int Size(int64_t block) const { return static_cast<int>(First(block + 1) - First(block)); }
};

}  // namespace

LinearScratch::LinearScratch() = default;
LinearScratch::~LinearScratch() { std::free(data_); }

void LinearScratch::Reserve(int64_t rows, int64_t cols) {
  const int64_t needed = RoundUp(rows * RoundUp(cols, kPanelCols), kPanelCols);
  if (needed <= capacity_) return;
  std::free(data_);
  data_ = static_cast<uint32_t*>(std::aligned_alloc(64, static_cast<size_t>(needed) * sizeof(uint32_t)));
  BEBOP_CHECK(data_ != nullptr);
  capacity_ = needed;
}

void RunLinear(InstructionSet set, const LinearArgs& args, bool accumulate, LinearScratch& scratch, ThreadPool& pool) {
  const PackedMatrix& w = args.w;
  const int64_t rows = args.x.rows;
  BEBOP_CHECK(args.x.cols == w.cols && args.y.rows == rows && args.y.cols == w.rows);
  BEBOP_CHECK(args.x.dtype == DType::kFloat32 && args.y.dtype == DType::kFloat32);
  BEBOP_DCHECK(reinterpret_cast<uintptr_t>(w.data) % 64 == 0);
  if (rows == 0 || w.rows == 0) return;

  const TileSet& tiles = SelectTiles(set, w.dtype);
  const int64_t padded_cols = RoundUp(w.cols, kPanelCols);
  const int64_t items = tiles.x_form == XForm::kBf16Pair ? padded_cols / 2 : padded_cols;  // of a row of x
  const int64_t panels = (w.rows + kPanelRows - 1) / kPanelRows;
  const int64_t panel_bytes = kPanelRows * padded_cols * ElementBytes(w.dtype);
  const int64_t chunks = panel_bytes / 64;
  const bool streams = rows <= tiles.max_stream_rows;
  const RowBlocks blocks(rows, streams ? tiles.max_stream_rows : tiles.block_rows);

  // Pack x: a block of rows after the other, as the tiles read it.
  scratch.Reserve(rows, w.cols);
  const auto pack = [&](int64_t block, int64_t begin, int64_t end) {
    const int64_t first = blocks.First(block);
    const int size = blocks.Size(block);
    tiles.pack(args.x.Row<float>(first), args.x.row_stride, size, w.cols, begin, end,
               scratch.data() + first * items + begin * items / padded_cols * size);
  };
  if (rows * padded_cols < kParallelPackValues) {
    for (int64_t block = 0; block < blocks.count; ++block) pack(block, 0, padded_cols);
  } else if (blocks.count == 1) {
    pool.ParallelFor(padded_cols, kPanelCols, [&](int64_t begin, int64_t end) { pack(0, begin, end); });
  } else {
    pool.ParallelFor(blocks.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) pack(block, 0, padded_cols);
    });
  }

  const char* const weights = static_cast<const char*>(w.data);
  const auto last_rows = [&](int64_t end_panel) {
    return end_panel == panels ? static_cast<int32_t>(w.rows - (panels - 1) * kPanelRows) : static_cast<int32_t>(kPanelRows);
  };
  const int64_t grain = std::max<int64_t>(1, kMinRangeWork / (panel_bytes * rows));

  if (streams) {
    pool.ParallelFor(panels, grain, [&](int64_t begin, int64_t end) {
      TileArgs tile;
      tile.weights = weights + begin * panel_bytes;
      tile.panel_bytes = panel_bytes;
      tile.num_panels = end - begin;
      tile.last_panel_rows = last_rows(end);
      tile.num_chunks = chunks;
      tile.x = scratch.data();
      tile.y = args.y.Row<float>(0) + begin * kPanelRows;
      tile.y_stride = args.y.row_stride;
      tile.prefetch = tile.weights + (rows >= kFarPrefetchRows ? kFarPrefetchBytes : kNearPrefetchBytes);
      tile.prefetch_step = 64;
      tile.accumulate = accumulate;
      tiles.stream[rows - 1](tile);
    });
    return;
  }

  // Many rows: a group of panels, cut into runs of columns that stay in L2 while all row blocks pass; the partial sums of a run wait
  // in y. Meanwhile the blocks prefetch what comes next, each its share.
  const int64_t group_panels = tiles.block_panels;
  const int64_t run_chunks = std::min(chunks, RoundUp(kGroupBytes / (group_panels * 64), kPanelCols));
  pool.ParallelFor(panels, RoundUp(grain, group_panels), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; panel += group_panels) {
      TileArgs tile;
      tile.panel_bytes = panel_bytes;
      tile.num_panels = std::min(group_panels, end - panel);
      tile.last_panel_rows = last_rows(panel + tile.num_panels);
      tile.y_stride = args.y.row_stride;
      for (int64_t chunk = 0; chunk < chunks; chunk += run_chunks) {
        tile.weights = weights + panel * panel_bytes + chunk * 64;
        tile.num_chunks = std::min(run_chunks, chunks - chunk);
        tile.accumulate = accumulate || chunk > 0;
        tile.prefetch_step = tile.num_panels * 64 / blocks.count;
        for (int64_t block = 0; block < blocks.count; ++block) {
          const int64_t first = blocks.First(block);
          tile.x = scratch.data() + first * items + chunk * items / chunks * blocks.Size(block);
          tile.y = args.y.Row<float>(first) + panel * kPanelRows;
          tile.prefetch = tile.weights + tile.num_panels * panel_bytes + block * tile.num_chunks * tile.prefetch_step;
          tiles.block[blocks.Size(block) - 1](tile);
        }
      }
    }
  });
}

void LinearWith(InstructionSet set, const LinearArgs& args, LinearScratch& scratch, ThreadPool& pool) {
  RunLinear(set, args, /*accumulate=*/false, scratch, pool);
}

void Linear(const LinearArgs& args, LinearScratch& scratch, ThreadPool& pool) {
  LinearWith(DetectInstructionSet(), args, scratch, pool);
}

}  // namespace bebop::cpu
