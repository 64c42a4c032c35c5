// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/common/cpu_features.h"
#include "kernels/common/stream.h"
#include "kernels/common/tensor_view.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

// Zero-centred RMSNorm: out = x · rsqrt(mean(x²) + eps) · (1 + weight), per row, in float32 with the sum of squares in double
// on the CPU. `residual`, when its data is set, is added first: x <- x + residual in place (the residual stream), then
// normalised.
//   x, residual, out: [T, H] float32. weight: [H] float32. out may alias residual, not x.
struct RmsNormArgs {
  TensorView x;
  TensorView residual;  // optional: data == nullptr
  const float* weight = nullptr;
  float eps = 1e-6f;
  TensorView out;
};

// Gated RMSNorm of the linear-attention block, per head over dv, with a *plain* weight:
//   out = x · rsqrt(mean(x²) + eps) · weight · SiLU(gate).
//   x, gate, out: [T, heads*dv] float32, weight: [dv]. out may alias x.
struct GatedRmsNormArgs {
  TensorView x;
  TensorView gate;
  const float* weight = nullptr;
  int32_t head_dim = 0;
  float eps = 1e-6f;
  TensorView out;
};

namespace cpu {
void RmsNorm(const RmsNormArgs& args, ThreadPool& pool);
void GatedRmsNorm(const GatedRmsNormArgs& args, ThreadPool& pool);
// The same with a chosen instruction set (tests). REQUIRES: the processor has it. RmsNorm has the same bits on every set;
// GatedRmsNorm differs in the last bits, by the exponential's use of FMA.
void RmsNormWith(InstructionSet set, const RmsNormArgs& args, ThreadPool& pool);
void GatedRmsNormWith(InstructionSet set, const GatedRmsNormArgs& args, ThreadPool& pool);
}  // namespace cpu

namespace cuda {
// Enqueues the same on the device: each of x, residual and out is float32 or bf16 (the stream is float32); sums of squares in float32.
void RmsNorm(const RmsNormArgs& args, Stream& stream);
void GatedRmsNorm(const GatedRmsNormArgs& args, Stream& stream);
}  // namespace cuda
}  // namespace bebop
