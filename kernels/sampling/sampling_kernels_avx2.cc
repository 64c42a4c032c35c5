// SPDX-License-Identifier: Apache-2.0
// Compiled with the flags of its instruction set (CMakeLists.txt); called only where the processor has it.
#define BEBOP_SAMPLING_WIDTH 8
#define BEBOP_SAMPLING_TABLE Avx2SamplingKernels
#include "kernels/sampling/sampling_kernels.inc"
