// SPDX-License-Identifier: Apache-2.0
// One broken rule a kernel, as small as it can be: the kernels compute nothing.
#include "planted_bugs.h"

#include "kernels/common/gpu.h"

namespace bebop::emulation_tests {
namespace {

constexpr unsigned kFull = 0xffffffffu;

// ---- Global memory ----

__global__ void ReadPastEnd(BugArguments a) {
  if (threadIdx.x == 0) a.data[0] = a.data[256];
}
__global__ void WritePastEnd(BugArguments a) { a.data[threadIdx.x + 256 - 31] = 1.0f; }
__global__ void ReadBeforeStart(BugArguments a) {
  if (threadIdx.x == 3) a.data[0] = a.data[-1];
}
__global__ void ReadStraddlesEnd(BugArguments a) {
  if (threadIdx.x == 0) a.data[0] = static_cast<float>(reinterpret_cast<const uint4*>(a.data + 252)[1].w);
}
__global__ void ReadFreed(BugArguments a) {
  if (threadIdx.x == 0) a.data[0] = a.freed[0];
}
__global__ void ReadHost(BugArguments a) {
  if (threadIdx.x == 0) a.data[0] = a.host[0];
}
__global__ void WriteNull(BugArguments a) {
  if (threadIdx.x == 0) *a.null = 1.0f;
}
__global__ void ReadPastPinned(BugArguments a) {
  if (threadIdx.x == 0) a.data[0] = a.pinned[64];
}
__global__ void MisalignedVector(BugArguments a) {
  const uint4* vector = reinterpret_cast<const uint4*>(a.data + 1);
  if (threadIdx.x == 0) a.data[0] = static_cast<float>(vector->x);
}
__global__ void StreamLoadMisaligned(BugArguments a) {
  if (threadIdx.x == 0) a.data[0] = static_cast<float>(gpu::LoadStream16(a.data + 2).x);
}
__global__ void AtomicPastEnd(BugArguments a) { atomicAdd(reinterpret_cast<unsigned*>(a.data) + 256, 1u); }
__global__ void BlocksWriteSame(BugArguments a) {
  if (threadIdx.x == 0) a.data[7] = static_cast<float>(blockIdx.x);
}
__global__ void BlockReadsOther(BugArguments a) {
  // Each block reads what its neighbour writes: a race in whatever order the blocks come.
  if (threadIdx.x == 0) a.data[blockIdx.x] = a.data[(blockIdx.x + 1) % gridDim.x] + 1.0f;
}
__global__ void GlobalWithoutBarrier(BugArguments a) {
  a.data[threadIdx.x] = 1.0f;
  a.data[64 + threadIdx.x] = a.data[threadIdx.x ^ 32];
}

// ---- Shared memory ----

__global__ void MissingBarrier(BugArguments a) {
  __shared__ float values[64];
  values[threadIdx.x] = 1.0f;
  a.data[threadIdx.x] = values[threadIdx.x ^ 33];
}
__global__ void MissingBarrierBeforeReuse(BugArguments a) {
  __shared__ float values[64];
  values[threadIdx.x] = 1.0f;
  __syncthreads();
  a.data[threadIdx.x] = values[threadIdx.x ^ 33];
  values[threadIdx.x] = 2.0f;
}
__global__ void TwoWriters(BugArguments a) {
  __shared__ float values[32];
  values[threadIdx.x / 2] = 1.0f;
  __syncthreads();
  a.data[threadIdx.x] = values[threadIdx.x / 2];
}
__global__ void MissingSyncWarp(BugArguments a) {
  __shared__ float values[64];
  values[threadIdx.x] = 1.0f;
  const float other = __shfl_xor_sync(kFull, values[threadIdx.x], 1);  // shuffles order no memory
  a.data[threadIdx.x] = other + values[threadIdx.x ^ 1];
}
__global__ void SyncWarpOfOtherLanes(BugArguments a) {
  __shared__ float values[64];
  values[threadIdx.x] = 1.0f;
  __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  a.data[threadIdx.x] = values[threadIdx.x ^ 16];
}
__global__ void SyncWarpAcrossWarps(BugArguments a) {
  __shared__ float values[64];
  values[threadIdx.x] = 1.0f;
  __syncwarp();
  a.data[threadIdx.x] = values[threadIdx.x ^ 32];
}
__global__ void MissingSecondSyncWarp(BugArguments a) {
  __shared__ float values[64];
  values[threadIdx.x] = 1.0f;
  __syncwarp();
  values[threadIdx.x] = 2.0f;
  a.data[threadIdx.x] = values[threadIdx.x ^ 1];
}
__global__ void PlainBesideAtomic(BugArguments a) {
  __shared__ unsigned count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1u);
  a.data[threadIdx.x] = static_cast<float>(count);
}
__global__ void UninitializedStatic(BugArguments a) {
  __shared__ float values[64];
  if (threadIdx.x != 5) values[threadIdx.x] = 1.0f;
  __syncthreads();
  a.data[threadIdx.x] = values[threadIdx.x];
}
__global__ void UninitializedDynamic(BugArguments a) {
  BEBOP_DYNAMIC_SHARED(float, values);
  if (threadIdx.x != 5) values[threadIdx.x] = 1.0f;
  __syncthreads();
  a.data[threadIdx.x] = values[threadIdx.x];
}
__global__ void UninitializedHalfWord(BugArguments a) {
  __shared__ uint16_t values[128];
  values[threadIdx.x * 2] = 1;
  __syncthreads();
  a.data[threadIdx.x] = static_cast<float>(values[threadIdx.x * 2 + 1]);
}
__global__ void ValueOfOtherBlock(BugArguments a) {
  __shared__ float value;
  if (threadIdx.x == 0 && blockIdx.x == 0) value = 1.0f;
  __syncthreads();
  a.data[blockIdx.x * 64 + threadIdx.x] = value;
}
__global__ void DynamicPastEnd(BugArguments) {
  BEBOP_DYNAMIC_SHARED(float, values);
  values[threadIdx.x + 1] = 1.0f;
}
__global__ void StaticPastEnd(BugArguments a) {
  __shared__ float values[63];
  values[threadIdx.x] = 1.0f;
  a.data[threadIdx.x] = values[threadIdx.x];
}
__global__ void StaticAndDynamic(BugArguments a) {
  __shared__ float values[4096];
  for (int i = threadIdx.x; i < 4096; i += 64) values[i] = 0.0f;
  a.data[threadIdx.x] = values[threadIdx.x];
}

// ---- Asynchronous copies ----

__global__ void CopyWithoutWait(BugArguments a) {
  BEBOP_DYNAMIC_SHARED(uint16_t, tile);
  gpu::CpAsync16(tile + threadIdx.x * 8, a.halves + threadIdx.x * 8);
  gpu::CpAsyncCommit();
  __syncthreads();
  a.data[threadIdx.x] = static_cast<float>(tile[threadIdx.x]);
}
__global__ void CopyWithoutCommit(BugArguments a) {
  BEBOP_DYNAMIC_SHARED(uint16_t, tile);
  gpu::CpAsync16(tile + threadIdx.x * 8, a.halves + threadIdx.x * 8);
  gpu::CpAsyncWait<0>();
  __syncthreads();
  a.data[threadIdx.x] = static_cast<float>(tile[threadIdx.x]);
}
__global__ void CopyWaitsForFewer(BugArguments a) {
  BEBOP_DYNAMIC_SHARED(uint16_t, tile);
  gpu::CpAsync16(tile + threadIdx.x * 8, a.halves + threadIdx.x * 8);
  gpu::CpAsyncCommit();
  gpu::CpAsyncWait<1>();
  __syncthreads();
  a.data[threadIdx.x] = static_cast<float>(tile[threadIdx.x]);
}
__global__ void CopyWithoutBarrier(BugArguments a) {
  BEBOP_DYNAMIC_SHARED(uint16_t, tile);
  gpu::CpAsync16(tile + threadIdx.x * 8, a.halves + threadIdx.x * 8);
  gpu::CpAsyncCommit();
  gpu::CpAsyncWait<0>();
  a.data[threadIdx.x] = static_cast<float>(tile[(threadIdx.x ^ 32) * 8]);
}
__global__ void CopyIntoBufferInUse(BugArguments a) {
  BEBOP_DYNAMIC_SHARED(uint16_t, tile);
  for (int i = 0; i < 8; ++i) tile[threadIdx.x * 8 + i] = 0;
  __syncthreads();
  a.data[threadIdx.x] = static_cast<float>(tile[(threadIdx.x ^ 32) * 8]);
  gpu::CpAsync16(tile + threadIdx.x * 8, a.halves + threadIdx.x * 8);
  gpu::CpAsyncCommit();
  gpu::CpAsyncWait<0>();
}
__global__ void CopyMisaligned(BugArguments a) {
  BEBOP_DYNAMIC_SHARED(uint16_t, tile);
  gpu::CpAsync16(tile + threadIdx.x * 8, a.halves + threadIdx.x * 8 + 1);
}
__global__ void CopyPastEnd(BugArguments a) {
  BEBOP_DYNAMIC_SHARED(uint16_t, tile);
  gpu::CpAsync16(tile + threadIdx.x * 8, a.halves + 4096 - 63 * 8 + threadIdx.x * 8);
}
__global__ void CopyToLocal(BugArguments a) {
  alignas(16) uint16_t local[8];
  gpu::CpAsync16(local, a.halves);
}
__global__ void MatrixRowMisaligned(BugArguments) {
  BEBOP_DYNAMIC_SHARED(uint16_t, tile);
  for (int i = threadIdx.x; i < 512; i += 64) tile[i] = 0;
  __syncthreads();
  uint32_t r[4];
  gpu::LdMatrixX4(r, tile + threadIdx.x % 32 * 8 + 4);
}
__global__ void MatrixWithoutSync(BugArguments a) {
  BEBOP_DYNAMIC_SHARED(uint16_t, tile);
  for (int i = 0; i < 8; ++i) tile[(threadIdx.x ^ 1) * 8 + i] = 0;
  uint32_t r[4];
  gpu::LdMatrixX4(r, tile + threadIdx.x * 8);
  a.data[threadIdx.x] = static_cast<float>(r[0]);
}

// ---- Barriers and warps ----

__global__ void BarrierInBranch(BugArguments) {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void TwoBarriers(BugArguments) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void ReturnBeforeBarrier(BugArguments) {
  if (threadIdx.x == 63) return;
  __syncthreads();
}
__global__ void NotInMask(BugArguments) { __syncwarp(0x0000ffffu); }
__global__ void MasksDiffer(BugArguments) { __syncwarp(threadIdx.x % 32 < 16 ? kFull : 0xffff0000u); }
__global__ void OperationsDiffer(BugArguments a) {
  if (threadIdx.x % 32 < 16) {
    a.data[threadIdx.x] = __shfl_sync(kFull, 1.0f, 0);
  } else {
    __syncwarp();
  }
}
__global__ void LanesReturned(BugArguments) {
  if (threadIdx.x % 32 == 31) return;
  __syncwarp();
}
__global__ void ArrivesAfterReturn(BugArguments a) {
  volatile unsigned* returned = a.counter;
  if (threadIdx.x == 31) {
    *returned = 1;
    return;
  }
  while (*returned == 0) __nanosleep(10);
  __syncwarp();
}
__global__ void TwoSyncWarps(BugArguments) {
  if (threadIdx.x % 32 < 16) {
    __syncwarp();
  } else {
    __syncwarp();
  }
}
__global__ void ShuffleFromOutside(BugArguments a) {
  if (threadIdx.x % 32 < 16) a.data[threadIdx.x] = __shfl_down_sync(0x0000ffffu, 1.0f, 8);
}
__global__ void LanesThatAreNot(BugArguments) { __syncwarp(); }
__global__ void WarpAndBarrier(BugArguments) {
  if (threadIdx.x % 32 == 0) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}
__global__ void Traps(BugArguments) {
  if (threadIdx.x == 40) __trap();
}
__global__ void SpinsForever(BugArguments a) {
  const volatile unsigned* counter = a.counter;
  while (*counter == 0) __nanosleep(100);
}

template <void (*kKernel)(BugArguments), unsigned kBlocks = 1, unsigned kThreads = 64, size_t kSharedBytes = 0>
cudaError_t Run(const BugArguments& arguments, cudaStream_t stream) {
  return gpu::Launch(kKernel, kBlocks, kThreads, kSharedBytes, stream, arguments);
}

}  // namespace

const Bug kBugs[] = {
    {"ReadPastEnd", "reads 4 bytes at .* out of bounds: offset 1024 of an allocation of 1024 bytes", Run<ReadPastEnd>},
    {"WritePastEnd", "writes 4 bytes at .* out of bounds: offset", Run<WritePastEnd>},
    {"ReadBeforeStart", "out of bounds: offset -4 of", Run<ReadBeforeStart>},
    {"ReadStraddlesEnd", "out of bounds", Run<ReadStraddlesEnd>},
    {"ReadFreed", "freed memory", Run<ReadFreed>},
    {"ReadHost", "reads 4 bytes of the host's memory", Run<ReadHost>},
    {"WriteNull", "a null pointer", Run<WriteNull>},
    {"ReadPastPinned", "out of bounds: offset 256 of an allocation of 256 bytes", Run<ReadPastPinned>},
    {"MisalignedVector", "misaligned access to a .*uint4.*no multiple of 16", Run<MisalignedVector>},
    {"StreamLoadMisaligned", "misaligned access to a .*uint4.*no multiple of 16", Run<StreamLoadMisaligned>},
    {"AtomicPastEnd", "out of bounds", Run<AtomicPastEnd>},
    {"BlocksWriteSame", "writes global memory .* another block", Run<BlocksWriteSame, 2>},
    {"BlockReadsOther", "reads global memory .* another block", Run<BlockReadsOther, 4>},
    {"GlobalWithoutBarrier", "race on global memory", Run<GlobalWithoutBarrier>},
    {"MissingBarrier", "race on shared memory|has not written", Run<MissingBarrier>},
    {"MissingBarrierBeforeReuse", "race on shared memory", Run<MissingBarrierBeforeReuse>},
    {"TwoWriters", "race on shared memory.*writes it.*wrote it", Run<TwoWriters>},
    {"MissingSyncWarp", "race on shared memory", Run<MissingSyncWarp>},
    {"SyncWarpOfOtherLanes", "race on shared memory|has not written", Run<SyncWarpOfOtherLanes>},
    {"SyncWarpAcrossWarps", "race on shared memory|has not written", Run<SyncWarpAcrossWarps>},
    {"MissingSecondSyncWarp", "race on shared memory", Run<MissingSecondSyncWarp>},
    {"PlainBesideAtomic", "race on shared memory", Run<PlainBesideAtomic>},
    {"UninitializedStatic", "has not written", Run<UninitializedStatic>},
    {"UninitializedDynamic", "has not written", Run<UninitializedDynamic, 1, 64, 256>},
    {"UninitializedHalfWord", "has not written", Run<UninitializedHalfWord>},
    {"ValueOfOtherBlock", "has not written", Run<ValueOfOtherBlock, 3>},
    {"DynamicPastEnd", "offset 256 of 256 bytes of dynamic shared memory", Run<DynamicPastEnd, 1, 64, 256>},
    {"StaticPastEnd", "index 63 is out of bounds of an array", Run<StaticPastEnd>},
    {"StaticAndDynamic", "exceeds what the launch may have", Run<StaticAndDynamic, 1, 64, 40000>},
    {"CopyWithoutWait", "asynchronous copy is still writing", Run<CopyWithoutWait, 1, 64, 1024>},
    {"CopyWithoutCommit", "asynchronous copy is still writing", Run<CopyWithoutCommit, 1, 64, 1024>},
    {"CopyWaitsForFewer", "asynchronous copy is still writing", Run<CopyWaitsForFewer, 1, 64, 1024>},
    {"CopyWithoutBarrier", "race on shared memory|asynchronous copy|has not written", Run<CopyWithoutBarrier, 1, 64, 1024>},
    {"CopyIntoBufferInUse", "race on shared memory|asynchronous copy", Run<CopyIntoBufferInUse, 1, 64, 1024>},
    {"CopyMisaligned", "the source of CpAsync16 is at .* no multiple of 16", Run<CopyMisaligned, 1, 64, 1024>},
    {"CopyPastEnd", "out of bounds", Run<CopyPastEnd, 1, 64, 1024>},
    {"CopyToLocal", "the destination of CpAsync16 at .* is not in shared memory", Run<CopyToLocal>},
    {"MatrixRowMisaligned", "ldmatrix is at .* no multiple of 16", Run<MatrixRowMisaligned, 1, 64, 1024>},
    {"MatrixWithoutSync", "race on shared memory|has not written", Run<MatrixWithoutSync, 1, 64, 1024>},
    {"BarrierInBranch", "returned while others wait at a barrier|after other threads of the block have returned",
     Run<BarrierInBranch>},
    {"TwoBarriers", "divergent barriers", Run<TwoBarriers>},
    {"ReturnBeforeBarrier", "returned while others wait at a barrier|after other threads of the block have returned",
     Run<ReturnBeforeBarrier>},
    {"NotInMask", "the lane is not in its own mask", Run<NotInMask>},
    {"MasksDiffer", "lanes of the mask wait in another operation|returned while lanes of its warp wait", Run<MasksDiffer>},
    {"OperationsDiffer", "lanes of the mask wait in another operation", Run<OperationsDiffer>},
    {"LanesReturned", "lanes that have returned|returned while lanes of its warp wait", Run<LanesReturned>},
    {"ArrivesAfterReturn", "the mask names lanes that have returned", Run<ArrivesAfterReturn, 1, 32>},
    {"TwoSyncWarps", "lanes of the mask wait in another operation", Run<TwoSyncWarps>},
    {"ShuffleFromOutside", "which is not in the mask", Run<ShuffleFromOutside>},
    {"LanesThatAreNot", "lanes that the block does not have", Run<LanesThatAreNot, 1, 48>},
    {"WarpAndBarrier", "deadlock", Run<WarpAndBarrier>},
    {"Traps", "__trap", Run<Traps>},
    {"SpinsForever", "spins", Run<SpinsForever>},
};
const int kNumBugs = sizeof(kBugs) / sizeof(kBugs[0]);

}  // namespace bebop::emulation_tests
