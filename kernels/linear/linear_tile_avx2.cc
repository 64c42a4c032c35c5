// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "kernels/linear/linear_tile_impl.h"

// AVX2 and FMA: two registers hold the 16 rows of a panel, so a tile of six rows takes 12 of the 16 registers.
namespace bebop::cpu {
namespace {

struct Avx2Op {
  struct Sum {
    __m256 low, high;
  };
  static Sum Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Sum LoadSum(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static void StoreSum(float* to, const Sum& sum) {
    _mm256_storeu_ps(to, sum.low);
    _mm256_storeu_ps(to + 8, sum.high);
  }
  static __m256 Broadcast(const uint32_t* x) { return _mm256_broadcast_ss(reinterpret_cast<const float*>(x)); }
};

struct Avx2Bf16Op : Avx2Op {
  static constexpr int kItems = 2;
  struct Weights {
    __m256 even_low, even_high, odd_low, odd_high;
  };
  static Weights Load(const char* from) {
    const __m256i low = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + 32));
    const __m256i upper_half = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(low, upper_half)), _mm256_castsi256_ps(_mm256_and_si256(high, upper_half))};
  }
  static void Multiply(Sum& sum, const Weights& weights, const uint32_t* x) {
    const __m256 even = Broadcast(x), odd = Broadcast(x + 1);
    sum.low = _mm256_fmadd_ps(weights.even_low, even, sum.low);
    sum.high = _mm256_fmadd_ps(weights.even_high, even, sum.high);
    sum.low = _mm256_fmadd_ps(weights.odd_low, odd, sum.low);
    sum.high = _mm256_fmadd_ps(weights.odd_high, odd, sum.high);
  }
};

struct Avx2FloatOp : Avx2Op {
  static constexpr int kItems = 1;
  using Weights = Sum;
  static Weights Load(const char* from) { return LoadSum(reinterpret_cast<const float*>(from)); }
  static void Multiply(Sum& sum, const Weights& weights, const uint32_t* x) {
    const __m256 value = Broadcast(x);
    sum.low = _mm256_fmadd_ps(weights.low, value, sum.low);
    sum.high = _mm256_fmadd_ps(weights.high, value, sum.high);
  }
};

template <typename Op, XForm kForm, int kRows>
constexpr TileSet MakeTiles() {
  TileSet tiles = {.x_form = kForm,
                   .pack = PackX<kForm>,
                   .max_stream_rows = kRows,
                   .stream = {Tile<Op, 1, 1>, Tile<Op, 1, 2>, Tile<Op, 1, 3>, Tile<Op, 1, 4>},
                   .block_rows = kRows,
                   .block_panels = 1,
                   .block = {}};
  if constexpr (kRows > 4) {
    tiles.stream[4] = Tile<Op, 1, 5>;
    tiles.stream[5] = Tile<Op, 1, 6>;
  }
  for (int i = 0; i < kRows; ++i) tiles.block[i] = tiles.stream[i];
  return tiles;
}

}  // namespace

// A widened bf16 chunk takes four registers, which leaves room for four rows.
constinit const TileSet kAvx2Bf16Tiles = MakeTiles<Avx2Bf16Op, XForm::kRoundedFloat, 4>();
constinit const TileSet kAvx2FloatTiles = MakeTiles<Avx2FloatOp, XForm::kFloat, 6>();

}  // namespace bebop::cpu
