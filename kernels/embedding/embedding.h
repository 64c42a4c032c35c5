// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/stream.h"
#include "kernels/common/tensor_view.h"
#include "kernels/common/thread_pool.h"
#include "kernels/linear/packed_matrix.h"

namespace bebop {

// out[t] = table[token_ids[t]].
//   token_ids: [T], each < table.rows (validated at the edge; checked here with BEBOP_DCHECK)
//   table: [V, H] packed (shared with lm_head when embeddings are tied)
//   out: [T, H] float32
struct EmbeddingArgs {
  const uint32_t* token_ids = nullptr;
  PackedMatrix table;
  TensorView out;
};

namespace cpu {
void Embedding(const EmbeddingArgs& args, ThreadPool& pool);
}  // namespace cpu

namespace cuda {
// Enqueues the same on the device: table in rows (MatrixLayout::kRows), out float32 or bf16. Ids out of range give zeros.
void Embedding(const EmbeddingArgs& args, Stream& stream);
}  // namespace cuda
}  // namespace bebop
