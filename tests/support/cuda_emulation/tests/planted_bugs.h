// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

// Kernels that each break one rule (planted_bugs.cu). All of them get the same arguments.
namespace bebop::emulation_tests {

struct BugArguments {
  float* data = nullptr;             // 256 values of device memory, 0
  const uint16_t* halves = nullptr;  // 4096 bf16 of device memory
  float* host = nullptr;             // the host's memory
  float* null = nullptr;
  float* freed = nullptr;       // device memory that was freed
  float* pinned = nullptr;      // 64 values of pinned memory
  unsigned* counter = nullptr;  // device memory, 0
};

struct Bug {
  const char* name;
  // What the emulator must say, as a regular expression of gtest.
  const char* complaint;
  cudaError_t (*launch)(const BugArguments&, cudaStream_t);
};

extern const Bug kBugs[];
extern const int kNumBugs;

}  // namespace bebop::emulation_tests
