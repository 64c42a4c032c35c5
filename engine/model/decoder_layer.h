// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "engine/config/model_config.h"
#include "engine/model/activations.h"
#include "engine/model/model.h"
#include "engine/model/ops.h"
#include "engine/weights/model_weights.h"
#include "kernels/common/ragged_batch.h"
#include "kernels/common/tensor_view.h"

namespace bebop {

// What every block of one forward pass shares. Borrowed; lives on the stack of the pass.
struct Pass {
  const ModelConfig& config;
  const RaggedBatch& batch;  // with row maps
  const Activations& act;
  Ops& ops;
};

// Where a full-attention layer keeps its keys and values. The MTP layer's entries start at index 1, and its teacher-forced
// depths put theirs into a private chain.
struct AttentionCache {
  KvPagesView pages;
  int32_t first_index = 0;
  const MtpChain* chain = nullptr;
};

// One pre-norm decoder layer (model.md section 2): h += mixer(norm(h)); h += mlp(norm(h)), where h is pass.act.stream.
//
// The sum of a block and the stream happens inside the norm that reads it next. So a layer takes in `update`, what the layer before
// has yet to add (no data for the first layer), and returns its own, which the next layer or the final norm adds.
TensorView FullAttentionLayer(const Pass& pass, const LayerWeights& weights, const AttentionCache& cache, TensorView update);
TensorView LinearAttentionLayer(const Pass& pass, const LayerWeights& weights, const LinearStateView& state, TensorView update);

}  // namespace bebop
