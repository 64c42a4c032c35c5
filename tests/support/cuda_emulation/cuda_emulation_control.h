// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

// What tests may ask of the emulated device beyond CUDA's own calls.
namespace bebop::emulation {

// Since the process began. A step that "neither allocates nor synchronises" leaves allocations and synchronizations as they were.
struct Counters {
  int64_t launches = 0;  // of kernels, also those inside graphs
  int64_t graph_launches = 0;
  int64_t operations = 0;   // of streams that have run: launches, copies, fills, events, matrix products
  int64_t allocations = 0;  // device and pinned, whether they succeeded or not
  int64_t frees = 0;
  int64_t synchronizations = 0;  // calls that wait for the device, implicit ones of cudaFree, cudaMemcpy and such included
};
Counters GetCounters();

// Order of blocks, threads and streams. At first BEBOP_EMULATION_SEED of the environment, else 1.
void SetSeed(uint64_t seed);
uint64_t Seed();

// How long a block may wait in __nanosleep with nobody else to run, before it is said to spin forever; at first 60 seconds.
void SetSpinLimit(double seconds);

// Size of device memory; at first BEBOP_EMULATION_MEMORY bytes of the environment, else 16 GiB. cudaMalloc fails beyond it.
void SetDeviceMemoryBytes(size_t bytes);

// 1, or 0 for a machine without a device: every call fails with cudaErrorNoDevice then.
void SetDeviceCount(int count);

// From now on every call and launch returns `error`, as after a fault on a device; the work in queues is dropped. cudaSuccess
// heals the device, which no real one does.
void InjectStickyError(cudaError_t error);
// The same, after `operations` more operations have run.
void InjectStickyErrorAfter(int64_t operations, cudaError_t error);

}  // namespace bebop::emulation
