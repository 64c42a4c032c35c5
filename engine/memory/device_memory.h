// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/common/stream.h"

namespace bebop {

// Where weights, caches and activations live: host memory for the CPU backend, device memory for CUDA. Code above kernels/ holds plain pointers
// and asks this class for everything that differs. One thread at a time, whichever it is: the device's memory makes its device the thread's
// current one by itself. What it allocated may be freed by any thread, and may outlive it.
//
// Copies are in order with the operators that were enqueued before and after them. CopyIn and CopyOut return when the host side may be
// reused or read; Copy does not wait.
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;

  virtual bool is_host() const = 0;
  // Zeroed memory, 256-byte aligned, freed with the last reference. RESOURCE_EXHAUSTED names `what`, the bytes and what is free.
  virtual absl::StatusOr<std::shared_ptr<void>> Allocate(int64_t bytes, std::string_view what) = 0;
  virtual void CopyIn(void* destination, const void* host_source, int64_t bytes) = 0;
  virtual void CopyOut(void* host_destination, const void* source, int64_t bytes) = 0;
  virtual void Copy(void* destination, const void* source, int64_t bytes) = 0;
  // Bytes that can still be allocated.
  virtual int64_t available_bytes() const = 0;
  // The first error of the device, INTERNAL; a failed device stays failed.
  virtual absl::Status status() const = 0;
};

// Host memory: huge pages where the system has them, backed page by page at first use.
std::unique_ptr<DeviceMemory> MakeHostMemory();
// Memory of the stream's device; `stream` must outlive it. Only in builds with CUDA (engine/memory/cuda_memory.cc).
std::unique_ptr<DeviceMemory> MakeCudaMemory(cuda::Stream* stream);
// The same with a stream that it owns: its copies are in order among themselves, and run beside whatever other streams do.
std::unique_ptr<DeviceMemory> MakeCudaMemory(std::unique_ptr<cuda::Stream> stream);

}  // namespace bebop
