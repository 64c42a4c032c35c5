// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/cpu_features.h"
#include "kernels/common/ragged_batch.h"
#include "kernels/common/stream.h"
#include "kernels/common/tensor_view.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

// Causal paged attention with the sigmoid output gate of Qwen3.5:
//   out[t, h] = sigmoid(gate[t, h]) · Σ_j softmax_j(q[t,h]·k_j / √head_dim) v_j,
// j over the cached positions [first_index, limit(t)] of row t's sequence, GQA by grouping (kv head = h / (nq/nkv)).
//
//   q: [T, nq*head_dim] float32 (after norm and RoPE); gate: inside q_gate [T, nq*2*head_dim], second half of each head
//   out: [T, nq*head_dim] float32
// limit(t) = row_position[t] normally. With a chain (num_chain > 0; teacher-forced MTP depth > 1) limit(t) = row_position[t] -
// num_chain for the pages, followed by num_chain private entries of the row itself: chain entry c of row t is row t of
// chain_k[c]/chain_v[c] ([T, nkv*head_dim] of the pages' dtype); the last one is the row's own position.
//
// float32 accumulation, softmax in one fixed order over absolute positions: a row's result does not depend on the batch, on how
// the prompt was cut into chunks, on the page size, or on threads. The order: tiles of 16 positions counted from first_index,
// then the chain, with an online softmax (Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018) whose maximum
// moves once a tile. Rows and q heads that share keys read them together. Weights below e^-86 of the largest count as 0
// (exponential: simd.inc). A NaN or infinity reaches the rows that see it, and no others. A row that sees no entry gives 0.
// head_dim <= 256.
struct AttentionArgs {
  RaggedBatch batch;  // row_position must be set; the sequences cover all rows
  TensorView q;
  TensorView q_gate;
  KvPagesView pages;
  int32_t num_q_heads = 0;
  int32_t first_index = 0;  // 1 for the MTP cache, whose entry for h_t and x_{t+1} lies at position t+1
  int32_t num_chain = 0;
  const TensorView* chain_k = nullptr;  // [num_chain]
  const TensorView* chain_v = nullptr;  // [num_chain]
  TensorView out;
};

namespace cpu {
void Attention(const AttentionArgs& args, ThreadPool& pool);
// The same with a chosen instruction set (tests). REQUIRES: the processor has it.
void AttentionWith(InstructionSet set, const AttentionArgs& args, ThreadPool& pool);
}  // namespace cpu

namespace cuda {
// Enqueues the same on the device: bf16 (q, q_gate, pages, out; head_dim a multiple of 16) on tensor cores, float32 in plain float32.
// Keys are split over blocks and merged in a fixed order, so the sums round differently from the CPU's. Shapes come from the batch's
// max_sequence_rows and max_positions. On a batch-invariant stream a row's bits depend on its own context alone.
// REQUIRES: page_tokens is a power of two, in bf16 at least 16; in bf16 pages and rows of q, q_gate and out start at multiples of 16
// bytes; num_chain <= 8.
void Attention(const AttentionArgs& args, Stream& stream);
}  // namespace cuda
}  // namespace bebop
