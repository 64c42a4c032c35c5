// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/cpu_features.h"
#include "kernels/common/stream.h"
#include "kernels/common/tensor_view.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

// Backward of QkNormRope (its rotation and norms; v passes through). The rotation is undone by its transpose, then the norm's
// backward is that of RmsNormBackward over each head.
//   q_gate: [T, nq * 2*head_dim] and k: [T, nkv * head_dim], what the forward read
//   dq, dk: [T, nq*head_dim], [T, nkv*head_dim], gradients after norm and rotation
//   dq_gate: [T, nq * 2*head_dim], may alias q_gate: the query half of each head is written, the gate half is not touched (it is
//     ChainAttentionBackward's)
//   dk_out: [T, nkv*head_dim]; may alias dk or k
//   dq_norm, dk_norm: [head_dim], added to; sums of blocks of 64 rows in order, whatever the threads
// All float32; head_dim <= 256.
struct QkNormRopeBackwardArgs {
  const int32_t* row_position = nullptr;  // [T]
  TensorView q_gate;
  TensorView k;
  const float* q_norm = nullptr;
  const float* k_norm = nullptr;
  float eps = 1e-6f;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t rotary_dim = 0;
  double rope_theta = 1e7;
  TensorView dq;
  TensorView dk;
  TensorView dq_gate;
  TensorView dk_out;
  float* dq_norm = nullptr;
  float* dk_norm = nullptr;
};

namespace cpu {
// Allocates its partial sums.
void QkNormRopeBackward(const QkNormRopeBackwardArgs& args, ThreadPool& pool);
// The same with a chosen instruction set (tests). REQUIRES: the processor has it.
void QkNormRopeBackwardWith(InstructionSet set, const QkNormRopeBackwardArgs& args, ThreadPool& pool);
}  // namespace cpu

namespace cuda {
// Enqueues the same on the device: head_dim a multiple of 8, rows and norms aligned to 16 bytes. All sums are float32, in an order that T
// and the numbers of heads decide; the partial ones are in the stream's workspace.
void QkNormRopeBackward(const QkNormRopeBackwardArgs& args, Stream& stream);
}  // namespace cuda
}  // namespace bebop
