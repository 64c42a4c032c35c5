// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/staging.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "engine/base/status_macros.h"
#include "engine/runtime/pinned_memory.h"

namespace bebop {
namespace {

int64_t Aligned(int64_t bytes, int64_t alignment) { return (bytes + alignment - 1) / alignment * alignment; }

}  // namespace

// Each addition may lose up to kAlignment bytes; there are few arrays a step beside the writes, which have no more than that
// each.
int64_t Staging::Bytes(int64_t bytes, int32_t max_writes) {
  return Aligned(bytes, kAlignment) + 64 * kAlignment +
         int64_t{max_writes} * (kAlignment + static_cast<int64_t>(sizeof(ScatterWrite)));
}

absl::StatusOr<std::unique_ptr<Staging>> Staging::Create(int64_t bytes, int32_t max_writes, DeviceMemory* memory,
                                                         cuda::Stream* stream) {
  std::unique_ptr<Staging> staging(new Staging(stream));
  staging->bytes_ = Bytes(bytes, max_writes);
  staging->max_writes_ = max_writes;
  staging->writes_offset_ = staging->bytes_ - int64_t{max_writes} * static_cast<int64_t>(sizeof(ScatterWrite));
  BEBOP_ASSIGN_OR_RETURN(staging->device_, memory->Allocate(staging->bytes_, "step arrays"));
  for (int i = 0; i < 2; ++i) {
    BEBOP_ASSIGN_OR_RETURN(staging->host_[i], AllocatePinned(staging->bytes_, "step arrays", stream));
    BEBOP_CUDA_TRY(*stream, cudaEventCreateWithFlags(&staging->copied_[i], cudaEventDisableTiming));
  }
  BEBOP_RETURN_IF_ERROR(memory->status());
  return staging;
}

Staging::~Staging() {
  for (cudaEvent_t event : copied_) {
    if (event != nullptr) (void)cudaEventDestroy(event);
  }
}

void Staging::Begin() {
  current_ = 1 - current_;
  used_ = 0;
  num_writes_ = 0;
  used_copies_ = false;
  if (!recorded_[current_]) return;
  recorded_[current_] = false;
  while (stream_.ok()) {
    const cudaError_t result = cudaEventQuery(copied_[current_]);
    if (result == cudaSuccess) return;
    if (result != cudaErrorNotReady) stream_.Note(result, "cudaEventQuery", __FILE__, __LINE__);
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

int64_t Staging::Take(int64_t bytes) {
  const int64_t offset = used_;
  used_ += Aligned(bytes, kAlignment);
  BEBOP_CHECK(used_ <= writes_offset_);
  return offset;
}

void Staging::Write(void* destination, const void* source, int64_t bytes) {
  BEBOP_CHECK(bytes % 4 == 0 && num_writes_ < max_writes_);
  if (bytes == 0) return;
  const int64_t offset = Take(bytes);
  std::memcpy(host_[current_].get() + offset, source, static_cast<size_t>(bytes));
  reinterpret_cast<ScatterWrite*>(host_[current_].get() + writes_offset_)[num_writes_++] = {
      .destination = destination, .source = static_cast<int32_t>(offset / 4), .num_words = static_cast<int32_t>(bytes / 4)};
}

void Staging::Upload() {
  if (used_ == 0) return;
  // The list of writes moves up behind what was added, so that all goes in one copy.
  ScatterWrite* device_writes = nullptr;
  const int64_t bytes = int64_t{num_writes_} * static_cast<int64_t>(sizeof(ScatterWrite));
  if (num_writes_ > 0) {
    char* const list = host_[current_].get() + writes_offset_;
    std::memmove(host_[current_].get() + used_, list, static_cast<size_t>(bytes));
    device_writes = reinterpret_cast<ScatterWrite*>(static_cast<char*>(device_.get()) + used_);
    used_ += Aligned(bytes, kAlignment);
  }
  used_copies_ = true;
  BEBOP_CUDA_TRY(stream_, cudaMemcpyAsync(device_.get(), host_[current_].get(), static_cast<size_t>(used_),
                                          cudaMemcpyHostToDevice, stream_.handle()));
  cuda::Scatter({.num_writes = num_writes_, .writes = device_writes, .words = static_cast<const uint32_t*>(device_.get())},
                stream_);
}

void Staging::CopyNow(void* destination, const void* source, int64_t bytes) {
  const int64_t offset = used_;
  used_ += Aligned(bytes, kAlignment);
  BEBOP_CHECK(used_ <= bytes_);
  char* const host = host_[current_].get() + offset;
  std::memcpy(host, source, static_cast<size_t>(bytes));
  used_copies_ = true;
  BEBOP_CUDA_TRY(stream_,
                 cudaMemcpyAsync(destination, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream_.handle()));
}

void Staging::End() {
  if (!used_copies_) return;
  BEBOP_CUDA_TRY(stream_, cudaEventRecord(copied_[current_], stream_.handle()));
  recorded_[current_] = true;
}

}  // namespace bebop
