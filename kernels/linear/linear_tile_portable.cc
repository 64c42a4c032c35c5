// SPDX-License-Identifier: Apache-2.0
#include "kernels/linear/linear_tile_impl.h"

// Plain C++: multiply, round, add. Written so that a compiler vectorizes the loops over the 16 rows.
namespace bebop::cpu {
namespace {

struct PortableOp {
  struct Sum {
    float lanes[16];
  };
  static Sum Zero() { return {}; }
  static Sum LoadSum(const float* from) {
    Sum sum;
    __builtin_memcpy(sum.lanes, from, sizeof(sum.lanes));
    return sum;
  }
  static void StoreSum(float* to, const Sum& sum) { __builtin_memcpy(to, sum.lanes, sizeof(sum.lanes)); }

  static float ItemAsFloat(uint32_t item) {
    float value;
    __builtin_memcpy(&value, &item, sizeof(value));
    return value;
  }
};

struct PortableBf16Op : PortableOp {
  static constexpr int kItems = 2;
  struct Weights {
    float even[16], odd[16];
  };
  static Weights Load(const char* from) {
    uint32_t pairs[16];
    __builtin_memcpy(pairs, from, sizeof(pairs));
    Weights weights;
    for (int i = 0; i < 16; ++i) {
      weights.even[i] = ItemAsFloat(pairs[i] << 16);
      weights.odd[i] = ItemAsFloat(pairs[i] & 0xffff0000u);
    }
    return weights;
  }
  static void Multiply(Sum& sum, const Weights& weights, const uint32_t* x) {
    const float even = ItemAsFloat(x[0]), odd = ItemAsFloat(x[1]);
    for (int i = 0; i < 16; ++i) sum.lanes[i] += weights.even[i] * even;
    for (int i = 0; i < 16; ++i) sum.lanes[i] += weights.odd[i] * odd;
  }
};

struct PortableFloatOp : PortableOp {
  static constexpr int kItems = 1;
  using Weights = Sum;
  static Weights Load(const char* from) {
    Weights weights;
    __builtin_memcpy(weights.lanes, from, sizeof(weights.lanes));
    return weights;
  }
  static void Multiply(Sum& sum, const Weights& weights, const uint32_t* x) {
    const float value = ItemAsFloat(*x);
    for (int i = 0; i < 16; ++i) sum.lanes[i] += weights.lanes[i] * value;
  }
};

template <typename Op, XForm kForm>
constexpr TileSet kTiles = {.x_form = kForm,
                            .pack = PackX<kForm>,
                            .max_stream_rows = 2,
                            .stream = {Tile<Op, 1, 1>, Tile<Op, 1, 2>},
                            .block_rows = 2,
                            .block_panels = 1,
                            .block = {Tile<Op, 1, 1>, Tile<Op, 1, 2>}};

}  // namespace

constinit const TileSet kPortableBf16Tiles = kTiles<PortableBf16Op, XForm::kRoundedFloat>;
constinit const TileSet kPortableFloatTiles = kTiles<PortableFloatOp, XForm::kFloat>;

}  // namespace bebop::cpu
