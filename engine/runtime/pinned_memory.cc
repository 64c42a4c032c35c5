// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/pinned_memory.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace bebop {

absl::StatusOr<std::shared_ptr<char>> AllocatePinned(int64_t bytes, const char* what, cuda::Stream* stream) {
  if (!stream->ok()) return absl::InternalError(absl::StrCat("device error: ", stream->error()));
  void* memory = nullptr;
  const size_t size = static_cast<size_t>(std::max<int64_t>(bytes, 1));
  const cudaError_t result = cudaHostAlloc(&memory, size, cudaHostAllocMapped | cudaHostAllocPortable);
  if (result == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();  // not sticky
    return absl::ResourceExhaustedError(
        absl::StrCat(what, ": expected ", bytes, " bytes of pinned host memory, which cannot be had"));
  }
  stream->Note(result, "cudaHostAlloc", __FILE__, __LINE__);
  if (!stream->ok()) return absl::InternalError(absl::StrCat("device error: ", stream->error()));
  std::memset(memory, 0, size);
  // Errors of tear-down have nobody to go to.
  return std::shared_ptr<char>(static_cast<char*>(memory), [](char* address) { (void)cudaFreeHost(address); });
}

}  // namespace bebop
