// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <string>

// Runs kernels: blocks one after another, in random order, the threads of a block as fibers that switch where they wait for each
// other.
namespace bebop::emulation {

class KernelCall;

inline constexpr int kMaxThreads = 1024;  // a block's
inline constexpr int kWarpLanes = 32;
inline constexpr size_t kMaxSharedBytes = 227 * 1024;  // a block's, with opting in
inline constexpr size_t kMaxStaticSharedBytes = 48 * 1024;

// Runs one launch to its end on the calling thread, which must be the device's. `shared_limit`: what static and dynamic shared
// memory may sum up to.
void RunKernel(const KernelCall& call, dim3 grid, dim3 block, size_t shared_bytes, size_t shared_limit);

// Also in cuda_emulation_control.h.
void SetSeed(uint64_t seed);
uint64_t Seed();
void SetSpinLimit(double seconds);

// "kernel ..., block ..., thread ..." of what runs on the calling thread; empty outside kernels.
std::string CurrentThread();
std::string ThreadName(int thread);

// For the checks (checks.cc).
struct Running {
  uintptr_t stacks_begin = 0;  // of all fibers
  uintptr_t stacks_bytes = 0;
  uintptr_t shared_begin = 0;  // dynamic shared memory
  uintptr_t shared_bytes = 0;
  uintptr_t shared_limit = 0;  // what static and dynamic shared memory may sum up to
  int thread = 0;              // index in the block
};
extern Running running;
extern constinit thread_local bool in_kernel;  // this OS thread runs threads of a kernel now

}  // namespace bebop::emulation
