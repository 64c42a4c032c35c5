// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/cpu_features.h"
#include "kernels/common/ragged_batch.h"
#include "kernels/common/stream.h"
#include "kernels/common/tensor_view.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

// Per-head zero-centred RMSNorm of q and k, NeoX-style partial RoPE on the first `rotary_dim` dims (pairs i, i + rotary_dim/2;
// inv_freq_i = theta^(-2i/rotary_dim)), and the write of k, v. head_dim <= 256.
//
// Angle, cos and sin are computed in double and only cos and sin are rounded: their error is 2^-25 at any position. (transformers
// multiplies a float32 inv_freq by a float32 position; at position 200,000 its angles are off by up to 1e-2. The oracle is
// transformers in float64 with inv_freq computed in float64 too.) The norm's sum of squares is in double, so all bits are those
// of any thread count.
//
//   q_gate: [T, nq * 2*head_dim] float32: per head head_dim query then head_dim gate values (gate is not touched here)
//   k, v:   [T, nkv * head_dim] float32
//   q_out:  [T, nq * head_dim] float32
// k and v of row t go to the pages at position row_position[t] (converted to the pages' dtype), or, when `dense_k` is set, to
// dense_k/dense_v [T, nkv*head_dim] of the pages' dtype (the private entries of an MTP chain, algorithm.md section 4).
struct QkNormRopeArgs {
  RaggedBatch batch;  // row_sequence and row_position must be set
  TensorView q_gate;
  TensorView k;
  TensorView v;
  const float* q_norm = nullptr;  // [head_dim]
  const float* k_norm = nullptr;  // [head_dim]
  float eps = 1e-6f;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t rotary_dim = 0;  // even, <= head_dim
  double rope_theta = 1e7;
  TensorView q_out;
  KvPagesView pages;
  TensorView dense_k;  // optional
  TensorView dense_v;  // optional
};

namespace cpu {
void QkNormRope(const QkNormRopeArgs& args, ThreadPool& pool);
// The same with a chosen instruction set (tests). The bits are those of any other set. REQUIRES: the processor has it.
void QkNormRopeWith(InstructionSet set, const QkNormRopeArgs& args, ThreadPool& pool);
}  // namespace cpu

namespace cuda {
// Enqueues the same on the device: q_gate, k, v, q_out and pages have one dtype, float32 or bf16. Rows of padding write no page.
void QkNormRope(const QkNormRopeArgs& args, Stream& stream);
}  // namespace cuda
}  // namespace bebop
