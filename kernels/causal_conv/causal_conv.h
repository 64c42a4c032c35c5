// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/common/cpu_features.h"
#include "kernels/common/ragged_batch.h"
#include "kernels/common/stream.h"
#include "kernels/common/tensor_view.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

// Causal depthwise convolution (last tap = current token, no bias), then SiLU, over the raw inputs of each sequence:
//   y[t, c] = SiLU(Σ_{j<K} weight[c, j] · x[t - (K-1) + j, c]).
//   x, y: [T, C] float32, C = state.conv_channels(). weight: [C, K] float32. y must not alias x.
// Inputs before a sequence's first row come from slot state_src: with r = num_replay_rows they are its conv_inputs rows
// [r, r + K-1) (zeros when state_src is -1). Slot state_dst receives the K-1 raw inputs that end at the last known row, then the
// draft rows' raw inputs. `state.matrix` and the windows are not touched. 1 <= K <= 8.
//
// Taps are added in order j = 0..K-1 in float32; SiLU uses the exponential of kernels/common/simd.inc (2 ulp). Every channel runs
// all sequences in order, so a later sequence may read a slot that an earlier one of the same call wrote; channels run in
// parallel.
struct CausalConvArgs {
  RaggedBatch batch;
  TensorView x;
  const float* weight = nullptr;
  LinearStateView state;
  TensorView y;
};

namespace cpu {
void CausalConv(const CausalConvArgs& args, ThreadPool& pool);
// The same with a chosen instruction set (tests). REQUIRES: the processor has it.
void CausalConvWith(InstructionSet set, const CausalConvArgs& args, ThreadPool& pool);
}  // namespace cpu

namespace cuda {
// Enqueues the same on the device. x, y and state.conv_inputs have one dtype, float32 or bf16 (sums in float32).
void CausalConv(const CausalConvArgs& args, Stream& stream);
}  // namespace cuda
}  // namespace bebop
