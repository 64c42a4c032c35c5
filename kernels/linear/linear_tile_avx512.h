// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the two AVX-512 tile files share: one register holds the 16 rows of a panel. Empty for a compiler without their flags.
#if defined(__AVX512F__)
#include <immintrin.h>

#include "kernels/linear/linear_tile_impl.h"

namespace bebop::cpu {
namespace {

struct Avx512Op {
  using Sum = __m512;
  static Sum Zero() { return _mm512_setzero_ps(); }
  static Sum LoadSum(const float* from) { return _mm512_loadu_ps(from); }
  static void StoreSum(float* to, Sum sum) { _mm512_storeu_ps(to, sum); }
  static __m512 Broadcast(const uint32_t* x) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*x))); }
};

// Few rows: one panel at a time, so that memory sees one sequential stream; up to 16 sums. Many rows: 6 rows x kBlockPanels panels,
// at most 24 sums, so that a broadcast serves kBlockPanels products and a weight serves six.
template <typename Op, XForm kForm, int kBlockPanels>
constexpr TileSet MakeTiles() {
  return {.x_form = kForm,
          .pack = PackX<kForm>,
          .max_stream_rows = 16,
          .stream = {Tile<Op, 1, 1>, Tile<Op, 1, 2>, Tile<Op, 1, 3>, Tile<Op, 1, 4>, Tile<Op, 1, 5>, Tile<Op, 1, 6>,
                     Tile<Op, 1, 7>, Tile<Op, 1, 8>, Tile<Op, 1, 9>, Tile<Op, 1, 10>, Tile<Op, 1, 11>, Tile<Op, 1, 12>,
                     Tile<Op, 1, 13>, Tile<Op, 1, 14>, Tile<Op, 1, 15>, Tile<Op, 1, 16>},
          .block_rows = 6,
          .block_panels = kBlockPanels,
          .block = {Tile<Op, kBlockPanels, 1>, Tile<Op, kBlockPanels, 2>, Tile<Op, kBlockPanels, 3>,
                    Tile<Op, kBlockPanels, 4>, Tile<Op, kBlockPanels, 5>, Tile<Op, kBlockPanels, 6>}};
}

}  // namespace
}  // namespace bebop::cpu
#endif
