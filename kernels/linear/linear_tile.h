// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/cpu_features.h"

// Inside kernels/linear: the seam between the driver (linear_cpu.cc: blocking, threads) and the tiles, one source file for each
// instruction set. A tile file is compiled with that set's flags, so it must not define anything that the linker could take for a
// portable file as well: all of its code is in an unnamed namespace, and it includes nothing with inline functions.
namespace bebop::cpu {

// Rows of x that a tile can take at most.
inline constexpr int kMaxTileRows = 16;

// Items of a row of x that lie side by side.
inline constexpr int kBlockItems = 16;

// Tiles of this many rows or more prefetch into L2, so that it can be done far ahead; smaller ones, which wait for memory alone, into L1.
inline constexpr int kFarPrefetchRows = 4;

// y[0..R, panels] (+)= x W over a run of columns; R is the tile function's.
//
// x comes as 32-bit items in blocks of 16, [block][R][16], in one of three forms (XForm): a tile walks through it with one pointer,
// and packing it moves whole vectors. A chunk is the 64 bytes of a panel that hold one group of columns for its 16 rows: a pair of
// bf16 columns, or one float32 column.
struct TileArgs {
  const char* weights = nullptr;  // first panel, at the first column of the run
  int64_t panel_bytes = 0;        // from one panel to the next
  int64_t num_panels = 0;
  int32_t last_panel_rows = 0;    // rows of the last panel that y has, 1..16
  int64_t num_chunks = 0;
  const uint32_t* x = nullptr;
  float* y = nullptr;             // row 0, first column of the first panel
  int64_t y_stride = 0;           // floats
  bool accumulate = false;        // go on from the partial sums in y rather than from zero
  // With every chunk step, `prefetch` is fetched and moves on by `prefetch_step` bytes.
  const char* prefetch = nullptr;
  int64_t prefetch_step = 0;
};
using TileFunction = void (*)(const TileArgs& args);

// The items of x: a pair of columns rounded to bf16; a column as float; a column rounded to bf16, as float.
enum class XForm : uint8_t { kBf16Pair, kFloat, kRoundedFloat };

// Writes `rows` (<= kMaxTileRows) rows of x [rows, cols] (rows `stride` floats apart), columns [begin, end), as [block][rows][16]
// items; out is where column `begin` goes. begin and end are multiples of 32; columns from `cols` on become zero.
using PackFunction = void (*)(const float* x, int64_t stride, int rows, int64_t cols, int64_t begin, int64_t end, uint32_t* out);

// The tiles of one instruction set for one weight type.
struct TileSet {
  XForm x_form = XForm::kFloat;
  PackFunction pack = nullptr;
  // Few rows: one pass over the weights, panel after panel. stream[R - 1] for R <= max_stream_rows.
  int max_stream_rows = 0;
  TileFunction stream[kMaxTileRows] = {};
  // Many rows: block_panels panels at a time, which stay in L2 while all blocks of up to block_rows rows pass. block[R - 1].
  int block_rows = 0;
  int block_panels = 0;
  TileFunction block[kMaxTileRows] = {};
};

// One pair per source file.
extern const TileSet kPortableBf16Tiles, kPortableFloatTiles;
#if defined(__x86_64__)
extern const TileSet kAvx2Bf16Tiles, kAvx2FloatTiles;
extern const TileSet kAvx512Bf16WeightTiles, kAvx512FloatTiles;
extern const TileSet kAvx512DotBf16Tiles;  // vdpbf16ps; its float32 tiles are AVX-512's
#endif

}  // namespace bebop::cpu
