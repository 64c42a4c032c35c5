// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

namespace bebop::emulation {

// Ends the process: a rule of CUDA is broken, or a rule of kernels/common/gpu.h. `what` is a whole sentence without its stop; the
// kernel, block and thread that run are named when there are any, and so is the source line of `place` (a return address), as far
// as the program `addr2line` and the debug information know it.
[[noreturn]] void Violation(const std::string& what, const void* place = nullptr);
// The emulator itself cannot go on.
[[noreturn]] void Fatal(const std::string& what);

// "function at file:line" of an address of this program's code.
std::string NameOfCode(const void* address);
std::string Hex(const void* address);
std::string Hex(uintptr_t address);

}  // namespace bebop::emulation
