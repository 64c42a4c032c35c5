// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/cpu_features.h"
#include "kernels/common/stream.h"
#include "kernels/common/tensor_view.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

// The rows of one document in a packed training batch.
struct DocumentRows {
  int64_t first_row = 0;
  int64_t num_rows = 0;
};

// Gated attention of one step of the recurrent MTP chains of all bases at once, for training: no pages, and what the backward
// needs is kept. Row r of a document is the base r; at step k it attends to the step-1 entries of rows first_row .. r of its
// document and to its own num_chain = k - 1 later entries, never to another base's (algorithm.md section 4). Step 1 is plain
// causal attention.
//   attended[r, h] = Σ_j softmax_j(q[r,h]·k_j / √head_dim) v_j;   out[r, h] = sigmoid(gate[r, h])·attended[r, h]
//   log_sum[r, h] = log Σ_j exp(q[r,h]·k_j / √head_dim)
// GQA by grouping (kv head = h / (nq/nkv)). All float32, R rows:
//   q [R, nq*head_dim] after norm and rotation; gate: the second half of each head of q_gate [R, nq*2*head_dim]
//   base_k, base_v [R, nkv*head_dim], after norm and rotation; chain_k[c], chain_v[c] the same for the entries of step c + 2
//   attended, out [R, nq*head_dim]; log_sum [R, nq]
// head_dim is a multiple of 16. A row's bits do not depend on threads nor on other documents.
struct ChainAttentionArgs {
  const DocumentRows* documents = nullptr;
  int32_t num_documents = 0;
  TensorView q;
  TensorView q_gate;
  TensorView base_k;
  TensorView base_v;
  int32_t num_chain = 0;
  const TensorView* chain_k = nullptr;
  const TensorView* chain_v = nullptr;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  TensorView attended;
  TensorView log_sum;
  TensorView out;
};

// Backward of ChainAttention. The probabilities are made again from log_sum (Dao et al., "FlashAttention", 2022, algorithm 4),
// once over blocks of rows for dq and the chains, once over blocks of keys for dbase_k and dbase_v, so that every sum has one
// owner and one order.
//   forward: the arguments of the forward with its results; `out` is not read
//   dout [R, nq*head_dim]: overwritten with the gradient of `attended`
//   dq [R, nq*head_dim]: written; may alias forward.out
//   dq_gate [R, nq*2*head_dim]: the gate half of each head is written; may alias q_gate
//   dbase_k, dbase_v, dchain_k[c], dchain_v[c] [R, nkv*head_dim]: added to
struct ChainAttentionBackwardArgs {
  ChainAttentionArgs forward;
  TensorView dout;
  TensorView dq;
  TensorView dq_gate;
  TensorView dbase_k;
  TensorView dbase_v;
  const TensorView* dchain_k = nullptr;
  const TensorView* dchain_v = nullptr;
};

namespace cpu {
// Both allocate their tiles.
void ChainAttention(const ChainAttentionArgs& args, ThreadPool& pool);
void ChainAttentionBackward(const ChainAttentionBackwardArgs& args, ThreadPool& pool);
// The same with a chosen instruction set (tests). REQUIRES: the processor has it.
void ChainAttentionWith(InstructionSet set, const ChainAttentionArgs& args, ThreadPool& pool);
void ChainAttentionBackwardWith(InstructionSet set, const ChainAttentionBackwardArgs& args, ThreadPool& pool);
}  // namespace cpu

namespace cuda {
// Enqueue the same on the device, where `documents` is too; documents ascend and cover all R rows. head_dim <= 256, num_chain <=
// 8, rows aligned to 16 bytes, at most 32 q heads a kv head. What enters a product with base entries (q, k, v, probabilities,
// dout, gradients of scores) is rounded to bf16, its sums and everything of a row's own chain are float32. A row's bits depend on
// its document and where that lies in the batch; a value that is not finite may spread to other rows of its tile. Indices of rows
// and delta are in the workspace.
void ChainAttention(const ChainAttentionArgs& args, Stream& stream);
void ChainAttentionBackward(const ChainAttentionBackwardArgs& args, Stream& stream);
}  // namespace cuda
}  // namespace bebop
