// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string_view>
#include <utility>

#include "engine/formats/strings.h"
#include "engine/memory/device_memory.h"
#include "kernels/common/check.h"

namespace bebop::test {

// Claims to be a device and is host memory: for the code that fills device memory, in builds without one. Counts what a device would see.
class FakeDeviceMemory final : public DeviceMemory {
 public:
  bool is_host() const override { return false; }
  absl::StatusOr<std::shared_ptr<void>> Allocate(int64_t bytes, std::string_view what) override {
    if (bytes > available_bytes()) return absl::ResourceExhaustedError(StrCat(what, ": expected ", bytes, " bytes"));
    const size_t size = static_cast<size_t>((bytes + 255) / 256 * 256);
    void* const memory = std::aligned_alloc(256, std::max<size_t>(size, 256));
    BEBOP_CHECK(memory != nullptr);
    std::memset(memory, 0, size);
    return std::shared_ptr<void>(memory, [](void* address) { std::free(address); });
  }
  void CopyIn(void* destination, const void* host_source, int64_t bytes) override { Count(destination, host_source, bytes); }
  void CopyOut(void* host_destination, const void* source, int64_t bytes) override { Count(host_destination, source, bytes); }
  void Copy(void* destination, const void* source, int64_t bytes) override { Count(destination, source, bytes); }
  int64_t available_bytes() const override { return int64_t{1} << 30; }
  absl::Status status() const override { return status_; }

  void Fail(absl::Status status) { status_ = std::move(status); }
  int64_t num_copies() const { return num_copies_; }
  int64_t largest_copy() const { return largest_copy_; }

 private:
  void Count(void* destination, const void* source, int64_t bytes) {
    BEBOP_CHECK(num_under_way_.fetch_add(1) == 0);  // one thread at a time
    std::memcpy(destination, source, static_cast<size_t>(bytes));
    ++num_copies_;
    largest_copy_ = std::max(largest_copy_, bytes);
    num_under_way_.fetch_sub(1);
  }

  std::atomic<int> num_under_way_{0};
  int64_t num_copies_ = 0, largest_copy_ = 0;
  absl::Status status_;
};

}  // namespace bebop::test
