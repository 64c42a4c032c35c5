// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/common/cpu_features.h"
#include "kernels/common/ragged_batch.h"
#include "kernels/common/stream.h"
#include "kernels/common/tensor_view.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

// Gated delta rule (Yang, Kautz, Hatamizadeh, "Gated Delta Networks", 2024) in step form with lazy commit. Per value head h, with
// key head h / (Hv/Hk), for each token in order:
//   q ← q/√(Σq²+1e-6)/√dk,  k ← k/√(Σk²+1e-6),  beta = σ(b),  g = −exp(A_log)·softplus(a + dt_bias)
//   S ← e^g·S;  δ = beta·(v − Sᵀk);  S ← S + k δᵀ;  o = Sᵀ q                         (S: [dk, dv], float32)
//
//   qkv: [T, C] float32 after conv and SiLU: q [Hk*dk], k [Hk*dk], v [Hv*dv]
//   a, b: [T, Hv] float32;  a_log, dt_bias: [Hv] float32
//   out: [T, Hv*dv] float32
//
// For each sequence: S = slot state_src (zeros if -1); replay rows [0, num_replay_rows) of that slot's window; run the known
// rows; store S to slot state_dst; run the draft rows without storing S, keeping their raw k, v, g, beta in state_dst's window.
// Every row is computed by the same code in the same order, so any accepted prefix leaves the bits that token-by-token decoding
// would leave. On the CPU prompts use this form too (an ADR says why), so recomputation after preemption changes no bit either.
// Sequences run in order (a later one may read a slot written by an earlier one in the same call); heads and columns run in
// parallel.
//
// Sums over dk go in order of the row, each column by itself, so neither threads nor batch mates change a bit; instruction sets
// differ where one has FMA. The norms of q and k are applied to the sums (Sᵀk, δ), not to the vectors. dk <= 256, window <= 64.
// Raw q, k, v of replayed rows are read from the window, so `qkv` of an earlier pass need not live on.
struct DeltaRuleArgs {
  RaggedBatch batch;
  TensorView qkv;
  TensorView a;
  TensorView b;
  const float* a_log = nullptr;
  const float* dt_bias = nullptr;
  LinearStateView state;
  TensorView out;
};

namespace cpu {
void DeltaRule(const DeltaRuleArgs& args, ThreadPool& pool);
// The same with a chosen instruction set (tests). REQUIRES: the processor has it.
void DeltaRuleWith(InstructionSet set, const DeltaRuleArgs& args, ThreadPool& pool);
}  // namespace cpu

namespace cuda {
// Enqueues the same on the device. qkv, a, b, out and the windows have one dtype, float32 or bf16; state and sums are float32. Rows take
// the step form, whose bits depend on nothing but the sequence's own rows; except that in bf16 with dk = dv = 128 the prefill rows of a
// pass between the same two absolute multiples of 64 take the chunked form if there are more than 32 of them (model.md section 5). There a
// NaN reaches earlier rows of its chunk. dv <= 256; the workspace holds the draft rows' gates, 8 bytes each.
void DeltaRule(const DeltaRuleArgs& args, Stream& stream);
}  // namespace cuda
}  // namespace bebop
