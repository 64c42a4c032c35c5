// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <math.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

// Arithmetic that nvcc has built in and the host compiler has not. Fast intrinsics (__expf ...) compute exactly here: kernels
// that use them state their tolerance from CUDA's tables of errors, not from a run on this device. What is missing may be added
// here.

// No checks inside: for functions that touch the emulator's own data on behalf of a kernel.
#define BEBOP_EMULATION_UNCHECKED __attribute__((no_sanitize("thread", "alignment")))

// ---- Bits ----

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int value) { return std::bit_cast<float>(value); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long value) { return std::bit_cast<double>(value); }
inline int __double2hiint(double value) { return static_cast<int>(std::bit_cast<uint64_t>(value) >> 32); }
inline int __double2loint(double value) { return static_cast<int>(std::bit_cast<uint64_t>(value)); }
inline double __hiloint2double(int high, int low) {
  return std::bit_cast<double>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low));
}

inline int __popc(unsigned value) { return std::popcount(value); }
inline int __popcll(unsigned long long value) { return std::popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __clzll(long long value) { return std::countl_zero(static_cast<unsigned long long>(value)); }
inline unsigned __brev(unsigned value) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (value >> bit & 1u) << (31 - bit);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __mul24(int a, int b) {
  return static_cast<int>(static_cast<unsigned>(static_cast<int>(static_cast<unsigned>(a) << 8) >> 8) *
                          static_cast<unsigned>(static_cast<int>(static_cast<unsigned>(b) << 8) >> 8));
}
inline unsigned __umul24(unsigned a, unsigned b) { return (a & 0xffffffu) * (b & 0xffffffu); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> (4 * i) & 0xfu;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (nibble & 7u))) & 0xffu;
    if (nibble & 8u) byte = byte & 0x80u ? 0xffu : 0u;
    result |= byte << (8 * i);
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31u) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31u));
}

// ---- Arithmetic with a stated rounding (to nearest even, as the host's default) ----

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float value) { return 1.0f / value; }
inline float __fsqrt_rn(float value) { return sqrtf(value); }
inline float __frsqrt_rn(float value) { return static_cast<float>(1.0 / sqrt(static_cast<double>(value))); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline double __drcp_rn(double value) { return 1.0 / value; }
inline double __dsqrt_rn(double value) { return sqrt(value); }

// ---- Fast and missing functions ----

inline float __fdividef(float a, float b) { return a / b; }
inline float fdividef(float a, float b) { return a / b; }
inline float __expf(float value) { return expf(value); }
inline float __exp10f(float value) { return powf(10.0f, value); }
inline float __logf(float value) { return logf(value); }
inline float __log2f(float value) { return log2f(value); }
inline float __log10f(float value) { return log10f(value); }
inline float __powf(float base, float exponent) { return powf(base, exponent); }
inline float __sinf(float value) { return sinf(value); }
inline float __cosf(float value) { return cosf(value); }
inline float __tanf(float value) { return tanf(value); }
inline float __tanhf(float value) { return tanhf(value); }
inline void __sincosf(float value, float* sine, float* cosine) {
  *sine = sinf(value);
  *cosine = cosf(value);
}
inline float __saturatef(float value) { return value > 0.0f ? (value < 1.0f ? value : 1.0f) : 0.0f; }  // NaN gives 0, as CUDA's
inline float rsqrtf(float value) { return static_cast<float>(1.0 / sqrt(static_cast<double>(value))); }
inline double rsqrt(double value) { return 1.0 / sqrt(value); }
inline float sinpif(float value) { return static_cast<float>(sin(M_PI * static_cast<double>(value))); }
inline float cospif(float value) { return static_cast<float>(cos(M_PI * static_cast<double>(value))); }
inline void sincospif(float value, float* sine, float* cosine) {
  *sine = sinpif(value);
  *cosine = cospif(value);
}

// ---- Conversions ----

inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline float __uint2float_rn(unsigned value) { return static_cast<float>(value); }
inline float __ll2float_rn(long long value) { return static_cast<float>(value); }
inline float __ull2float_rn(unsigned long long value) { return static_cast<float>(value); }
inline float __double2float_rn(double value) { return static_cast<float>(value); }
inline double __int2double_rn(int value) { return value; }
inline double __uint2double_rn(unsigned value) { return value; }
inline double __ull2double_rn(unsigned long long value) { return static_cast<double>(value); }

namespace bebop::emulation {

// The device's conversions saturate, and turn NaN into 0; the host's would be undefined there.
template <typename Integer, typename Float>
Integer ToInteger(Float value) {
  if (value != value) return 0;
  if (value >= -static_cast<Float>(std::numeric_limits<Integer>::min()) && std::is_signed_v<Integer>) {
    return std::numeric_limits<Integer>::max();
  }
  if (!std::is_signed_v<Integer> && value >= std::ldexp(static_cast<Float>(1), std::numeric_limits<Integer>::digits)) {
    return std::numeric_limits<Integer>::max();
  }
  if (value <= static_cast<Float>(std::numeric_limits<Integer>::min())) return std::numeric_limits<Integer>::min();
  return static_cast<Integer>(value);
}

}  // namespace bebop::emulation

inline int __float2int_rn(float value) { return bebop::emulation::ToInteger<int>(rintf(value)); }
inline int __float2int_rz(float value) { return bebop::emulation::ToInteger<int>(value); }
inline int __float2int_rd(float value) { return bebop::emulation::ToInteger<int>(floorf(value)); }
inline int __float2int_ru(float value) { return bebop::emulation::ToInteger<int>(ceilf(value)); }
inline unsigned __float2uint_rn(float value) { return bebop::emulation::ToInteger<unsigned>(rintf(value)); }
inline unsigned __float2uint_rz(float value) { return bebop::emulation::ToInteger<unsigned>(value); }
inline long long __float2ll_rn(float value) { return bebop::emulation::ToInteger<long long>(rintf(value)); }
inline long long __float2ll_rz(float value) { return bebop::emulation::ToInteger<long long>(value); }
inline int __double2int_rn(double value) { return bebop::emulation::ToInteger<int>(rint(value)); }
inline int __double2int_rz(double value) { return bebop::emulation::ToInteger<int>(value); }
inline long long __double2ll_rn(double value) { return bebop::emulation::ToInteger<long long>(rint(value)); }
inline long long __double2ll_rz(double value) { return bebop::emulation::ToInteger<long long>(value); }

// ---- min and max for mixed types, NaN-ignoring for floats, as CUDA has them in the global namespace ----

template <typename A, typename B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> min(A a, B b) {
  using Common = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<Common>) {
    return std::fmin(static_cast<Common>(a), static_cast<Common>(b));
  } else {
    return static_cast<Common>(a) < static_cast<Common>(b) ? static_cast<Common>(a) : static_cast<Common>(b);
  }
}
template <typename A, typename B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> max(A a, B b) {
  using Common = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<Common>) {
    return std::fmax(static_cast<Common>(a), static_cast<Common>(b));
  } else {
    return static_cast<Common>(a) < static_cast<Common>(b) ? static_cast<Common>(b) : static_cast<Common>(a);
  }
}
