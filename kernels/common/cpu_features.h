// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace bebop::cpu {

// The instruction sets that kernels are written for, each one a superset of those before it.
//   kAvx2:       AVX2, FMA
//   kAvx512:     AVX-512 F, BW, DQ, VL
//   kAvx512Bf16: AVX-512 BF16 (vdpbf16ps)
enum class InstructionSet : uint8_t { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// The best set that this processor and operating system support. Asked once; the same for the life of the process.
InstructionSet DetectInstructionSet();

// "portable", "avx2", "avx512", "avx512_bf16".
const char* InstructionSetName(InstructionSet set);

}  // namespace bebop::cpu
