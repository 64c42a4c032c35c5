// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>

// What cuda_emulation.h calls and the emulator defines.
namespace bebop::emulation {

// ---- What the emulator offers to this header (block.cc, checks.cc) ----

enum class BarrierKind : uint8_t { kPlain, kCount, kAnd, kOr };
int Barrier(BarrierKind kind, int predicate, int line);

enum class WarpOperation : uint8_t {
  kSync,
  kShuffle,
  kBallot,
  kAny,
  kAll,
  kMatchAny,
  kAddUnsigned,
  kMinUnsigned,
  kMaxUnsigned,
  kMinSigned,
  kMaxSigned,
  kAndBits,
  kOrBits,
  kXorBits,
  kLoadMatrix,
  kMmaBf16,
  kMmaTf32,
};
const char* WarpOperationName(WarpOperation operation);
// Meets the lanes of `mask`. `value` is this lane's operand; `source` the lane whose value a shuffle returns.
uint64_t MeetWarp(WarpOperation operation, uint32_t mask, int line, uint64_t value = 0, int source = 0);
void LoadMatrix(uint32_t* registers, int matrices, bool transpose, const void* row, int line);
void MultiplyAdd(WarpOperation operation, float* d, const uint32_t* a, const uint32_t* b, int line);
int LaneOfThread();
void Sleep();

void* DynamicShared();
void CopyAsync16(void* shared, const void* global, bool valid);
void CommitCopies();
void WaitCopies(int pending);
// Checks an access that the compiler's hooks do not see.
enum class Access : uint8_t { kRead, kWrite, kAtomic };
void CheckAccess(const void* pointer, size_t bytes, Access access);
[[noreturn]] void Trap(int line);

// ---- Launches (runtime.cc) ----

// A kernel with its arguments, copied at the launch.
class KernelCall {
 public:
  explicit KernelCall(const void* function) : function_(function) {}
  virtual ~KernelCall() = default;
  virtual void RunThread() const = 0;
  const void* function() const { return function_; }

 private:
  const void* const function_;
};
cudaError_t Enqueue(std::shared_ptr<const KernelCall> call, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream);

}  // namespace bebop::emulation
