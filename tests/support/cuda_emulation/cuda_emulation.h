// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_emulation_device.h"
#include "cuda_emulation_math.h"
#include "kernels/common/dtype.h"

// The tests' definition of kernels/common/gpu.h: kernel files compiled by the host compiler, for the emulated device (README.md).
// Types and declarations of the runtime come from CUDA's own headers; this header adds what nvcc has built in. Threads of a block
// are fibers of one OS thread, so every function here that waits for other threads is a place where the emulator may switch to
// another one. The trailing `line` parameters are filled in by the compiler: threads that meet must come from the same source
// line.

// Function and variable qualifiers. CUDA's headers leave __global__ and friends empty for host compilers.
#undef __launch_bounds__
#define __launch_bounds__(...)
// One object for all threads of a block, as they share an OS thread; thread_local puts all of them into one known range of
// addresses.
#undef __shared__
#define __shared__ static thread_local

#define BEBOP_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::bebop::emulation::DynamicShared())

// Constant for a thread from start to end, and declared so, which spares the checks of their reads (they are variables to the
// emulator).
extern const uint3 threadIdx;
extern const uint3 blockIdx;
extern const uint3 blockDim;
extern const uint3 gridDim;
inline constexpr int warpSize = 32;

namespace bebop::emulation {

template <typename... Parameters>
class BoundCall final : public KernelCall {
 public:
  template <typename... Args>
  explicit BoundCall(void (*kernel)(Parameters...), Args&&... args)
      : KernelCall(reinterpret_cast<const void*>(kernel)), kernel_(kernel), arguments_(std::forward<Args>(args)...) {}
  BEBOP_EMULATION_UNCHECKED void RunThread() const override { Run(std::index_sequence_for<Parameters...>{}); }

 private:
  template <size_t... kIndex>
  BEBOP_EMULATION_UNCHECKED void Run(std::index_sequence<kIndex...>) const {
    kernel_(std::get<kIndex>(arguments_)...);
  }

  void (*const kernel_)(Parameters...);
  const std::tuple<Parameters...> arguments_;
};

template <typename T>
BEBOP_EMULATION_UNCHECKED uint64_t ToWord(T value) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "a warp exchanges 4 or 8 bytes a lane");
  if constexpr (sizeof(T) == 4)
    return __builtin_bit_cast(uint32_t, value);
  else
    return __builtin_bit_cast(uint64_t, value);
}
template <typename T>
BEBOP_EMULATION_UNCHECKED T FromWord(uint64_t word) {
  if constexpr (sizeof(T) == 4)
    return __builtin_bit_cast(T, static_cast<uint32_t>(word));
  else
    return __builtin_bit_cast(T, word);
}
}  // namespace bebop::emulation

// ---- Barriers and warp operations ----

inline void __syncthreads(int line = __builtin_LINE()) {
  bebop::emulation::Barrier(bebop::emulation::BarrierKind::kPlain, 0, line);
}
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return bebop::emulation::Barrier(bebop::emulation::BarrierKind::kCount, predicate, line);
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return bebop::emulation::Barrier(bebop::emulation::BarrierKind::kAnd, predicate, line);
}
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return bebop::emulation::Barrier(bebop::emulation::BarrierKind::kOr, predicate, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  bebop::emulation::MeetWarp(bebop::emulation::WarpOperation::kSync, mask, line);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, int line = __builtin_LINE()) {
  const int lane = bebop::emulation::LaneOfThread();
  return bebop::emulation::FromWord<T>(bebop::emulation::MeetWarp(bebop::emulation::WarpOperation::kShuffle, mask, line,
                                                                  bebop::emulation::ToWord(value),
                                                                  (lane & ~(width - 1)) | (source & (width - 1))));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, int line = __builtin_LINE()) {
  const int lane = bebop::emulation::LaneOfThread();
  const int source = lane - static_cast<int>(delta);
  return bebop::emulation::FromWord<T>(bebop::emulation::MeetWarp(bebop::emulation::WarpOperation::kShuffle, mask, line,
                                                                  bebop::emulation::ToWord(value),
                                                                  source < (lane & ~(width - 1)) ? lane : source));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, int line = __builtin_LINE()) {
  const int lane = bebop::emulation::LaneOfThread();
  const int source = lane + static_cast<int>(delta);
  return bebop::emulation::FromWord<T>(bebop::emulation::MeetWarp(bebop::emulation::WarpOperation::kShuffle, mask, line,
                                                                  bebop::emulation::ToWord(value),
                                                                  source > (lane | (width - 1)) ? lane : source));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, int line = __builtin_LINE()) {
  const int lane = bebop::emulation::LaneOfThread();
  const int source = lane ^ lane_mask;
  return bebop::emulation::FromWord<T>(bebop::emulation::MeetWarp(bebop::emulation::WarpOperation::kShuffle, mask, line,
                                                                  bebop::emulation::ToWord(value),
                                                                  source > (lane | (width - 1)) ? lane : source));
}

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return static_cast<unsigned>(bebop::emulation::MeetWarp(bebop::emulation::WarpOperation::kBallot, mask, line, predicate != 0));
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return static_cast<int>(bebop::emulation::MeetWarp(bebop::emulation::WarpOperation::kAny, mask, line, predicate != 0));
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return static_cast<int>(bebop::emulation::MeetWarp(bebop::emulation::WarpOperation::kAll, mask, line, predicate != 0));
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, int line = __builtin_LINE()) {
  return static_cast<unsigned>(
      bebop::emulation::MeetWarp(bebop::emulation::WarpOperation::kMatchAny, mask, line, bebop::emulation::ToWord(value)));
}

#define BEBOP_EMULATION_REDUCE(name, type, operation)                                                                      \
  inline type name(unsigned mask, type value, int line = __builtin_LINE()) {                                               \
    return static_cast<type>(                                                                                              \
        bebop::emulation::MeetWarp(bebop::emulation::WarpOperation::operation, mask, line, static_cast<uint32_t>(value))); \
  }
BEBOP_EMULATION_REDUCE(__reduce_add_sync, unsigned, kAddUnsigned)
BEBOP_EMULATION_REDUCE(__reduce_add_sync, int, kAddUnsigned)
BEBOP_EMULATION_REDUCE(__reduce_min_sync, unsigned, kMinUnsigned)
BEBOP_EMULATION_REDUCE(__reduce_min_sync, int, kMinSigned)
BEBOP_EMULATION_REDUCE(__reduce_max_sync, unsigned, kMaxUnsigned)
BEBOP_EMULATION_REDUCE(__reduce_max_sync, int, kMaxSigned)
BEBOP_EMULATION_REDUCE(__reduce_and_sync, unsigned, kAndBits)
BEBOP_EMULATION_REDUCE(__reduce_or_sync, unsigned, kOrBits)
BEBOP_EMULATION_REDUCE(__reduce_xor_sync, unsigned, kXorBits)
#undef BEBOP_EMULATION_REDUCE

// ---- Memory ----

inline void __threadfence() {}
inline void __threadfence_block() {}
// The host's threads do run beside the device's.
BEBOP_EMULATION_UNCHECKED __attribute__((noinline)) inline void __threadfence_system() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void __nanosleep(unsigned) { bebop::emulation::Sleep(); }
inline void __trap(int line = __builtin_LINE()) { bebop::emulation::Trap(line); }

// Loads and stores with a cache hint: plain ones here. Their hooks are in the caller's file.
#define BEBOP_EMULATION_LOAD(name) \
  template <typename T>            \
  T name(const T* pointer) {       \
    return *pointer;               \
  }
BEBOP_EMULATION_LOAD(__ldg)
BEBOP_EMULATION_LOAD(__ldca)
BEBOP_EMULATION_LOAD(__ldcg)
BEBOP_EMULATION_LOAD(__ldcs)
BEBOP_EMULATION_LOAD(__ldlu)
BEBOP_EMULATION_LOAD(__ldcv)
#undef BEBOP_EMULATION_LOAD
#define BEBOP_EMULATION_STORE(name)                      \
  template <typename T>                                  \
  void name(T* pointer, std::type_identity_t<T> value) { \
    *pointer = value;                                    \
  }
BEBOP_EMULATION_STORE(__stwb)
BEBOP_EMULATION_STORE(__stcg)
BEBOP_EMULATION_STORE(__stcs)
BEBOP_EMULATION_STORE(__stwt)
#undef BEBOP_EMULATION_STORE

namespace bebop::emulation {

// Atomics return the old value. Truly atomic, as the host may look at pinned memory at any time.
template <typename T, typename Change>
BEBOP_EMULATION_UNCHECKED __attribute__((noinline)) T AtomicChange(T* pointer, Change change) {
  CheckAccess(pointer, sizeof(T), Access::kAtomic);
  T old = __atomic_load_n(pointer, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(pointer, &old, change(old), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

}  // namespace bebop::emulation

#define BEBOP_EMULATION_ATOMIC(name, type, expression)                                                                          \
  inline type name(type* pointer, type value) {                                                                                 \
    return bebop::emulation::AtomicChange(pointer, [value](type old) BEBOP_EMULATION_UNCHECKED -> type { return expression; }); \
  }
#define BEBOP_EMULATION_ATOMICS(type)                                                                                      \
  BEBOP_EMULATION_ATOMIC(atomicMin, type, value < old ? value : old)                                                       \
  BEBOP_EMULATION_ATOMIC(atomicMax, type, value > old ? value : old)                                                       \
  BEBOP_EMULATION_ATOMIC(atomicAnd, type, static_cast<type>(old & value))                                                  \
  BEBOP_EMULATION_ATOMIC(atomicOr, type, static_cast<type>(old | value))                                                   \
  BEBOP_EMULATION_ATOMIC(atomicXor, type, static_cast<type>(old ^ value))                                                  \
  BEBOP_EMULATION_ATOMIC(atomicExch, type, ((void)old, value))                                                             \
  inline type atomicCAS(type* pointer, type expected, type value) {                                                        \
    return bebop::emulation::AtomicChange(                                                                                 \
        pointer, [expected, value](type old) BEBOP_EMULATION_UNCHECKED -> type { return old == expected ? value : old; }); \
  }
BEBOP_EMULATION_ATOMICS(int)
BEBOP_EMULATION_ATOMICS(unsigned)
BEBOP_EMULATION_ATOMICS(unsigned long long)
BEBOP_EMULATION_ATOMIC(atomicAdd, int, static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value)))
BEBOP_EMULATION_ATOMIC(atomicAdd, unsigned, old + value)
BEBOP_EMULATION_ATOMIC(atomicAdd, unsigned long long, old + value)
BEBOP_EMULATION_ATOMIC(atomicSub, int, static_cast<int>(static_cast<unsigned>(old) - static_cast<unsigned>(value)))
BEBOP_EMULATION_ATOMIC(atomicSub, unsigned, old - value)
// CUDA's wrap-around counters.
BEBOP_EMULATION_ATOMIC(atomicInc, unsigned, old >= value ? 0u : old + 1u)
BEBOP_EMULATION_ATOMIC(atomicDec, unsigned, old == 0u || old > value ? value : old - 1u)
#undef BEBOP_EMULATION_ATOMICS
#undef BEBOP_EMULATION_ATOMIC

// ---- The wrappers of gpu.h ----

namespace bebop::gpu {

inline constexpr size_t kDefaultSharedBytes = 48 * 1024;

template <typename... Parameters, typename... Args>
cudaError_t Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Args&&... args) {
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  return emulation::Enqueue(std::make_shared<const emulation::BoundCall<Parameters...>>(kernel, static_cast<Parameters>(args)...),
                            grid, block, shared_bytes, stream);
}

inline void CpAsync16(void* shared, const void* global, bool valid = true) { emulation::CopyAsync16(shared, global, valid); }
inline void CpAsyncCommit() { emulation::CommitCopies(); }
template <int kPending>
void CpAsyncWait() {
  static_assert(kPending >= 0);
  emulation::WaitCopies(kPending);
}

inline void LdMatrixX4(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
  emulation::LoadMatrix(r, 4, false, row, line);
}
inline void LdMatrixX4Trans(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
  emulation::LoadMatrix(r, 4, true, row, line);
}
inline void LdMatrixX2(uint32_t (&r)[2], const void* row, int line = __builtin_LINE()) {
  emulation::LoadMatrix(r, 2, false, row, line);
}
inline void LdMatrixX2Trans(uint32_t (&r)[2], const void* row, int line = __builtin_LINE()) {
  emulation::LoadMatrix(r, 2, true, row, line);
}

inline void MmaBf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  emulation::MultiplyAdd(emulation::WarpOperation::kMmaBf16, d, a, b, line);
}
inline void MmaTf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  emulation::MultiplyAdd(emulation::WarpOperation::kMmaTf32, d, a, b, line);
}

inline uint4 LoadStream16(const void* pointer) { return *static_cast<const uint4*>(pointer); }
inline void StoreStream16(void* pointer, const uint4& value) { *static_cast<uint4*>(pointer) = value; }

inline uint32_t PackBf16(float low, float high) {
  return static_cast<uint32_t>(ToBFloat16(low).bits) | static_cast<uint32_t>(ToBFloat16(high).bits) << 16;
}
inline float LowBf16(uint32_t pair) { return __uint_as_float(pair << 16); }
inline float HighBf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

}  // namespace bebop::gpu
