// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "kernels/linear/linear_tile_avx512.h"

// AVX-512 BF16: vdpbf16ps adds the two products of a bf16 pair to each of the 16 sums. The instruction takes denormals as zero and
// ignores the rounding mode; how it rounds between the two products is the processor's (it may differ between makers).
namespace bebop::cpu {
namespace {

struct Avx512DotBf16Op : Avx512Op {
  static constexpr int kItems = 1;
  using Weights = __m512bh;
  static Weights Load(const char* from) { return reinterpret_cast<__m512bh>(_mm512_load_si512(from)); }
  static void Multiply(Sum& sum, const Weights& weights, const uint32_t* x) {
    sum = _mm512_dpbf16_ps(sum, weights, reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(*x))));
  }
};

}  // namespace

constinit const TileSet kAvx512DotBf16Tiles = MakeTiles<Avx512DotBf16Op, XForm::kBf16Pair, 4>();

}  // namespace bebop::cpu
