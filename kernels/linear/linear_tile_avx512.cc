// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "kernels/linear/linear_tile_avx512.h"

// AVX-512 without bf16 arithmetic: a pair of bf16 columns is widened to two float vectors.
namespace bebop::cpu {
namespace {

struct Avx512WidenOp : Avx512Op {
  static constexpr int kItems = 2;
  struct Weights {
    __m512 even, odd;
  };
  static Weights Load(const char* from) {
    // Operators rather than the shift's intrinsic, which GCC 12 takes for a use of an uninitialized value.
    const __v16su pairs = reinterpret_cast<__v16su>(_mm512_load_si512(from));
    return {reinterpret_cast<__m512>(pairs << 16), reinterpret_cast<__m512>(pairs & 0xffff0000u)};
  }
  static void Multiply(Sum& sum, const Weights& weights, const uint32_t* x) {
    sum = _mm512_fmadd_ps(weights.even, Broadcast(x), sum);
    sum = _mm512_fmadd_ps(weights.odd, Broadcast(x + 1), sum);
  }
};

struct Avx512FloatOp : Avx512Op {
  static constexpr int kItems = 1;
  using Weights = __m512;
  static Weights Load(const char* from) { return _mm512_load_ps(from); }
  static void Multiply(Sum& sum, const Weights& weights, const uint32_t* x) {
    sum = _mm512_fmadd_ps(weights, Broadcast(x), sum);
  }
};

}  // namespace

constinit const TileSet kAvx512Bf16WeightTiles = MakeTiles<Avx512WidenOp, XForm::kRoundedFloat, 2>();
constinit const TileSet kAvx512FloatTiles = MakeTiles<Avx512FloatOp, XForm::kFloat, 4>();

}  // namespace bebop::cpu
