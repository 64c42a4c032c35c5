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
//   Op::Multiply(Sum&, const Weights&, const uint32_t* x)   x: the chunk's items of one row
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
  for (int64_t block = 0; block < args.num_chunks * Op::kItems / kBlockItems; ++block) {
    for (int item = 0; item < kBlockItems; item += Op::kItems) {
      __builtin_prefetch(prefetch, 0, R >= kFarPrefetchRows ? 2 : 3);
      prefetch += args.prefetch_step;
      typename Op::Weights chunk[P];
      BEBOP_UNROLL
      for (int panel = 0; panel < P; ++panel) chunk[panel] = Op::Load(weights + panel * args.panel_bytes);
      weights += 64;
      BEBOP_UNROLL
      for (int row = 0; row < R; ++row) {
        BEBOP_UNROLL
        for (int panel = 0; panel < P; ++panel) Op::Multiply(sums[panel][row], chunk[panel], x + row * kBlockItems + item);
      }
    }
    x += R * kBlockItems;
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

// The widest vector of the file's flags: GCC takes wider ones apart into scalars.
#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif
using Lanes = uint32_t __attribute__((vector_size(4 * kLanes)));
using SignedLanes = int32_t __attribute__((vector_size(4 * kLanes)));

// A block of the bits of floats, rounded to bf16 (nearest, ties to even; a NaN stays one) as ToBFloat16 of kernels/common/dtype.h.
inline void RoundToBf16(uint32_t* items) {
  for (int i = 0; i < kBlockItems; i += kLanes) {
    Lanes bits;
    __builtin_memcpy(&bits, items + i, sizeof(bits));
    const Lanes rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const Lanes nan = bits | 0x400000u;
    const auto magnitude = reinterpret_cast<SignedLanes>(bits & 0x7fffffffu);  // AVX2 compares signed numbers only
    bits = (magnitude > 0x7f800000 ? nan : rounded) & 0xffff0000u;
    __builtin_memcpy(items + i, &bits, sizeof(bits));
  }
}

// The bits of x[begin..begin + 16), zeros from `cols` on.
inline void LoadItems(const float* x, int64_t begin, int64_t cols, uint32_t* items) {
  if (begin + kBlockItems <= cols) {
    __builtin_memcpy(items, x + begin, kBlockItems * sizeof(uint32_t));
  } else {
    for (int i = 0; i < kBlockItems; ++i) items[i] = begin + i < cols ? __builtin_bit_cast(uint32_t, x[begin + i]) : 0;
  }
}

template <XForm kForm>
void PackX(const float* x, int64_t stride, int rows, int64_t cols, int64_t begin, int64_t end, uint32_t* out) {
  for (int64_t c = begin; c < end; c += kForm == XForm::kBf16Pair ? 2 * kBlockItems : kBlockItems) {
    for (int row = 0; row < rows; ++row) {
      const float* from = x + row * stride;
      if constexpr (kForm == XForm::kBf16Pair) {
        uint32_t items[2 * kBlockItems];
        LoadItems(from, c, cols, items);
        LoadItems(from, c + kBlockItems, cols, items + kBlockItems);
        RoundToBf16(items);
        RoundToBf16(items + kBlockItems);
        for (int i = 0; i < kBlockItems; ++i) out[i] = items[2 * i] >> 16 | items[2 * i + 1];
      } else {
        LoadItems(from, c, cols, out);
        if constexpr (kForm == XForm::kRoundedFloat) RoundToBf16(out);
      }
      out += kBlockItems;
    }
  }
}

}  // namespace
}  // namespace bebop::cpu
