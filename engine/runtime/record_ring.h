// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/memory/device_memory.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/decode/decode.h"

namespace bebop {

// How the results of passes come to the host: the device writes the records of each pass into pinned memory, and then a number
// that counts passes. The host looks at the number; it never waits for the stream as a whole, whose last pass it has just
// enqueued. Not thread safe: the engine thread.
class RecordRing {
 public:
  // Entries in flight at most: the iteration that ran ahead, then a step's prefill pass, catching-up iteration and iteration
  // ahead.
  static constexpr uint64_t kEntries = 4;

  // Room for passes of up to `max_sequences`.
  static absl::StatusOr<std::unique_ptr<RecordRing>> Create(int32_t max_sequences, DeviceMemory* memory, cuda::Stream* stream);

  // Enqueues the publication of a pass's records; returns its number, 1 for the first. REQUIRES: the host is done with the
  // records of number - kEntries.
  uint64_t Publish(const SlotArrays& slots, const PassArrays& pass);
  uint64_t last_published() const { return published_; }
  // Waits for a publication. INTERNAL when the device fails meanwhile.
  absl::Status Wait(uint64_t number);
  // The records of a pass that has arrived; as many as its sequences, until kEntries later ones were published.
  const StepRecord* Records(uint64_t number) const { return records_ + (number % kEntries) * max_sequences_; }
  int32_t num_records(uint64_t number) const { return num_records_[number % kEntries]; }

 private:
  explicit RecordRing(cuda::Stream* stream) : stream_(*stream) {}
  bool Arrived(uint64_t number) const;

  cuda::Stream& stream_;
  int64_t max_sequences_ = 0;
  std::shared_ptr<char> pinned_;
  StepRecord* records_ = nullptr;        // pinned: [kEntries, max_sequences]
  uint64_t* host_number_ = nullptr;      // pinned: of the latest pass that has arrived
  std::shared_ptr<void> device_number_;  // the device's own counter
  int32_t num_records_[kEntries] = {};
  uint64_t published_ = 0;
};

}  // namespace bebop
