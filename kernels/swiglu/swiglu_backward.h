// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/common/cpu_features.h"
#include "kernels/common/stream.h"
#include "kernels/common/tensor_view.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

// Backward of out = SiLU(gate) · up, element by element, with s = sigmoid(gate):
//   dgate = dout·up·s·(1 + gate·(1 - s));   dup = dout·gate·s;   out = gate·s·up, which the weight gradient of the next product
//   needs and nobody had to keep.
// All [T, F] float32. dgate may alias gate, dup may alias up, out may alias dout.
struct SwiGluBackwardArgs {
  TensorView gate;
  TensorView up;
  TensorView dout;
  TensorView dgate;
  TensorView dup;
  TensorView out;
};

namespace cpu {
void SwiGluBackward(const SwiGluBackwardArgs& args, ThreadPool& pool);
// The same with a chosen instruction set (tests). REQUIRES: the processor has it.
void SwiGluBackwardWith(InstructionSet set, const SwiGluBackwardArgs& args, ThreadPool& pool);
}  // namespace cpu

namespace cuda {
// Enqueues the same on the device: F a multiple of 8, rows aligned to 16 bytes.
void SwiGluBackward(const SwiGluBackwardArgs& args, Stream& stream);
}  // namespace cuda
}  // namespace bebop
