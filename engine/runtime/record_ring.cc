// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/record_ring.h"

#include <atomic>
#include <chrono>
#include <thread>

#include "absl/strings/str_cat.h"
#include "engine/base/logging.h"
#include "engine/base/status_macros.h"
#include "engine/runtime/pinned_memory.h"
#include "kernels/common/check.h"

namespace bebop {
namespace {

using std::chrono::steady_clock;

// Most waits are long: the device has a whole iteration to do, and another one is queued behind it, so that sleeping a little too
// long costs nothing. Only the last stretch of short iterations is worth a spinning core.
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr auto kNap = std::chrono::microseconds(20);
// Between questions whether the device is well; each takes a lock of the driver.
constexpr auto kQueryInterval = std::chrono::milliseconds(1);
// A step this long is worth a line in the log. It may be honest (a debugger, another process on the device), so waiting goes on.
constexpr auto kLongWait = std::chrono::seconds(30);

}  // namespace

absl::StatusOr<std::unique_ptr<RecordRing>> RecordRing::Create(int32_t max_sequences, DeviceMemory* memory,
                                                               cuda::Stream* stream) {
  std::unique_ptr<RecordRing> ring(new RecordRing(stream));
  ring->max_sequences_ = max_sequences;
  const int64_t records_bytes = static_cast<int64_t>(kEntries) * max_sequences * static_cast<int64_t>(sizeof(StepRecord));
  BEBOP_ASSIGN_OR_RETURN(ring->pinned_,
                         AllocatePinned(records_bytes + static_cast<int64_t>(sizeof(uint64_t)), "step records", stream));
  ring->records_ = reinterpret_cast<StepRecord*>(ring->pinned_.get());
  ring->host_number_ = reinterpret_cast<uint64_t*>(ring->pinned_.get() + records_bytes);
  BEBOP_ASSIGN_OR_RETURN(ring->device_number_, memory->Allocate(sizeof(uint64_t), "step counter"));
  return ring;
}

uint64_t RecordRing::Publish(const SlotArrays& slots, const PassArrays& pass) {
  BEBOP_CHECK(pass.num_sequences <= max_sequences_);
  const uint64_t number = ++published_;
  num_records_[number % kEntries] = pass.num_sequences;
  cuda::PublishRecords(slots, pass, records_ + (number % kEntries) * max_sequences_, static_cast<uint64_t*>(device_number_.get()),
                       host_number_, stream_);
  return number;
}

// Acquire: whoever sees the number sees the records that the device stored before it.
bool RecordRing::Arrived(uint64_t number) const {
  return std::atomic_ref<uint64_t>(*host_number_).load(std::memory_order_acquire) >= number;
}

absl::Status RecordRing::Wait(uint64_t number) {
  BEBOP_CHECK(number <= published_);
  if (Arrived(number)) return absl::OkStatus();
  const auto began = steady_clock::now();
  auto asked = began;
  bool logged = false;
  while (stream_.ok()) {
    if (Arrived(number)) return absl::OkStatus();
    const auto now = steady_clock::now();
    if (now - began > kSpin) std::this_thread::sleep_for(kNap);
    if (now - asked < kQueryInterval) continue;
    asked = now;
    const cudaError_t result = cudaStreamQuery(stream_.handle());
    if (result == cudaSuccess) {
      // The stream ran dry, so the number is here or never will be.
      if (Arrived(number)) return absl::OkStatus();
      stream_.Fail(absl::StrCat("the device has done all its work and not published pass ", number));
    } else if (result != cudaErrorNotReady) {
      stream_.Note(result, "cudaStreamQuery", __FILE__, __LINE__);
    } else if (!logged && now - began > kLongWait) {
      Log(LogLevel::kWarning, absl::StrCat("a step has been running for ",
                                           std::chrono::duration_cast<std::chrono::seconds>(kLongWait).count(), " s"));
      logged = true;
    }
  }
  return absl::InternalError(absl::StrCat("device error: ", stream_.error()));
}

}  // namespace bebop
