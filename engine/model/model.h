// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "engine/config/model_config.h"
#include "engine/memory/device_memory.h"
#include "engine/memory/model_state.h"
#include "engine/model/ops.h"
#include "engine/weights/model_weights.h"
#include "kernels/common/ragged_batch.h"
#include "kernels/common/tensor_view.h"

namespace bebop {

class Workspace;

// A private MTP chain (teacher-forced depth > 1): keys and values of earlier depths, one entry a row. See AttentionArgs.
struct MtpChain {
  int32_t num_entries = 0;             // chain entries including this step's own
  const TensorView* k = nullptr;       // [num_entries]; the last is written by this step
  const TensorView* v = nullptr;
};

// The Qwen3.5 dense target and its MTP layer as short forward functions over a ragged batch (model.md sections 2 and 4).
// The backend is that of `ops` and `memory`: on a device all arguments' data, row maps and token ids are device memory, and a pass only
// enqueues. Owns its activation workspace, sized at construction; a forward pass allocates and copies nothing.
// Not thread safe: one caller at a time (the engine thread).
class Model {
 public:
  // `max_rows`: most rows of a pass. `activation_dtype`: of hidden states and everything between the operators but the residual stream,
  // which is float32: kFloat32 on the CPU, the weights' dtype on a device. `ops` and `memory` must outlive the model.
  // RESOURCE_EXHAUSTED when the workspace cannot be had.
  static absl::StatusOr<std::unique_ptr<Model>> Create(const ModelConfig& config, int32_t max_rows, DType activation_dtype, Ops* ops,
                                                       DeviceMemory* memory);
  // Bytes that Create takes.
  static int64_t ActivationBytes(const ModelConfig& config, int32_t max_rows, DType activation_dtype);
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  // Before the first pass, and between any two: `weights` must match the config and outlive its passes.
  void SetWeights(const ModelWeights* weights);

  DType activation_dtype() const { return activation_dtype_; }

  // Target pass over all rows of `batch`: token_ids [T] -> hidden [T, H] in the activation dtype, after the model's final norm.
  // Writes KV pages and recurrent states as RaggedBatch says. On the CPU the batch's row maps may be null.
  void ForwardTarget(const uint32_t* token_ids, const RaggedBatch& batch, const ModelState& state, TensorView hidden);

  // One MTP step over all rows. Row t: `previous_hidden` row t is the target's post-norm hidden state h_t (draft step 1, extend) or the
  // MTP layer's own output of the previous step; next_token_ids[t] is the token at the row's position. row_position[t] is the
  // position of that *next* token (t+1 of model.md section 4), which is also its index in the MTP cache; the cache starts at
  // index 1. hidden_out: [T, H] after mtp.norm, activation dtype; must not alias previous_hidden. Recurrent state fields of `batch` are ignored.
  void ForwardMtp(const uint32_t* next_token_ids, const RaggedBatch& batch, const TensorView& previous_hidden,
                  const ModelState& state, const MtpChain* chain, TensorView hidden_out);

  // logits [R, V] float32 = lm_head · hidden [R, H]. REQUIRES: R <= max_rows.
  void Logits(const TensorView& hidden, TensorView logits);

 private:
  Model(const ModelConfig& config, DType activation_dtype, Ops* ops, std::unique_ptr<Workspace> workspace);

  const ModelConfig config_;
  const DType activation_dtype_;
  Ops& ops_;
  const std::unique_ptr<Workspace> workspace_;
  const ModelWeights* weights_ = nullptr;
};

}  // namespace bebop
