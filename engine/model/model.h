// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/config/model_config.h"
#include "engine/memory/model_state.h"
#include "engine/weights/model_weights.h"
#include "kernels/common/ragged_batch.h"
#include "kernels/common/tensor_view.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

class Workspace;

// A private MTP chain (teacher-forced depth > 1): keys and values of earlier depths, one entry a row. See AttentionArgs.
struct MtpChain {
  int32_t num_entries = 0;             // chain entries including this step's own
  const TensorView* k = nullptr;       // [num_entries]; the last is written by this step
  const TensorView* v = nullptr;
};

// The Qwen3.5 dense target and its MTP layer as short forward functions over a ragged batch (model.md sections 2 and 4).
// Backend: CPU. Owns its activation workspace, sized at construction; a forward pass allocates nothing.
// Not thread safe: one caller at a time (the engine thread).
class Model {
 public:
  // `weights` and `pool` must outlive the model; weights may be replaced between two passes (SetWeights). `max_rows`: most rows of
  // a pass. REQUIRES: weights match config.
  Model(const ModelConfig& config, int32_t max_rows, ThreadPool* pool);
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  void SetWeights(const ModelWeights* weights);

  // Target pass over all rows of `batch`: token_ids [T] -> hidden [T, H] float32, after the model's final norm.
  // Writes KV pages and recurrent states as RaggedBatch says. The batch's row maps may be null.
  void ForwardTarget(const uint32_t* token_ids, const RaggedBatch& batch, const ModelState& state, TensorView hidden);

  // One MTP step over all rows. Row t: `previous_hidden` row t is the target's post-norm hidden state h_t (draft step 1, extend) or the
  // MTP layer's own output of the previous step; next_token_ids[t] is the token at the row's position. row_position[t] is the
  // position of that *next* token (t+1 of model.md section 4), which is also its index in the MTP cache; the cache starts at
  // index 1. hidden_out: [T, H] after mtp.norm; must not alias previous_hidden. Recurrent state fields of `batch` are ignored.
  void ForwardMtp(const uint32_t* next_token_ids, const RaggedBatch& batch, const TensorView& previous_hidden,
                  const ModelState& state, const MtpChain* chain, TensorView hidden_out);

  // logits [R, V] float32 = lm_head · hidden [R, H]. REQUIRES: R <= max_rows.
  void Logits(const TensorView& hidden, TensorView logits);

 private:
  const ModelConfig config_;
  const ModelWeights* weights_ = nullptr;
  ThreadPool* const pool_;
  const std::unique_ptr<Workspace> workspace_;
};

}  // namespace bebop
