// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "violation.h"

namespace bebop::emulation {

uintptr_t arena_begin = 0;
uint32_t* page_owner;
Allocation* allocations;

namespace {

constexpr size_t kPoisonBytes = 16u << 20;
constexpr uint32_t kMaxAllocations = 1u << 20;
constexpr size_t kDefaultDeviceBytes = size_t{16} << 30;

std::mutex mutex;  // of changes to all of this
uint32_t num_allocations = 0;
uintptr_t next_page = 0;  // offset in the arena
int poison_file = -1;
size_t device_bytes = 0;
size_t device_used = 0;

void* Reserve(size_t bytes, int protection) {
  void* memory = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) Fatal("cannot reserve addresses for the emulated device");
  return memory;
}

void Initialize() {
  if (arena_begin != 0) return;
  page_owner = static_cast<uint32_t*>(Reserve(kArenaBytes / kArenaPageBytes * sizeof(uint32_t), PROT_READ | PROT_WRITE));
  allocations = static_cast<Allocation*>(Reserve(kMaxAllocations * sizeof(Allocation), PROT_READ | PROT_WRITE));
  poison_file = memfd_create("bebop_poison", 0);
  if (poison_file < 0 || ftruncate(poison_file, kPoisonBytes) != 0) Fatal("cannot make the pattern of fresh device memory");
  void* poison = mmap(nullptr, kPoisonBytes, PROT_READ | PROT_WRITE, MAP_SHARED, poison_file, 0);
  if (poison == MAP_FAILED) Fatal("cannot map the pattern of fresh device memory");
  std::memset(poison, 0xff, kPoisonBytes);
  munmap(poison, kPoisonBytes);
  if (device_bytes == 0) {
    const char* text = std::getenv("BEBOP_EMULATION_MEMORY");
    device_bytes = text != nullptr ? std::strtoull(text, nullptr, 10) : kDefaultDeviceBytes;
  }
  arena_begin = reinterpret_cast<uintptr_t>(Reserve(kArenaBytes, PROT_NONE));
}

}  // namespace

void* AllocateMemory(size_t bytes, MemoryKind kind) {
  std::lock_guard lock(mutex);
  Initialize();
  if (kind == MemoryKind::kDevice && (bytes > device_bytes || device_used > device_bytes - bytes)) return nullptr;
  // Not at the start of a page: a kernel may count on 256 bytes of alignment, not on more.
  const uintptr_t offset = 256 * (1 + num_allocations % 3);
  const uintptr_t pages = (offset + bytes + kArenaPageBytes - 1) / kArenaPageBytes;
  if (num_allocations == kMaxAllocations || (pages + 1) * kArenaPageBytes > kArenaBytes - next_page)
    Fatal("out of addresses: too many allocations");
  const uintptr_t start = arena_begin + next_page;
  for (uintptr_t done = 0; done < pages * kArenaPageBytes; done += kPoisonBytes) {
    const size_t part = std::min<size_t>(kPoisonBytes, pages * kArenaPageBytes - done);
    void* const place = reinterpret_cast<void*>(start + done);
    // Copies of the pattern are made when a page is first written, so that large buffers of which little is used cost little.
    void* const mapped = kind == MemoryKind::kDevice
                             ? mmap(place, part, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, poison_file, 0)
                             : mmap(place, part, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (mapped == MAP_FAILED) Fatal("cannot map memory of the emulated device");
  }
  allocations[num_allocations] = {.begin = start + offset, .end = start + offset + bytes, .kind = kind, .freed = false};
  ++num_allocations;
  std::fill_n(page_owner + next_page / kArenaPageBytes, pages, num_allocations);
  next_page += (pages + 1) * kArenaPageBytes;
  if (kind == MemoryKind::kDevice) device_used += bytes;
  return reinterpret_cast<void*>(start + offset);
}

bool ReleaseMemory(void* pointer, MemoryKind kind) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const Allocation* const found = FindAllocation(address);
  std::lock_guard lock(mutex);
  if (found == nullptr || found->freed || found->begin != address || found->kind != kind) return false;
  Allocation& allocation = allocations[found - allocations];
  allocation.freed = true;
  const uintptr_t start = allocation.begin & ~(kArenaPageBytes - 1);
  const size_t bytes = ((allocation.end - start) + kArenaPageBytes - 1) & ~(kArenaPageBytes - 1);
  if (mmap(reinterpret_cast<void*>(start), bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) ==
      MAP_FAILED) {
    Fatal("cannot unmap memory of the emulated device");
  }
  if (kind == MemoryKind::kDevice) device_used -= allocation.end - allocation.begin;
  return true;
}

void SetDeviceMemoryBytes(size_t bytes) {
  std::lock_guard lock(mutex);
  Initialize();
  device_bytes = bytes;
}
size_t DeviceMemoryBytes() {
  std::lock_guard lock(mutex);
  Initialize();
  return device_bytes;
}
size_t DeviceMemoryUsed() {
  std::lock_guard lock(mutex);
  return device_used;
}

}  // namespace bebop::emulation
