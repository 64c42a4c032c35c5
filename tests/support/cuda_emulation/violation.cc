// SPDX-License-Identifier: Apache-2.0
#include "violation.h"

#include <dlfcn.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>

#include "block.h"

namespace bebop::emulation {

std::string Hex(uintptr_t address) {
  std::array<char, 24> text;
  std::snprintf(text.data(), text.size(), "0x%llx", static_cast<unsigned long long>(address));
  return text.data();
}
std::string Hex(const void* address) { return Hex(reinterpret_cast<uintptr_t>(address)); }

std::string NameOfCode(const void* address) {
  Dl_info info;
  if (dladdr(address, &info) == 0) return Hex(address);
  std::array<char, 4096> program{};
  if (readlink("/proc/self/exe", program.data(), program.size() - 1) <= 0) return Hex(address);
  const uintptr_t offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(info.dli_fbase);
  const std::string command = std::string("addr2line -Cfsp -e '") + program.data() + "' " + Hex(offset) + " 2>/dev/null";
  FILE* const pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return Hex(address);
  std::string line;
  for (int c = std::fgetc(pipe); c != EOF && c != '\n'; c = std::fgetc(pipe)) line += static_cast<char>(c);
  pclose(pipe);
  return line.empty() || line[0] == '?' ? Hex(address) : line;
}

void Violation(const std::string& what, const void* place) {
  const std::string thread = CurrentThread();
  in_kernel = false;  // no checks of what follows
  // The return address is behind the access: one byte back is inside it.
  const std::string at = place == nullptr ? "" : "  in " + NameOfCode(static_cast<const char*>(place) - 1) + "\n";
  std::fprintf(stderr, "\nCUDA emulation: %s\n%s%s%s%s\n", what.c_str(), thread.empty() ? "" : "  ", thread.c_str(),
               thread.empty() ? "" : "\n", at.c_str());
  std::fflush(stderr);
  std::abort();
}

void Fatal(const std::string& what) {
  std::fprintf(stderr, "\nCUDA emulation cannot go on: %s\n", what.c_str());
  std::fflush(stderr);
  std::abort();
}

}  // namespace bebop::emulation
