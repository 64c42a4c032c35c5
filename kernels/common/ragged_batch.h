// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/dtype.h"

namespace bebop {

// What one sequence contributes to a forward pass over T rows (tokens). Plain data, so that a device backend can copy it.
//
// The rows of a sequence are `num_known_rows` certain tokens (a prompt chunk, or the last emitted token) followed by draft rows
// whose fate this pass decides. Known rows are committed to the recurrent state in this pass; draft rows only enter the state
// slot's window, and the next pass replays the accepted ones (`num_replay_rows`) before its own rows. So the state is read once
// and written once per pass ("lazy commit").
struct SequenceRows {
  int32_t first_row = 0;         // index of the first row in the batch
  int32_t num_rows = 0;          // known + draft rows, >= 1; on a device 0 marks a padded sequence, which touches nothing
  int32_t num_known_rows = 0;    // 0 <= num_known_rows <= num_rows
  // Of the known rows, the first so many may take the form that is meant for prompts (model.md section 5): the device's chunked delta rule. The
  // others, generated tokens that a recompute brings back among them, take the step form, as when they were first computed.
  int32_t num_prefill_rows = 0;
  int32_t num_replay_rows = 0;   // accepted rows of the window left in slot `state_src` by the previous pass
  int32_t first_position = 0;    // absolute position of the first row; row i has position first_position + i
  int32_t state_src = -1;        // recurrent-state slot to read; -1: the zero state (start of a sequence)
  int32_t state_dst = -1;        // recurrent-state slot to write; may equal state_src
  int32_t first_page = 0;        // where this sequence's page table starts in RaggedBatch::page_ids
};

// All sequences of a pass, in order. On the CPU a sequence may read pages and slots written by an earlier sequence of the same pass; on a
// device sequences run at the same time, so no sequence may touch what another one of the pass writes.
//
// On a device the arrays are device memory and may say less than the counts here, which are the capacity a launch is shaped by:
// sequences with num_rows 0 and rows with row_sequence -1 are padding.
struct RaggedBatch {
  int32_t num_sequences = 0;
  int32_t num_rows = 0;                          // T
  const SequenceRows* sequences = nullptr;       // [num_sequences]
  const int32_t* page_ids = nullptr;             // concatenated page tables; entry j covers positions [j*page_tokens, ...)
  // Optional row maps, both [T] or null: sequence index and absolute position of each row. A device needs them.
  const int32_t* row_sequence = nullptr;
  const int32_t* row_position = nullptr;
  // Bounds that shape a device's launches; the CPU does not look at them.
  int32_t max_sequence_rows = 0;  // most rows of one sequence
  int32_t max_positions = 0;      // most positions (cached and new) that a row attends to
};

// KV pages of one full-attention layer. k and v: [num_pages, num_kv_heads, page_tokens, head_dim] of `dtype`.
struct KvPagesView {
  void* k = nullptr;
  void* v = nullptr;
  DType dtype = DType::kFloat32;
  int32_t num_pages = 0;
  int32_t page_tokens = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
};

// Recurrent state of one linear-attention layer, for all slots: the matrix in float32, the inputs in `input_dtype` (kFloat32 on the CPU;
// a device that computes in bf16 has them in bf16 anyway).
//   matrix:       [num_slots, Hv, dk, dv]        S after the last committed row
//   conv_inputs:  [num_slots, K-1+window, C]     raw conv inputs: the last K-1 committed rows, then the window's draft rows
//   window_k:     [num_slots, window, Hk*dk]     k of the draft rows after conv and SiLU, before normalisation
//   window_v:     [num_slots, window, Hv*dv]     v of the draft rows after conv and SiLU
//   window_gate:  [num_slots, window, Hv, 2]     per head: g (log decay) and beta, float32
// C = 2*Hk*dk + Hv*dv, K = convolution width, window = most draft rows per pass.
struct LinearStateView {
  float* matrix = nullptr;
  void* conv_inputs = nullptr;
  void* window_k = nullptr;
  void* window_v = nullptr;
  float* window_gate = nullptr;
  DType input_dtype = DType::kFloat32;
  int32_t num_slots = 0;
  int32_t window = 0;
  int32_t num_key_heads = 0;    // Hk
  int32_t num_value_heads = 0;  // Hv, a multiple of Hk
  int32_t key_head_dim = 0;     // dk
  int32_t value_head_dim = 0;   // dv
  int32_t conv_width = 0;       // K >= 1

  int32_t conv_channels() const { return 2 * num_key_heads * key_head_dim + num_value_heads * value_head_dim; }
};

}  // namespace bebop
