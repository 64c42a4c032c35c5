// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/common/gpu.h"

// Angles of the rotation, for QkNormRope and its backward on the device. The header asks for angle, cos and sin in double. The
// frequencies come from the host (the same pow as on the CPU), in turns, so that the range reduction is a subtraction of
// integers, which is exact. What is left, an eighth of a turn at most, takes two short polynomials in double: no call with a slow
// path for large arguments. The angle is off by 3·2^-53 of itself (2^-31 rad at position 2^20), the polynomials by 2^-37, so cos
// and sin are the correctly rounded floats but for ties.
namespace bebop::cuda {

inline constexpr int kMaxHeadDim = 256;

// Of pair i: turns that a position advances by.
struct Frequencies {
  double turns[kMaxHeadDim / 2];
};

inline Frequencies MakeFrequencies(int32_t rotary_dim, double rope_theta) {
  Frequencies frequencies = {};
  for (int32_t i = 0; i < rotary_dim / 2; ++i) {
    frequencies.turns[i] = std::pow(rope_theta, -2.0 * i / rotary_dim) / 6.283185307179586477;
  }
  return frequencies;
}

// cos and sin of 2π·turns.
__device__ inline void CosSinOfTurns(double turns, float* cosine, float* sine) {
  const double quarter = rint(turns * 4.0);
  // |angle| <= π/4. The difference is exact: both are multiples of the last place of `turns`.
  const double angle = (turns - quarter * 0.25) * 6.283185307179586477;
  const double square = angle * angle;
  // Taylor; the first terms left out, angle^14 / 14! and angle^15 / 15!, are below 2^-41.
  double c = 1.0 / 479001600.0;
  c = fma(c, square, -1.0 / 3628800.0);
  c = fma(c, square, 1.0 / 40320.0);
  c = fma(c, square, -1.0 / 720.0);
  c = fma(c, square, 1.0 / 24.0);
  c = fma(c, square, -0.5);
  c = fma(c, square, 1.0);
  double s = 1.0 / 6227020800.0;
  s = fma(s, square, -1.0 / 39916800.0);
  s = fma(s, square, 1.0 / 362880.0);
  s = fma(s, square, -1.0 / 5040.0);
  s = fma(s, square, 1.0 / 120.0);
  s = fma(s, square, -1.0 / 6.0);
  s = fma(s * square, angle, angle);
  // Quarter turns: (c, s) -> (-s, c).
  const double remainder = quarter - 4.0 * floor(quarter * 0.25);
  const bool swap = remainder == 1.0 || remainder == 3.0;
  const double cos_value = swap ? s : c, sin_value = swap ? c : s;
  *cosine = static_cast<float>(remainder == 1.0 || remainder == 2.0 ? -cos_value : cos_value);
  *sine = static_cast<float>(remainder == 2.0 || remainder == 3.0 ? -sin_value : sin_value);
}

}  // namespace bebop::cuda
