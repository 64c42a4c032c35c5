// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/common/cpu_features.h"
#include "kernels/common/dtype.h"

// The CPU operators' vectors: one source, compiled for several instruction sets, chosen at run time.
//
// A kernel is a template over a register description (PortableSet, Avx2Set, Avx512Set) in terms of Floats<Set>, 16 floats that
// behave alike for every set; BEBOP_SIMD_RANGE_KERNEL instantiates it for each and picks one. Whatever the set, element i of a
// reduction goes to lane i % 16 and the lanes are added in one fixed tree, so results differ between sets only where MulAdd is one
// rounding (FMA) or two, and never with the row count, the threads or the batch.
//
// Everything here is always_inline: a vector never crosses a call between functions of different targets.

#define BEBOP_SIMD_INLINE [[gnu::always_inline]] inline

// Unrolls the following loop of constant length, so that arrays of vectors become registers.
#if defined(__clang__)
#define BEBOP_UNROLL _Pragma("unroll")
#else
#define BEBOP_UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(__x86_64__)
#define BEBOP_TARGET_AVX2 [[gnu::target("avx2,fma,bmi,bmi2")]]
#define BEBOP_TARGET_AVX512 [[gnu::target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl")]]
#else
#define BEBOP_TARGET_AVX2
#define BEBOP_TARGET_AVX512
#endif

namespace bebop::cpu::simd {

// Register descriptions: floats per register, fused multiply-add, vectors that an inner loop may keep in registers.
struct PortableSet {
  static constexpr int kLanes = 4;
  static constexpr bool kFma = false;
  static constexpr int kAccumulators = 2;  // of 16 floats
};
struct Avx2Set {
  static constexpr int kLanes = 8;
  static constexpr bool kFma = true;
  static constexpr int kAccumulators = 4;
};
struct Avx512Set {
  static constexpr int kLanes = 16;
  static constexpr bool kFma = true;
  static constexpr int kAccumulators = 8;
};

inline constexpr int kWidth = 16;  // floats in a Floats

typedef float Float4 __attribute__((vector_size(16)));
typedef float Float8 __attribute__((vector_size(32)));
typedef float Float16 __attribute__((vector_size(64)));

template <int lanes>
struct RegisterTypes {
  typedef float Float __attribute__((vector_size(lanes * 4)));
  typedef int32_t Int __attribute__((vector_size(lanes * 4)));
  typedef uint32_t Uint __attribute__((vector_size(lanes * 4)));
  typedef uint16_t Half __attribute__((vector_size(lanes * 2)));
  typedef double Double __attribute__((vector_size(lanes * 8)));
};

template <class Set>
struct Floats {
  using Part = typename RegisterTypes<Set::kLanes>::Float;
  static constexpr int kParts = kWidth / Set::kLanes;
  Part part[kParts];
};

template <class Set>
BEBOP_SIMD_INLINE Floats<Set> Broadcast(float value) {
  Floats<Set> out;
  BEBOP_UNROLL
  for (int i = 0; i < out.kParts; ++i) out.part[i] = typename Floats<Set>::Part{} + value;
  return out;
}

template <class Set>
BEBOP_SIMD_INLINE Floats<Set> Zero() {
  Floats<Set> out;
  BEBOP_UNROLL
  for (int i = 0; i < out.kParts; ++i) out.part[i] = typename Floats<Set>::Part{};
  return out;
}

// 16 values from memory of any alignment.
template <class Set>
BEBOP_SIMD_INLINE Floats<Set> Load(const float* source) {
  Floats<Set> out;
  BEBOP_UNROLL
  for (int i = 0; i < out.kParts; ++i) std::memcpy(&out.part[i], source + i * Set::kLanes, sizeof out.part[i]);
  return out;
}
template <class Set>
BEBOP_SIMD_INLINE Floats<Set> Load(const BFloat16* source) {
  using Types = RegisterTypes<Set::kLanes>;
  Floats<Set> out;
  BEBOP_UNROLL
  for (int i = 0; i < out.kParts; ++i) {
    typename Types::Half bits;
    std::memcpy(&bits, source + i * Set::kLanes, sizeof bits);
    const typename Types::Uint wide = __builtin_convertvector(bits, typename Types::Uint) << 16;
    std::memcpy(&out.part[i], &wide, sizeof wide);
  }
  return out;
}
// `count` values (1..16), then zeros.
template <class Set, typename Element>
BEBOP_SIMD_INLINE Floats<Set> LoadPartial(const Element* source, int64_t count) {
  if (count >= kWidth) return Load<Set>(source);
  Element padded[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = source[i];
  return Load<Set>(padded);
}

template <class Set>
BEBOP_SIMD_INLINE void Store(const Floats<Set>& value, float* destination) {
  BEBOP_UNROLL
  for (int i = 0; i < value.kParts; ++i) std::memcpy(destination + i * Set::kLanes, &value.part[i], sizeof value.part[i]);
}
template <class Set>
BEBOP_SIMD_INLINE void StorePartial(const Floats<Set>& value, float* destination, int64_t count) {
  if (count >= kWidth) return Store(value, destination);
  float padded[kWidth];
  Store(value, padded);
  for (int64_t i = 0; i < count; ++i) destination[i] = padded[i];
}

#define BEBOP_SIMD_OPERATOR(op)                                                                        \
  template <class Set>                                                                                 \
  BEBOP_SIMD_INLINE Floats<Set> operator op(const Floats<Set>& a, const Floats<Set>& b) {              \
    Floats<Set> out;                                                                                   \
    BEBOP_UNROLL                                                                                       \
    for (int i = 0; i < out.kParts; ++i) out.part[i] = a.part[i] op b.part[i];                         \
    return out;                                                                                        \
  }
BEBOP_SIMD_OPERATOR(+)
BEBOP_SIMD_OPERATOR(-)
BEBOP_SIMD_OPERATOR(*)
BEBOP_SIMD_OPERATOR(/)
#undef BEBOP_SIMD_OPERATOR

// a·b + c: one rounding where the set has FMA. (Compilers turn the loop over lanes into the one instruction.)
template <class Set>
BEBOP_SIMD_INLINE Floats<Set> MulAdd(const Floats<Set>& a, const Floats<Set>& b, const Floats<Set>& c) {
  Floats<Set> out;
  BEBOP_UNROLL
  for (int i = 0; i < out.kParts; ++i) {
    if constexpr (Set::kFma) {
      const typename Floats<Set>::Part x = a.part[i], y = b.part[i], z = c.part[i];
      typename Floats<Set>::Part fused;
      for (int lane = 0; lane < Set::kLanes; ++lane) fused[lane] = __builtin_fmaf(x[lane], y[lane], z[lane]);
      out.part[i] = fused;
    } else {
      out.part[i] = a.part[i] * b.part[i] + c.part[i];
    }
  }
  return out;
}

// Sum of the lanes: l + (l+8), then l + (l+4), then (0+2) + (1+3).
BEBOP_SIMD_INLINE Float4 Fold(const Float4& v) { return v; }
BEBOP_SIMD_INLINE Float4 Fold(const Float8& v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
BEBOP_SIMD_INLINE Float4 Fold(const Float16& v) {
  return Fold(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
template <class Set>
BEBOP_SIMD_INLINE Float4 FoldToFour(const Floats<Set>& value) {
  if constexpr (Set::kLanes == 16) {
    return Fold(value.part[0]);
  } else if constexpr (Set::kLanes == 8) {
    return Fold(value.part[0] + value.part[1]);
  } else {
    return (value.part[0] + value.part[2]) + (value.part[1] + value.part[3]);
  }
}
template <class Set>
BEBOP_SIMD_INLINE float Sum(const Floats<Set>& value) {
  const Float4 four = FoldToFour(value);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
// The sums of four vectors at once, each in the order of Sum.
template <class Set>
BEBOP_SIMD_INLINE Float4 SumFour(const Floats<Set>& a, const Floats<Set>& b, const Floats<Set>& c, const Floats<Set>& d) {
  const Float4 fa = FoldToFour(a), fb = FoldToFour(b), fc = FoldToFour(c), fd = FoldToFour(d);
  const Float4 ab = __builtin_shufflevector(fa, fb, 0, 1, 4, 5) + __builtin_shufflevector(fa, fb, 2, 3, 6, 7);
  const Float4 cd = __builtin_shufflevector(fc, fd, 0, 1, 4, 5) + __builtin_shufflevector(fc, fd, 2, 3, 6, 7);
  return __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
}

// Largest lane, or `floor` if that is larger. Unspecified with NaN lanes.
BEBOP_SIMD_INLINE Float4 FoldMax(const Float4& v) { return v; }
BEBOP_SIMD_INLINE Float4 FoldMax(const Float8& v) {
  const Float4 a = __builtin_shufflevector(v, v, 0, 1, 2, 3), b = __builtin_shufflevector(v, v, 4, 5, 6, 7);
  return a > b ? a : b;
}
BEBOP_SIMD_INLINE Float4 FoldMax(const Float16& v) {
  const Float8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  const Float8 b = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return FoldMax(a > b ? a : b);
}
template <class Set>
BEBOP_SIMD_INLINE float MaxOr(const Floats<Set>& value, float floor) {
  Float4 four = FoldMax(value.part[0]);
  BEBOP_UNROLL
  for (int i = 1; i < value.kParts; ++i) {
    const Float4 other = FoldMax(value.part[i]);
    four = four > other ? four : other;
  }
  float out = floor;
  BEBOP_UNROLL
  for (int i = 0; i < 4; ++i) out = four[i] > out ? four[i] : out;
  return out;
}

// e^x within 2 ulp for x in [-86, 88.7]; 0 below (so exp(-inf) = 0), +inf above, NaN for NaN.
// x = n·ln2 + r with |r| <= ln2/2, ln2 in two parts; e^r by the polynomial of the Cephes library's expf (S. L. Moshier).
template <class Set>
BEBOP_SIMD_INLINE Floats<Set> Exp(const Floats<Set>& x) {
  using Types = RegisterTypes<Set::kLanes>;
  constexpr float kLow = -86.0f, kHigh = 88.7228394f;
  const typename Types::Float zero = {};
  Floats<Set> clamped;
  BEBOP_UNROLL
  for (int i = 0; i < x.kParts; ++i) {
    const typename Types::Float below = x.part[i] > kHigh ? zero + kHigh : x.part[i];
    clamped.part[i] = below < kLow ? zero + kLow : below;
  }
  const Floats<Set> round = Broadcast<Set>(12582912.0f);  // 1.5·2^23: adding it leaves the rounded value in the low bits
  const Floats<Set> shifted = MulAdd(clamped, Broadcast<Set>(1.44269504088896341f), round);
  const Floats<Set> n = shifted - round;
  Floats<Set> r = MulAdd(n, Broadcast<Set>(-0.693359375f), clamped);
  r = MulAdd(n, Broadcast<Set>(2.12194440e-4f), r);
  Floats<Set> poly = MulAdd(Broadcast<Set>(1.9875691500e-4f), r, Broadcast<Set>(1.3981999507e-3f));
  poly = MulAdd(poly, r, Broadcast<Set>(8.3334519073e-3f));
  poly = MulAdd(poly, r, Broadcast<Set>(4.1665795894e-2f));
  poly = MulAdd(poly, r, Broadcast<Set>(1.6666665459e-1f));
  poly = MulAdd(poly, r, Broadcast<Set>(5.0000001201e-1f));
  poly = MulAdd(poly, r * r, r) + Broadcast<Set>(1.0f);
  Floats<Set> out;
  BEBOP_UNROLL
  for (int i = 0; i < x.kParts; ++i) {
    // 2^(n-1) and then times 2, as 2^128 is not a float but e^88.7 is.
    typename Types::Uint bits;
    std::memcpy(&bits, &shifted.part[i], sizeof bits);
    bits = (bits << 23) + (126u << 23);
    typename Types::Float scale;
    std::memcpy(&scale, &bits, sizeof bits);
    const typename Types::Float result = poly.part[i] * scale * 2.0f;
    const typename Types::Float from_zero = x.part[i] < kLow ? zero : result;
    out.part[i] = x.part[i] > kHigh ? zero + std::numeric_limits<float>::infinity() : from_zero;
  }
  return out;
}

// 1 / (1 + e^-x).
template <class Set>
BEBOP_SIMD_INLINE Floats<Set> Sigmoid(const Floats<Set>& x) {
  const Floats<Set> one = Broadcast<Set>(1.0f);
  return one / (one + Exp(Zero<Set>() - x));
}
// x / (1 + e^-x).
template <class Set>
BEBOP_SIMD_INLINE Floats<Set> Silu(const Floats<Set>& x) {
  return x / (Broadcast<Set>(1.0f) + Exp(Zero<Set>() - x));
}

// Σ x² in double: products of floats are exact there, so this has the same bits on every set.
template <class Set>
BEBOP_SIMD_INLINE double SumOfSquares(const float* x, int64_t count) {
  constexpr int kDoubles = Set::kLanes / 2;  // doubles per register
  constexpr int kParts = kWidth / kDoubles;
  using Part = typename RegisterTypes<kDoubles>::Double;
  using Source = typename RegisterTypes<kDoubles>::Float;
  Part sums[kParts];
  BEBOP_UNROLL
  for (int j = 0; j < kParts; ++j) sums[j] = Part{};
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    BEBOP_UNROLL
    for (int j = 0; j < kParts; ++j) {
      Source part;
      std::memcpy(&part, x + i + j * kDoubles, sizeof part);
      const Part wide = __builtin_convertvector(part, Part);
      sums[j] += wide * wide;
    }
  }
  double lanes[kWidth];
  std::memcpy(lanes, sums, sizeof lanes);
  for (int lane = 0; i < count; ++i, ++lane) lanes[lane] += static_cast<double>(x[i]) * x[i];
  for (int step = kWidth / 2; step > 0; step /= 2) {
    for (int lane = 0; lane < step; ++lane) lanes[lane] += lanes[lane + step];
  }
  return lanes[0];
}

// A kernel compiled for one instruction set: does the items [begin, end) of its arguments.
template <class Args>
using RangeKernel = void (*)(const Args& args, int64_t begin, int64_t end);

}  // namespace bebop::cpu::simd

// For a template `template <class Set> BEBOP_SIMD_INLINE void Name(const Args&, int64_t begin, int64_t end)` in this namespace,
// defines `RangeKernel<Args> Name##For(InstructionSet)`.
#define BEBOP_SIMD_RANGE_KERNEL(Name, Args)                                                                             \
  void Name##Portable(const Args& args, int64_t begin, int64_t end) { Name<simd::PortableSet>(args, begin, end); }      \
  BEBOP_SIMD_WIDE_RANGE_KERNELS(Name, Args)

#if defined(__x86_64__)
#define BEBOP_SIMD_WIDE_RANGE_KERNELS(Name, Args)                                                                       \
  BEBOP_TARGET_AVX2 void Name##Avx2(const Args& args, int64_t begin, int64_t end) {                                     \
    Name<simd::Avx2Set>(args, begin, end);                                                                              \
  }                                                                                                                     \
  BEBOP_TARGET_AVX512 void Name##Avx512(const Args& args, int64_t begin, int64_t end) {                                 \
    Name<simd::Avx512Set>(args, begin, end);                                                                            \
  }                                                                                                                     \
  simd::RangeKernel<Args> Name##For(InstructionSet set) {                                                               \
    return set == InstructionSet::kPortable ? Name##Portable : set == InstructionSet::kAvx2 ? Name##Avx2 : Name##Avx512; \
  }
#else
#define BEBOP_SIMD_WIDE_RANGE_KERNELS(Name, Args) \
  simd::RangeKernel<Args> Name##For(InstructionSet) { return Name##Portable; }
#endif
