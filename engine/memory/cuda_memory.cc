// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <string>
#include <utility>

#include "engine/formats/strings.h"
#include "engine/memory/device_memory.h"
#include "kernels/common/cuda_stream.h"

namespace bebop {
namespace {

// The current device belongs to the thread, and any thread may be the one that loads weights or drops the last reference. Setting what
// is set already costs nothing.
class CudaMemory final : public DeviceMemory {
 public:
  explicit CudaMemory(cuda::Stream* stream) : stream_(*stream) {}
  explicit CudaMemory(std::unique_ptr<cuda::Stream> stream) : own_stream_(std::move(stream)), stream_(*own_stream_) {}

  bool is_host() const override { return false; }

  absl::StatusOr<std::shared_ptr<void>> Allocate(int64_t bytes, std::string_view what) override {
    if (!stream_.ok()) return status();
    Enter();
    void* memory = nullptr;
    const size_t size = static_cast<size_t>(std::max<int64_t>(bytes, 1));
    const cudaError_t result = cudaMalloc(&memory, size);
    if (result == cudaErrorMemoryAllocation) {
      (void)cudaGetLastError();  // not sticky: the context is as good as before
      return absl::ResourceExhaustedError(StrCat(what, ": expected ", bytes, " bytes of device memory, ", available_bytes(), " are free"));
    }
    stream_.Note(result, "cudaMalloc", __FILE__, __LINE__);
    BEBOP_CUDA_TRY(stream_, cudaMemsetAsync(memory, 0, size, stream_.handle()));
    const int device = stream_.device();
    std::shared_ptr<void> owner(memory, [device](void* address) {
      // Errors of tear-down have nobody to go to. cudaFree waits for the device.
      (void)cudaSetDevice(device);
      (void)cudaFree(address);
    });
    if (!stream_.ok()) return status();
    return owner;
  }

  void CopyIn(void* destination, const void* host_source, int64_t bytes) override {
    CopyAndWait(destination, host_source, bytes, cudaMemcpyHostToDevice);
  }
  void CopyOut(void* host_destination, const void* source, int64_t bytes) override {
    CopyAndWait(host_destination, source, bytes, cudaMemcpyDeviceToHost);
  }
  void Copy(void* destination, const void* source, int64_t bytes) override {
    if (bytes == 0) return;
    Enter();
    BEBOP_CUDA_TRY(stream_, cudaMemcpyAsync(destination, source, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream_.handle()));
  }

  int64_t available_bytes() const override {
    size_t free_bytes = 0, total_bytes = 0;
    (void)cudaSetDevice(stream_.device());
    if (cudaMemGetInfo(&free_bytes, &total_bytes) != cudaSuccess) return 0;
    return static_cast<int64_t>(free_bytes);
  }

  absl::Status status() const override { return stream_.ok() ? absl::OkStatus() : absl::InternalError(StrCat("device error: ", stream_.error())); }

 private:
  void Enter() { BEBOP_CUDA_TRY(stream_, cudaSetDevice(stream_.device())); }

  // cudaMemcpyAsync alone may still be reading pinned host memory when it returns.
  void CopyAndWait(void* destination, const void* source, int64_t bytes, cudaMemcpyKind kind) {
    if (bytes == 0) return;
    Enter();
    BEBOP_CUDA_TRY(stream_, cudaMemcpyAsync(destination, source, static_cast<size_t>(bytes), kind, stream_.handle()));
    BEBOP_CUDA_TRY(stream_, cudaStreamSynchronize(stream_.handle()));
  }

  const std::unique_ptr<cuda::Stream> own_stream_;  // null: somebody else's
  cuda::Stream& stream_;
};

}  // namespace

std::unique_ptr<DeviceMemory> MakeCudaMemory(cuda::Stream* stream) { return std::make_unique<CudaMemory>(stream); }

std::unique_ptr<DeviceMemory> MakeCudaMemory(std::unique_ptr<cuda::Stream> stream) { return std::make_unique<CudaMemory>(std::move(stream)); }

}  // namespace bebop
