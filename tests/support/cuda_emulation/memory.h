// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

// Memory of the emulated device and pinned host memory: both come from one reserved range of addresses, so that any address is
// looked up in a table. Each allocation has pages of its own with an unmapped page after them; addresses are never used twice, so
// that a pointer to freed memory stays wrong. Fresh device memory reads as NaN in float32 and bfloat16 and as -1 in integers.
namespace bebop::emulation {

enum class MemoryKind : uint8_t { kDevice, kPinned };

struct Allocation {
  uintptr_t begin = 0;
  uintptr_t end = 0;
  MemoryKind kind = MemoryKind::kDevice;
  bool freed = false;
};

// The range that everything is allocated from; constant after the first allocation.
extern uintptr_t arena_begin;
inline constexpr uintptr_t kArenaBytes = uintptr_t{1} << 38;

// Null when the device is full (device memory alone is counted).
void* AllocateMemory(size_t bytes, MemoryKind kind);
// False when `pointer` is not the start of a living allocation of this kind.
bool ReleaseMemory(void* pointer, MemoryKind kind);
// For FindAllocation: index into the allocations plus one, of each page of the arena.
inline constexpr uintptr_t kArenaPageBytes = 4096;
extern uint32_t* page_owner;
extern Allocation* allocations;

// The allocation, living or freed, whose pages hold the address; null where there is none. Takes no lock: an entry is complete
// before its address is known to anyone.
inline const Allocation* FindAllocation(uintptr_t address) {
  if (arena_begin == 0 || address - arena_begin >= kArenaBytes) return nullptr;
  const uint32_t owner = page_owner[(address - arena_begin) / kArenaPageBytes];
  return owner == 0 ? nullptr : &allocations[owner - 1];
}

void SetDeviceMemoryBytes(size_t bytes);
size_t DeviceMemoryBytes();
size_t DeviceMemoryUsed();

}  // namespace bebop::emulation
