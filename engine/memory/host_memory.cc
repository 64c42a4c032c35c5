// SPDX-License-Identifier: Apache-2.0
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>

#include "absl/strings/numbers.h"
#include "engine/formats/strings.h"
#include "engine/memory/device_memory.h"

namespace bebop {
namespace {

constexpr int64_t kUnknown = std::numeric_limits<int64_t>::max();

int64_t ReadBytes(const char* path) {
  std::ifstream file(path);
  std::string text;
  int64_t value = 0;
  if (!std::getline(file, text) || !absl::SimpleAtoi(text, &value)) return kUnknown;
  return value;
}

class HostMemory final : public DeviceMemory {
 public:
  bool is_host() const override { return true; }

  absl::StatusOr<std::shared_ptr<void>> Allocate(int64_t bytes, std::string_view what) override {
    // Memory is overcommitted: without this check the process would be killed while it fills the pages, not told now.
    const int64_t physical_bytes = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE);
    const size_t size = static_cast<size_t>(std::max<int64_t>(bytes, 1));
    // Anonymous memory comes zeroed and is backed page by page at first use, so what stays unused costs address space only.
    void* const memory = bytes > physical_bytes ? MAP_FAILED : mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      return absl::ResourceExhaustedError(
          StrCat(what, ": expected ", bytes, " bytes of memory, the machine has ", physical_bytes, ", of which ", available_bytes(), " are free"));
    }
    // Streaming gigabytes through 4 KiB pages costs a TLB miss a page. A hint: without huge pages all still works.
    madvise(memory, size, MADV_HUGEPAGE);
    return std::shared_ptr<void>(memory, [size](void* address) { munmap(address, size); });
  }

  void CopyIn(void* destination, const void* host_source, int64_t bytes) override { Copy(destination, host_source, bytes); }
  void CopyOut(void* host_destination, const void* source, int64_t bytes) override { Copy(host_destination, source, bytes); }
  void Copy(void* destination, const void* source, int64_t bytes) override {
    if (bytes > 0) std::memcpy(destination, source, static_cast<size_t>(bytes));
  }

  // MemAvailable of this machine, or what the cgroup's limit leaves if that is less.
  int64_t available_bytes() const override {
    int64_t available = kUnknown;
    std::ifstream meminfo("/proc/meminfo");
    for (std::string key; meminfo >> key;) {
      int64_t kib = 0;
      if (key == "MemAvailable:" && meminfo >> kib) available = kib * 1024;
    }
    const int64_t limit = ReadBytes("/sys/fs/cgroup/memory.max");
    if (limit == kUnknown) return available;
    const int64_t used = ReadBytes("/sys/fs/cgroup/memory.current");
    return std::min(available, std::max<int64_t>(0, limit - (used == kUnknown ? 0 : used)));
  }

  absl::Status status() const override { return absl::OkStatus(); }
};

}  // namespace

std::unique_ptr<DeviceMemory> MakeHostMemory() { return std::make_unique<HostMemory>(); }

}  // namespace bebop
