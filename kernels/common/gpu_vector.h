// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/gpu.h"
#include "kernels/common/tensor_view.h"

// Device helpers that several operators share (`*_cuda.cu` only): above all eight values at a time, as float, whatever they are
// stored as. Addresses are aligned to 16 bytes, which RowsAligned (below) checks on the host.
namespace bebop::gpu {

inline constexpr int kVector = 8;
// The mask of a warp operation that a whole warp takes part in.
inline constexpr uint32_t kAllLanes = 0xffffffffu;

// TensorView::Row for device code.
template <typename T>
__device__ inline T* Row(const TensorView& view, int64_t row) {
  return static_cast<T*>(view.data) + row * view.row_stride;
}

// One value as it is stored: float, or the bits of bf16 (types in shared memory are trivial).
using Bf16Bits = uint16_t;
__device__ inline float ToValue(float stored) { return stored; }
__device__ inline float ToValue(Bf16Bits stored) { return LowBf16(stored); }
__device__ inline void Store(float value, float* stored) { *stored = value; }
__device__ inline void Store(float value, Bf16Bits* stored) { *stored = static_cast<Bf16Bits>(PackBf16(value, 0.0f)); }

__device__ inline void Load8(const float* from, float (&to)[kVector]) {
  const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
  to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
  to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}
__device__ inline void Load8(const BFloat16* from, float (&to)[kVector]) {
  const uint4 pairs = *reinterpret_cast<const uint4*>(from);
  to[0] = LowBf16(pairs.x), to[1] = HighBf16(pairs.x), to[2] = LowBf16(pairs.y), to[3] = HighBf16(pairs.y);
  to[4] = LowBf16(pairs.z), to[5] = HighBf16(pairs.z), to[6] = LowBf16(pairs.w), to[7] = HighBf16(pairs.w);
}

__device__ inline void Store8(float* to, const float (&from)[kVector]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(from[0], from[1], from[2], from[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(from[4], from[5], from[6], from[7]);
}
// Rounds to nearest even.
__device__ inline void Store8(BFloat16* to, const float (&from)[kVector]) {
  *reinterpret_cast<uint4*>(to) =
      make_uint4(PackBf16(from[0], from[1]), PackBf16(from[2], from[3]), PackBf16(from[4], from[5]), PackBf16(from[6], from[7]));
}

// The same for a type known at run time: a branch that all lanes take alike, where an instance of the kernel for every
// combination of types would be compiled otherwise. `index` counts elements.
__device__ inline void Load8(const void* from, DType dtype, int64_t index, float (&to)[kVector]) {
  if (dtype == DType::kFloat32) {
    Load8(static_cast<const float*>(from) + index, to);
  } else {
    Load8(static_cast<const BFloat16*>(from) + index, to);
  }
}
__device__ inline void Store8(void* to, DType dtype, int64_t index, const float (&from)[kVector]) {
  if (dtype == DType::kFloat32) {
    Store8(static_cast<float*>(to) + index, from);
  } else {
    Store8(static_cast<BFloat16*>(to) + index, from);
  }
}

// Σ over the lanes of each aligned group of kLanes (a power of two), in every lane of the group and in one order. All lanes take
// part. The rounding is explicit, so that no caller's product is contracted with the first addition.
template <int kLanes>
__device__ inline float GroupSum(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value = __fadd_rn(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

// x · sigmoid(x), as the CPU's kernels compute it. The quotient of -inf is NaN there as well.
__device__ inline float Silu(float x) { return x / (1.0f + expf(-x)); }

// Whether rows can be moved 16 bytes at a time.
inline bool RowsAligned(const void* data, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride_bytes % 16 == 0;
}
// What Load8 and Store8 ask of a matrix: rows of whole vectors, each aligned to 16 bytes.
inline bool RowsAligned(const void* data, DType dtype, int64_t cols, int64_t row_stride) {
  return cols % kVector == 0 && RowsAligned(data, row_stride * ElementBytes(dtype));
}
inline bool RowsAligned(const TensorView& view) { return RowsAligned(view.data, view.dtype, view.cols, view.row_stride); }

// Whether a view is the [rows, cols] matrix of float32 that an operator expects, and RowsAligned.
inline bool IsFloatRows(const TensorView& view, int64_t rows, int64_t cols) {
  return view.dtype == DType::kFloat32 && view.rows == rows && view.cols == cols && RowsAligned(view);
}

}  // namespace bebop::gpu
