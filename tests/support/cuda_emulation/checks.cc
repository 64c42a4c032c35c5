// SPDX-License-Identifier: Apache-2.0
#include "checks.h"

#include <string>

#include "block.h"
#include "cuda_emulation_device.h"
#include "memory.h"
#include "violation.h"

namespace bebop::emulation {

void CheckStartKernel() {}
void CheckStartBlock() {}
void CheckBarrier() {}
void CheckSyncWarp(int, uint32_t) {}
void CheckCopyStart(const void*) {}
void CheckCopyEnd(const void*) {}

void CheckAligned(const void* pointer, size_t alignment, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
    Violation(std::string(what) + " is at " + Hex(pointer) + ", which is no multiple of " + std::to_string(alignment));
  }
}
void CheckShared(const void*, const char*) {}
void CheckGlobal(const void*, const char*) {}
void CheckAccess(const void*, size_t, Access) {}

}  // namespace bebop::emulation
