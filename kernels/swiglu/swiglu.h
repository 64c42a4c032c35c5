// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/common/cpu_features.h"
#include "kernels/common/stream.h"
#include "kernels/common/tensor_view.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

// out = SiLU(gate) · up, element by element. gate, up, out: [T, F] float32 (gate and up usually are column ranges of one fused
// product). out may alias gate. SiLU uses the exponential of kernels/common/simd.inc (2 ulp).
struct SwiGluArgs {
  TensorView gate;
  TensorView up;
  TensorView out;
};

namespace cpu {
void SwiGlu(const SwiGluArgs& args, ThreadPool& pool);
// The same with a chosen instruction set (tests). REQUIRES: the processor has it.
void SwiGluWith(InstructionSet set, const SwiGluArgs& args, ThreadPool& pool);
}  // namespace cpu

namespace cuda {
// Enqueues the same on the device: gate, up and out have one dtype, float32 or bf16.
void SwiGlu(const SwiGluArgs& args, Stream& stream);
}  // namespace cuda
}  // namespace bebop
