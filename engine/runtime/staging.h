// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/memory/device_memory.h"
#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/scatter/scatter.h"

namespace bebop {

// What the host tells the device in a step: arrays that the step's kernels read, and small writes into longer-lived device
// memory. All of it goes over in one copy from pinned memory, and one launch does the small writes. Two buffers take turns, so
// that the host fills one while the copy out of the other may still be waiting behind a step that runs; the device's side needs
// but one, because copies and kernels are in the order of the stream.
//
//   BEBOP_RETURN_IF_ERROR(staging.Begin());
//   int32_t* rows = staging.Add<int32_t>(n, &device_rows);  ... fill rows ...
//   staging.Write(slot_on_device, &slot, sizeof(slot));
//   staging.Upload();                      // kernels enqueued from here on see both
//   staging.CopyNow(buffer, values, n);    // any number of further copies, each in its place in the stream
//   staging.End();
//
// Allocates at creation only. Not thread safe: the engine thread.
class Staging {
 public:
  // `bytes`: most that a step adds and writes; `max_writes`: most calls of Write in a step.
  static absl::StatusOr<std::unique_ptr<Staging>> Create(int64_t bytes, int32_t max_writes, DeviceMemory* memory,
                                                         cuda::Stream* stream);
  // Device and, twice, pinned host bytes that Create takes.
  static int64_t Bytes(int64_t bytes, int32_t max_writes);
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  // Starts a step. Waits until the copies of the step before the last have left this buffer, which in practice they have.
  void Begin();
  // `count` values to be filled in by the caller before Upload. *device: where they will be.
  template <typename T>
  T* Add(int64_t count, T** device) {
    const int64_t offset = Take(count * static_cast<int64_t>(sizeof(T)));
    *device = reinterpret_cast<T*>(device_.get() == nullptr ? nullptr : static_cast<char*>(device_.get()) + offset);
    return reinterpret_cast<T*>(host_[current_].get() + offset);
  }
  // `bytes` (a multiple of 4) of `source`, taken now, to device memory at `destination`. One step's destinations do not overlap.
  void Write(void* destination, const void* source, int64_t bytes);
  void Upload();
  // After Upload: copies `bytes` of `source`, taken now, to `destination` at this point of the stream.
  void CopyNow(void* destination, const void* source, int64_t bytes);
  void End();

 private:
  static constexpr int64_t kAlignment = 16;

  explicit Staging(cuda::Stream* stream) : stream_(*stream) {}
  int64_t Take(int64_t bytes);

  cuda::Stream& stream_;
  int64_t bytes_ = 0;          // of a buffer
  int64_t writes_offset_ = 0;  // the writes' list, behind what is added
  int32_t max_writes_ = 0;
  std::shared_ptr<char> host_[2];
  cudaEvent_t copied_[2] = {};  // recorded when a step's copies were enqueued
  bool recorded_[2] = {};
  std::shared_ptr<void> device_;
  int current_ = 0;
  int64_t used_ = 0;
  int32_t num_writes_ = 0;
  bool used_copies_ = false;  // this step enqueued a copy
};

}  // namespace bebop
