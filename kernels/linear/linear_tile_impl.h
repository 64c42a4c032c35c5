// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "kernels/linear/linear_tile.h"

#if defined(__clang__)
#define BEBOP_UNROLL _Pragma("unroll")
#else
#define BEBOP_UNROLL _Pragma("GCC unroll 16")
#endif

// The tile and the packing of x, over an operation `Op` that the including file defines for its instruction set:
//   Op::kItems     items of x in a chunk (1, or 2 when a bf16 pair meets float items)
//   Op::Sum        16 partial sums
//   Op::Weights    a loaded chunk; Op::Load(const char*)
//   Op::Zero(), Op::LoadSum(const float*), Op::StoreSum(float*, Sum)
//   Op::Multiply<R>(Sum&, const Weights&, const uint32_t* x)   x: items of one row, R apart
namespace bebop::cpu {
namespace {

// Each of the 16 lanes of each sum is one chain over the columns in their order: neither P, R, nor the split of the columns into runs
// changes a bit of it.
template <typename Op, int P, int R>
inline void TilePanels(const TileArgs& args, const char* weights, const char*& prefetch, float* y, int last_rows) {
  typename Op::Sum sums[P][R];
  float edge[16];
  BEBOP_UNROLL
  for (int panel = 0; panel < P; ++panel) {
    BEBOP_UNROLL
    for (int row = 0; row < R; ++row) {
      if (!args.accumulate) {
        sums[panel][row] = Op::Zero();
        continue;
      }
      const float* from = y + row * args.y_stride + panel * 16;
      if (panel == P - 1 && last_rows < 16) {
        for (int i = 0; i < 16; ++i) edge[i] = i < last_rows ? from[i] : 0.0f;
        from = edge;
      }
      sums[panel][row] = Op::LoadSum(from);
    }
  }

  const uint32_t* x = args.x;
  for (int64_t chunk = 0; chunk < args.num_chunks; ++chunk) {
    __builtin_prefetch(prefetch, 0, R >= kFarPrefetchRows ? 2 : 3);
    prefetch += args.prefetch_step;
    typename Op::Weights chunk_weights[P];
    BEBOP_UNROLL
    for (int panel = 0; panel < P; ++panel) chunk_weights[panel] = Op::Load(weights + panel * args.panel_bytes + chunk * 64);
    BEBOP_UNROLL
    for (int row = 0; row < R; ++row) {
      BEBOP_UNROLL
      for (int panel = 0; panel < P; ++panel) Op::template Multiply<R>(sums[panel][row], chunk_weights[panel], x + row);
    }
    x += R * Op::kItems;
  }

  BEBOP_UNROLL
  for (int panel = 0; panel < P; ++panel) {
    BEBOP_UNROLL
    for (int row = 0; row < R; ++row) {
      float* to = y + row * args.y_stride + panel * 16;
      if (panel == P - 1 && last_rows < 16) {
        Op::StoreSum(edge, sums[panel][row]);
        for (int i = 0; i < last_rows; ++i) to[i] = edge[i];
      } else {
        Op::StoreSum(to, sums[panel][row]);
      }
    }
  }
}

// P panels at a time, the rest one by one.
template <typename Op, int P, int R>
void Tile(const TileArgs& args) {
  const char* prefetch = args.prefetch;
  int64_t panel = 0;
  for (; panel + P <= args.num_panels; panel += P) {
    TilePanels<Op, P, R>(args, args.weights + panel * args.panel_bytes, prefetch, args.y + panel * 16,
                         panel + P == args.num_panels ? args.last_panel_rows : 16);
  }
  if constexpr (P > 1) {
    for (; panel < args.num_panels; ++panel) {
      TilePanels<Op, 1, R>(args, args.weights + panel * args.panel_bytes, prefetch, args.y + panel * 16,
                           panel + 1 == args.num_panels ? args.last_panel_rows : 16);
    }
  }
}

// Bits of a float rounded to bf16 (nearest, ties to even; a NaN stays one), as in kernels/common/dtype.h but free of branches.
inline uint32_t RoundedBits(uint32_t bits) {
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const uint32_t nan = bits | 0x400000u;
  return ((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded) & 0xffff0000u;
}

template <XForm kForm>
void PackX(const float* x, int64_t stride, int rows, int64_t cols, int64_t begin, int64_t end, uint32_t* out) {
  constexpr int kItems = kForm == XForm::kBf16Pair ? 16 : 32;  // of 32 columns
  for (int64_t c = begin; c < end; c += 32) {
    for (int row = 0; row < rows; ++row) {
      const float* from = x + row * stride + c;
      float values[32];
      if (c + 32 <= cols) {
        __builtin_memcpy(values, from, sizeof(values));
      } else {
        for (int i = 0; i < 32; ++i) values[i] = c + i < cols ? from[i] : 0.0f;
      }
      uint32_t items[32];
      __builtin_memcpy(items, values, sizeof(items));
      if constexpr (kForm != XForm::kFloat) {
        for (int i = 0; i < 32; ++i) items[i] = RoundedBits(items[i]);
      }
      if constexpr (kForm == XForm::kBf16Pair) {
        uint32_t pairs[16];
        for (int i = 0; i < 16; ++i) pairs[i] = items[2 * i] >> 16 | items[2 * i + 1];
        for (int i = 0; i < kItems; ++i) out[i * rows + row] = pairs[i];
      } else {
        for (int i = 0; i < kItems; ++i) out[i * rows + row] = items[i];
      }
    }
    out += kItems * rows;
  }
}

}  // namespace
}  // namespace bebop::cpu
