// SPDX-License-Identifier: Apache-2.0
#include "checks.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>

#include "block.h"
#include "cuda_emulation_device.h"
#include "memory.h"
#include "violation.h"

// The checks of every access that a kernel makes. Kernel files are compiled with -fsanitize=thread, which calls
// __tsan_read4(address) and the like before each access to memory that others might see; the definitions at the end of this file
// take ThreadSanitizer's place.
//
// Time: `epoch` counts barriers, blocks and launches, so that one number tells whether an access was in this launch, in this
// block, and since the last barrier. Within an epoch only __syncwarp orders threads: each lane has a vector clock of its warp. An
// access leaves a stamp (epoch, clock, thread, bytes) with the word it touched; two accesses to the same bytes that no epoch and
// no clock orders, one of them a write, are a race, whatever order they happened to run in.

namespace bebop::emulation {
namespace {

// ---- Stamps ----

using Stamp = uint64_t;  // epoch : 24, clock : 25, thread : 10, atomic : 1, bytes of the word : 4; 0 is no access
constexpr uint32_t kMaxEpoch = (1u << 24) - 1;
constexpr uint32_t kMaxClock = (1u << 25) - 1;

constexpr uint32_t EpochOf(Stamp stamp) { return static_cast<uint32_t>(stamp >> 40); }
constexpr uint32_t ClockOf(Stamp stamp) { return static_cast<uint32_t>(stamp >> 15) & kMaxClock; }
constexpr int ThreadOf(Stamp stamp) { return static_cast<int>(stamp >> 5) & 1023; }
constexpr bool AtomicOf(Stamp stamp) { return (stamp >> 4 & 1u) != 0; }
constexpr uint32_t BytesOf(Stamp stamp) { return static_cast<uint32_t>(stamp) & 15u; }
constexpr Stamp kWhoMask = ~Stamp{15};  // all but the bytes

// One word (4 bytes) of shared memory.
struct Cell {
  Stamp write;
  Stamp reads[2];        // the latest of different threads
  uint32_t initialized;  // the epoch its block began with, and the bytes written since: epoch << 4 | bytes
  uint32_t pending;      // the epoch of a block in which an asynchronous copy into it is under way; 0 for none
};
static_assert(sizeof(Cell) == 32);

struct Clocks {
  uint32_t of[kWarpLanes][kWarpLanes];  // of[lane][other]: what `lane` knows of `other`; of[lane][lane] is its own time
};

struct Checks {
  uint32_t epoch = 1;
  uint32_t launch_epoch = 1;  // the launch's first
  uint32_t block_epoch = 1;   // the block's first
  bool acquired = false;      // the block has done an atomic on global memory: it may know what other blocks did
  bool clocks_used = true;
  std::array<Clocks, kMaxThreads / kWarpLanes> clocks;
  Cell* dynamic_cells = nullptr;
  // Static shared memory: the executable's thread-local variables on the device's thread.
  uintptr_t static_begin = 0;
  uintptr_t static_bytes = 0;
  Cell* static_cells = nullptr;
  size_t static_used = 0;  // bytes that the present block has written
  // The program's own code and constants.
  uintptr_t image_begin = 0;
  uintptr_t image_end = 0;
  // Global memory: who wrote a word last, and which launch wrote to a page last (its epoch).
  Stamp* global_writes = nullptr;
  uint32_t* page_writes = nullptr;
};
Checks checks;

constexpr uintptr_t kPageBytes = 4096;
constexpr size_t kGlobalShadowBytes = kArenaBytes / 4 * sizeof(Stamp);

void* Reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) Fatal("no addresses for the checks of the emulated device");
  return memory;
}

int NoteProgram(dl_phdr_info* info, size_t, void*) {
  // The program itself is the first.
  checks.image_begin = ~uintptr_t{0};
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr)& header = info->dlpi_phdr[i];
    if (header.p_type == PT_LOAD) {
      checks.image_begin = std::min<uintptr_t>(checks.image_begin, info->dlpi_addr + header.p_vaddr);
      checks.image_end = std::max<uintptr_t>(checks.image_end, info->dlpi_addr + header.p_vaddr + header.p_memsz);
    } else if (header.p_type == PT_TLS) {
      checks.static_begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
      checks.static_bytes = header.p_memsz;
    }
  }
  return 1;
}

void Initialize() {
  dl_iterate_phdr(NoteProgram, nullptr);
  if (checks.dynamic_cells != nullptr) return;
  checks.dynamic_cells = static_cast<Cell*>(Reserve((kMaxSharedBytes / 4 + 8) * sizeof(Cell)));
  checks.static_cells = static_cast<Cell*>(Reserve((checks.static_bytes / 4 + 8) * sizeof(Cell)));
  checks.global_writes = static_cast<Stamp*>(Reserve(kGlobalShadowBytes));
  checks.page_writes = static_cast<uint32_t*>(Reserve(kArenaBytes / kPageBytes * sizeof(uint32_t)));
}

void NextEpoch() {
  if (++checks.epoch > kMaxEpoch) Fatal("more blocks and barriers in one launch than the checks can count");
}

// Forgets all stamps, so that epochs can begin anew.
void ForgetAll() {
  for (const auto& [memory, bytes] : {std::pair<void*, size_t>{checks.dynamic_cells, (kMaxSharedBytes / 4 + 8) * sizeof(Cell)},
                                      {checks.static_cells, (checks.static_bytes / 4 + 8) * sizeof(Cell)},
                                      {checks.global_writes, kGlobalShadowBytes},
                                      {checks.page_writes, kArenaBytes / kPageBytes * sizeof(uint32_t)}}) {
    madvise(memory, bytes, MADV_DONTNEED);
  }
  checks.epoch = 1;
}

// The stamp of an access by the present thread, but for the bytes.
inline Stamp Who(bool atomic) {
  const uint32_t thread = static_cast<uint32_t>(running.thread);
  const uint32_t clock = checks.clocks[thread / kWarpLanes].of[thread % kWarpLanes][thread % kWarpLanes];
  return Stamp{checks.epoch} << 40 | Stamp{clock} << 15 | Stamp{thread} << 5 | Stamp{atomic} << 4;
}

// Whether the present thread may not rely on the stamped access of this block having happened before.
inline bool Unordered(Stamp stamp) {
  if (EpochOf(stamp) != checks.epoch) [[likely]]
    return false;
  const int other = ThreadOf(stamp), self = running.thread;
  if (other == self) return false;
  if (other / kWarpLanes != self / kWarpLanes) return true;
  return checks.clocks[static_cast<size_t>(self / kWarpLanes)].of[self % kWarpLanes][other % kWarpLanes] < ClockOf(stamp);
}

inline bool Conflicts(Stamp earlier, uint32_t bytes, bool atomic) {
  return (BytesOf(earlier) & bytes) != 0 && !(atomic && AtomicOf(earlier)) && Unordered(earlier);
}

[[noreturn, gnu::cold, gnu::noinline]] void Race(const char* memory, const char* present, const char* earlier, Stamp stamp,
                                                 uintptr_t address, const void* place) {
  Violation(std::string("race on ") + memory + " memory at " + Hex(address) + ": the thread " + present + " it, thread " +
                ThreadName(ThreadOf(stamp)) + " " + earlier + " it, and no barrier is between",
            place);
}

// ---- Shared memory ----

[[noreturn, gnu::cold, gnu::noinline]] void PendingCopy(uintptr_t address, const void* place) {
  Violation("an access to shared memory at " + Hex(address) + " that an asynchronous copy is still writing", place);
}
[[noreturn, gnu::cold, gnu::noinline]] void Uninitialized(uintptr_t address, const void* place) {
  Violation("reads shared memory at " + Hex(address) + " that its block has not written", place);
}

// The first write of the block to a word of shared memory.
[[gnu::noinline]] void FirstWrite(Cell& cell, const void* place, bool is_static) {
  cell.initialized = checks.block_epoch << 4;
  if (!is_static) return;
  checks.static_used += 4;
  if (checks.static_used > kMaxStaticSharedBytes || checks.static_used + running.shared_bytes > running.shared_limit) {
    Violation("the kernel's static shared memory (" + std::to_string(checks.static_used) +
                  " bytes and more) with its dynamic one (" + std::to_string(running.shared_bytes) +
                  ") exceeds what the launch may have, " + std::to_string(running.shared_limit) + " (static alone: 49152)",
              place);
  }
}

inline void AccessWord(Cell& cell, Stamp who, uint32_t bytes, Access access, uintptr_t address, const void* place,
                       bool is_static) {
  const bool atomic = AtomicOf(who);
  if (cell.pending == checks.block_epoch) PendingCopy(address, place);
  // The thread has just read it: who could have written since would have been told then.
  if (access == Access::kRead && (cell.reads[0] & kWhoMask) == who && (cell.reads[0] & bytes) == bytes) return;
  if (Conflicts(cell.write, bytes, atomic))
    Race("shared", access == Access::kRead ? "reads" : "writes", "wrote", cell.write, address, place);
  if (access != Access::kWrite && (cell.initialized >> 4 != checks.block_epoch || (cell.initialized & bytes) != bytes))
    Uninitialized(address, place);
  const Stamp now = who | bytes;
  if (access == Access::kRead) {
    for (Stamp& read : cell.reads) {
      if ((read & kWhoMask) == who) {
        read |= bytes;
        return;
      }
    }
    for (Stamp& read : cell.reads) {
      if (!Unordered(read)) {
        read = now;
        return;
      }
    }
    cell.reads[1] = now;
    return;
  }
  for (const Stamp read : cell.reads) {
    if (Conflicts(read, bytes, atomic)) Race("shared", "writes", "read", read, address, place);
  }
  if (cell.initialized >> 4 != checks.block_epoch) FirstWrite(cell, place, is_static);
  cell.initialized |= bytes;
  cell.write = (cell.write & kWhoMask) == who ? cell.write | bytes : now;
}

// Calls action(cell, bytes of its word, address) for the words of an access.
template <typename Action>
inline void ForWords(Cell* cells, uintptr_t begin, uintptr_t address, size_t bytes, Action&& action) {
  uintptr_t offset = address - begin;
  const uintptr_t end = offset + bytes;
  if (((offset | bytes) & 3) == 0) {
    for (; offset < end; offset += 4) action(cells[offset / 4], 15u, begin + offset);
    return;
  }
  while (offset < end) {
    const uintptr_t word_end = std::min<uintptr_t>(end, (offset | 3) + 1);
    const uint32_t mask = ((1u << (word_end - offset)) - 1) << (offset & 3);
    action(cells[offset / 4], mask, begin + offset);
    offset = word_end;
  }
}

bool InDynamic(uintptr_t address) { return address - running.shared_begin < kMaxSharedBytes + kPageBytes; }
bool InStatic(uintptr_t address) { return address - checks.static_begin < checks.static_bytes; }

// ---- Global memory ----

[[noreturn, gnu::cold, gnu::noinline]] void OutOfBounds(const Allocation* allocation, uintptr_t address, size_t bytes,
                                                        Access access, const void* place) {
  const std::string what =
      std::string(access == Access::kRead ? "reads " : "writes ") + std::to_string(bytes) + " bytes at " + Hex(address);
  if (allocation == nullptr) Violation(what + ", where nothing is allocated", place);
  Violation(what + ", " + (allocation->freed ? "freed memory: " : "out of bounds: ") + "offset " +
                std::to_string(static_cast<int64_t>(address - allocation->begin)) + " of an allocation of " +
                std::to_string(allocation->end - allocation->begin) + " bytes",
            place);
}

inline void AccessGlobal(uintptr_t address, size_t bytes, Access access, bool relaxed, const void* place) {
  const Allocation* const allocation = FindAllocation(address);
  if (allocation == nullptr || allocation->freed || address < allocation->begin || address + bytes > allocation->end) {
    OutOfBounds(allocation, address, bytes, access, place);
  }
  const bool atomic = relaxed || access == Access::kAtomic;
  if (access == Access::kAtomic) checks.acquired = true;
  const uintptr_t offset = address - arena_begin;
  if (access == Access::kRead) {
    // Most memory that is read was not written in this launch.
    if (checks.page_writes[offset / kPageBytes] != checks.launch_epoch &&
        checks.page_writes[(offset + bytes - 1) / kPageBytes] != checks.launch_epoch) {
      return;
    }
  } else {
    checks.page_writes[offset / kPageBytes] = checks.launch_epoch;
    checks.page_writes[(offset + bytes - 1) / kPageBytes] = checks.launch_epoch;
  }
  for (uintptr_t at = offset; at < offset + bytes;) {
    const uintptr_t word_end = std::min<uintptr_t>(offset + bytes, (at | 3) + 1);
    const uint32_t mask = ((1u << (word_end - at)) - 1) << (at & 3);
    Stamp& write = checks.global_writes[at / 4];
    if ((BytesOf(write) & mask) != 0 && !(atomic && AtomicOf(write)) && EpochOf(write) >= checks.launch_epoch) {
      if (EpochOf(write) < checks.block_epoch) {
        if (!checks.acquired) {
          Violation(std::string(access == Access::kRead ? "reads" : "writes") + " global memory at " + Hex(arena_begin + at) +
                        " that another block of the launch has written",
                    place);
        }
      } else if (Unordered(write)) {
        Race("global", access == Access::kRead ? "reads" : "writes", "wrote", write, arena_begin + at, place);
      }
    }
    if (access != Access::kRead) {
      const Stamp now = Who(atomic) | mask;
      write = (write & kWhoMask) == (now & kWhoMask) ? write | mask : now;
    }
    at = word_end;
  }
}

// All accesses but those to a thread's own variables.
void CheckAny(uintptr_t address, size_t bytes, Access access, bool relaxed, const void* place) {
  if (address - arena_begin < kArenaBytes && arena_begin != 0) {
    AccessGlobal(address, bytes, access, relaxed, place);
  } else if (InDynamic(address)) {
    if (address + bytes > running.shared_begin + running.shared_bytes) {
      Violation("an access of " + std::to_string(bytes) + " bytes at offset " + std::to_string(address - running.shared_begin) +
                    " of " + std::to_string(running.shared_bytes) + " bytes of dynamic shared memory",
                place);
    }
    const Stamp who = Who(relaxed || access == Access::kAtomic);
    ForWords(checks.dynamic_cells, running.shared_begin, address, bytes,
             [&](Cell& cell, uint32_t mask, uintptr_t at) { AccessWord(cell, who, mask, access, at, place, false); });
  } else if (InStatic(address)) {
    const Stamp who = Who(relaxed || access == Access::kAtomic);
    ForWords(checks.static_cells, checks.static_begin, address, bytes,
             [&](Cell& cell, uint32_t mask, uintptr_t at) { AccessWord(cell, who, mask, access, at, place, true); });
  } else if (address < checks.image_begin || address >= checks.image_end || access != Access::kRead) {
    Violation(std::string(access == Access::kRead ? "reads " : "writes ") + std::to_string(bytes) +
                  " bytes of the host's memory at " + Hex(address) + (address < 4096 ? " (a null pointer)" : ""),
              place);
  }
}

template <typename Action>
void ForSharedWords(const void* shared, Action&& action) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(shared);
  if (InDynamic(address)) {
    ForWords(checks.dynamic_cells, running.shared_begin, address, 16, action);
  } else {
    ForWords(checks.static_cells, checks.static_begin, address, 16, action);
  }
}

}  // namespace

// ---- From the emulator ----

void CheckStartKernel() {
  Initialize();
  if (checks.epoch > kMaxEpoch / 2) ForgetAll();
  NextEpoch();
  checks.launch_epoch = checks.epoch;
  if (checks.clocks_used) {
    for (Clocks& clocks : checks.clocks) {
      std::memset(&clocks, 0, sizeof(clocks));
      for (int lane = 0; lane < kWarpLanes; ++lane) clocks.of[lane][lane] = 1;
    }
    checks.clocks_used = false;
  }
}

void CheckStartBlock() {
  NextEpoch();
  checks.block_epoch = checks.epoch;
  checks.acquired = false;
  checks.static_used = 0;
}

void CheckBarrier() { NextEpoch(); }

void CheckSyncWarp(int warp, uint32_t mask) {
  Clocks& clocks = checks.clocks[static_cast<size_t>(warp)];
  checks.clocks_used = true;
  uint32_t joined[kWarpLanes] = {};
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    for (int other = 0; other < kWarpLanes; ++other) joined[other] = std::max(joined[other], clocks.of[lane][other]);
  }
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    std::memcpy(clocks.of[lane], joined, sizeof(joined));
    if (++clocks.of[lane][lane] > kMaxClock) Fatal("more __syncwarps in one launch than the checks can count");
  }
}

void CheckAligned(const void* pointer, size_t alignment, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
    Violation(std::string(what) + " is at " + Hex(pointer) + ", which is no multiple of " + std::to_string(alignment));
  }
}

void CheckShared(const void* pointer, const char* what) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (!InDynamic(address) && !InStatic(address))
    Violation(std::string(what) + " at " + Hex(pointer) + " is not in shared memory");
}

void CheckGlobal(const void* pointer, const char* what) {
  if (arena_begin == 0 || reinterpret_cast<uintptr_t>(pointer) - arena_begin >= kArenaBytes) {
    Violation(std::string(what) + " at " + Hex(pointer) + " is not in global memory");
  }
}

void CheckAccess(const void* pointer, size_t bytes, Access access) {
  CheckAny(reinterpret_cast<uintptr_t>(pointer), bytes, access, false, nullptr);
}

void CheckCopyStart(const void* shared) {
  // A write from now on, for all who read or write here without a barrier between; and nothing may look until it is done.
  CheckAny(reinterpret_cast<uintptr_t>(shared), 16, Access::kWrite, false, nullptr);
  ForSharedWords(shared, [](Cell& cell, uint32_t, uintptr_t) { cell.pending = checks.block_epoch; });
}

void CheckCopyEnd(const void* shared) {
  ForSharedWords(shared, [](Cell& cell, uint32_t bytes, uintptr_t) {
    cell.pending = 0;
    cell.write = Who(false) | bytes;
  });
}

}  // namespace bebop::emulation

// ---- The compiler's hooks ----

using bebop::emulation::Access;
using bebop::emulation::CheckAny;
using bebop::emulation::Hex;
using bebop::emulation::in_kernel;
using bebop::emulation::running;
using bebop::emulation::Violation;

namespace {

inline void Hook(void* pointer, size_t bytes, Access access, bool relaxed, const void* place) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (address - running.stacks_begin < running.stacks_bytes || !in_kernel) return;
  CheckAny(address, bytes, access, relaxed, place);
}

}  // namespace

extern "C" {

#define BEBOP_HOOKS(bytes)                                                                                                      \
  void __tsan_read##bytes(void* pointer) { Hook(pointer, bytes, Access::kRead, false, __builtin_return_address(0)); }           \
  void __tsan_write##bytes(void* pointer) { Hook(pointer, bytes, Access::kWrite, false, __builtin_return_address(0)); }         \
  void __tsan_unaligned_read##bytes(void* pointer) { Hook(pointer, bytes, Access::kRead, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* pointer) {                                                                           \
    Hook(pointer, bytes, Access::kWrite, false, __builtin_return_address(0));                                                   \
  }                                                                                                                             \
  void __tsan_volatile_read##bytes(void* pointer) { Hook(pointer, bytes, Access::kRead, true, __builtin_return_address(0)); }   \
  void __tsan_volatile_write##bytes(void* pointer) { Hook(pointer, bytes, Access::kWrite, true, __builtin_return_address(0)); } \
  void __tsan_unaligned_volatile_read##bytes(void* pointer) {                                                                   \
    Hook(pointer, bytes, Access::kRead, true, __builtin_return_address(0));                                                     \
  }                                                                                                                             \
  void __tsan_unaligned_volatile_write##bytes(void* pointer) {                                                                  \
    Hook(pointer, bytes, Access::kWrite, true, __builtin_return_address(0));                                                    \
  }
BEBOP_HOOKS(1)
BEBOP_HOOKS(2)
BEBOP_HOOKS(4)
BEBOP_HOOKS(8)
BEBOP_HOOKS(16)
#undef BEBOP_HOOKS

void __tsan_read_range(void* pointer, size_t bytes) { Hook(pointer, bytes, Access::kRead, false, __builtin_return_address(0)); }
void __tsan_write_range(void* pointer, size_t bytes) { Hook(pointer, bytes, Access::kWrite, false, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// The launchers in kernel files are host code, whose shared pointers and once-initialized variables use atomics.
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}
#define BEBOP_ATOMICS(bits, type)                                                                                           \
  type __tsan_atomic##bits##_load(const volatile type* pointer, int) { return __atomic_load_n(pointer, __ATOMIC_SEQ_CST); } \
  void __tsan_atomic##bits##_store(volatile type* pointer, type value, int) {                                               \
    __atomic_store_n(pointer, value, __ATOMIC_SEQ_CST);                                                                     \
  }                                                                                                                         \
  type __tsan_atomic##bits##_exchange(volatile type* pointer, type value, int) {                                            \
    return __atomic_exchange_n(pointer, value, __ATOMIC_SEQ_CST);                                                           \
  }                                                                                                                         \
  type __tsan_atomic##bits##_fetch_add(volatile type* pointer, type value, int) {                                           \
    return __atomic_fetch_add(pointer, value, __ATOMIC_SEQ_CST);                                                            \
  }                                                                                                                         \
  type __tsan_atomic##bits##_fetch_sub(volatile type* pointer, type value, int) {                                           \
    return __atomic_fetch_sub(pointer, value, __ATOMIC_SEQ_CST);                                                            \
  }                                                                                                                         \
  type __tsan_atomic##bits##_fetch_and(volatile type* pointer, type value, int) {                                           \
    return __atomic_fetch_and(pointer, value, __ATOMIC_SEQ_CST);                                                            \
  }                                                                                                                         \
  type __tsan_atomic##bits##_fetch_or(volatile type* pointer, type value, int) {                                            \
    return __atomic_fetch_or(pointer, value, __ATOMIC_SEQ_CST);                                                             \
  }                                                                                                                         \
  type __tsan_atomic##bits##_fetch_xor(volatile type* pointer, type value, int) {                                           \
    return __atomic_fetch_xor(pointer, value, __ATOMIC_SEQ_CST);                                                            \
  }                                                                                                                         \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile type* pointer, type* expected, type value, int, int) {         \
    return __atomic_compare_exchange_n(pointer, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                \
  }                                                                                                                         \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile type* pointer, type* expected, type value, int, int) {           \
    return __atomic_compare_exchange_n(pointer, expected, value, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                 \
  }
BEBOP_ATOMICS(8, uint8_t)
BEBOP_ATOMICS(16, uint16_t)
BEBOP_ATOMICS(32, uint32_t)
BEBOP_ATOMICS(64, uint64_t)
#undef BEBOP_ATOMICS

// What -fsanitize=alignment,bounds calls when its own test in the code has failed. Layouts: GCC's and Clang's UBSan interface.
struct SourceLocation {
  const char* file;
  uint32_t line;
  uint32_t column;
};
struct TypeDescriptor {
  uint16_t kind;
  uint16_t info;
  char name[1];
};
struct TypeMismatch {
  SourceLocation location;
  const TypeDescriptor* type;
  uint8_t log_alignment;
  uint8_t check_kind;
};
struct IndexOutOfBounds {
  SourceLocation location;
  const TypeDescriptor* array;
  const TypeDescriptor* index;
};

void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t pointer) {
  Violation("misaligned access to a " + std::string(data->type->name) + " at " + Hex(pointer) + ", which is no multiple of " +
            std::to_string(1u << data->log_alignment) + "\n  in " + data->location.file + ":" +
            std::to_string(data->location.line));
}
void __ubsan_handle_type_mismatch_v1_abort(TypeMismatch* data, uintptr_t pointer) {
  __ubsan_handle_type_mismatch_v1(data, pointer);
}
void __ubsan_handle_out_of_bounds(IndexOutOfBounds* data, uintptr_t index) {
  Violation("index " + std::to_string(static_cast<int64_t>(index)) + " is out of bounds of an array of type " +
            data->array->name + "\n  in " + data->location.file + ":" + std::to_string(data->location.line));
}
void __ubsan_handle_out_of_bounds_abort(IndexOutOfBounds* data, uintptr_t index) { __ubsan_handle_out_of_bounds(data, index); }

}  // extern "C"
