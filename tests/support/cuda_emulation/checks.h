// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

// The emulator's words to the checks; accesses themselves arrive through the compiler's hooks (README.md).
namespace bebop::emulation {

void CheckStartKernel();
void CheckStartBlock();
void CheckBarrier();                          // all threads of the block have come to a barrier
void CheckSyncWarp(int warp, uint32_t mask);  // these lanes have come to a __syncwarp
void CheckCopyStart(const void* shared);      // 16 bytes will be written by the present thread some time before its wait
void CheckCopyEnd(const void* shared);

void CheckAligned(const void* pointer, size_t alignment, const char* what);
void CheckShared(const void* pointer, const char* what);
void CheckGlobal(const void* pointer, const char* what);

}  // namespace bebop::emulation
