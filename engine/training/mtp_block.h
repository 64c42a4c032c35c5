// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/config/model_config.h"
#include "engine/memory/device_memory.h"
#include "engine/training/mtp_parameters.h"
#include "engine/training/training_ops.h"
#include "kernels/attention/chain_attention.h"
#include "kernels/common/ragged_batch.h"
#include "kernels/common/tensor_view.h"
#include "kernels/linear/packed_matrix.h"

namespace bebop {

// A packed batch of the chains of all bases: row t of a document is the base t. The last token of a document has no next one; its
// row may be there, as in the losses' batches, or left out. Everything is memory of the backend.
struct MtpBatch {
  const DocumentRows* documents = nullptr;  // ascending, every row in one
  int32_t num_documents = 0;
  int64_t num_rows = 0;                   // R
  const uint32_t* token_ids = nullptr;    // [K, R] step k of base t reads x_{t+k}, at k - 1; rows whose chain has left the document
                                          // may have any valid id, as no row that counts reads them
  const int32_t* row_position = nullptr;  // [K, R] the position of that token, t + k
  TensorView target_hidden;               // [R, H] float32: h_t, after the model's final norm
  PackedMatrix embedding;
};

// The MTP layer for training, in float32: the recurrent chain forward with what its backward needs, and that backward
// with gradients through the hidden states of the chain. Embedding, lm_head and the target's hidden states are frozen. Wiring,
// rotation positions and attention are those of drafting (algorithm.md sections 3 and 4): step k of base t attends to the step-1
// entries of its document up to position t + 1 and to its own entries after.
//
// Results do not depend on the thread count. One caller at a time; `ops` must outlive the block.
//
//   block->SetParameters(weights);
//   for (int step = 1; step <= num_steps; ++step) block->ForwardStep(batch, step);
//   ... losses read block->hidden(step), write dhidden[step - 1] ...
//   block->Backward(batch, num_steps, dhidden, gradients);
class MtpBlock {
 public:
  static constexpr int32_t kMaxSteps = 8;

  // For batches of up to `max_rows` rows and `max_steps` steps. UNIMPLEMENTED: head_dim is not a multiple of 16.
  // RESOURCE_EXHAUSTED: not the memory.
  static absl::StatusOr<std::unique_ptr<MtpBlock>> Create(const ModelConfig& config, int64_t max_rows, int32_t max_steps,
                                                          DeviceMemory* memory, TrainingOps* ops);
  // Bytes that Create takes: 4·max_rows·(max_steps·(4H + 5·nq·D + 5·nkv·D + nq + 2F) + 4H + max(F, nq·D) + 1), and two packed copies
  // (one where products read columns) of the matrices; beside them it reserves the operators' operands.
  static int64_t Bytes(const ModelConfig& config, int64_t max_rows, int32_t max_steps, const TrainingOps& ops);
  static int64_t OperandValues(const ModelConfig& config, int64_t max_rows);  // of the largest operand of its products

  const MtpLayout& layout() const { return layout_; }

  // Takes the values of `flat` [layout().total] for the passes to come: packs the matrices, keeps the pointer for the vectors.
  // Call again whenever the values have changed.
  void SetParameters(const float* flat);

  // Step `step` = 1 .. max_steps, in order.
  void ForwardStep(const MtpBatch& batch, int32_t step);
  // [R, H] after mtp.norm, of a step that has run; valid until the next ForwardStep of that step.
  TensorView hidden(int32_t step) const;

  // Adds the gradients of all parameters to `gradients` [layout().total]. dhidden[k-1] [R, H]:
  // the gradient of the loss by hidden(k); overwritten with the whole gradient (chain included). Consumes the saved activations.
  // Rows with no gradient at any step must be zero in all of them.
  void Backward(const MtpBatch& batch, int32_t num_steps, const TensorView* dhidden, float* gradients);

 private:
  // What the backward of a step reads, [max_rows, ...]. projected and gate_up become their gradients.
  struct Saved {
    TensorView fused, attended_stream, mlp_stream, hidden;  // [H] u; u + attention; + mlp; after mtp.norm
    TensorView projected;                                   // [2·nq·D + 2·nkv·D] q and gate | k | v
    TensorView query, key;                                  // after norm and rotation
    TensorView attended, gated;                             // [nq·D] before and after the gate
    TensorView log_sum;                                     // [nq]
    TensorView gate_up;                                     // [2F]
    TensorView dkey, dvalue;                                // [nkv·D]
  };
  struct Packed {
    PackedMatrix forward, transposed;
    char* forward_data = nullptr;
    char* transposed_data = nullptr;
  };
  // Everything that lies in one allocation, from `base` on. Without memory (base null) only `bytes` means something.
  struct Arrays {
    Arrays(const ModelConfig& config, int64_t max_rows, int32_t max_steps, const TrainingOps& ops, char* base);

    int64_t bytes = 0;
    std::vector<Saved> saved;  // [max_steps]
    TensorView pair, embedded, stream, wide;  // scratch: [2H], [H], [H], [max(F, nq·D)]
    Packed fc, qkv, out, gate_up, down;
    int32_t* row_sequence = nullptr;  // zeros: all rows belong to *sequence
    SequenceRows* sequence = nullptr;
  };

  MtpBlock(const ModelConfig& config, int64_t max_rows, int32_t max_steps, TrainingOps* ops);
  Saved RowsOf(int32_t step, int64_t rows) const;
  // pair <- the two normed halves of the input of step `step`; embedded <- the embeddings.
  void MakeInput(const MtpBatch& batch, int32_t step, const TensorView& embedded, const TensorView& pair);
  void Norm(const TensorView& x, int64_t weight, const TensorView& out);
  void NormBackward(const TensorView& x, int64_t weight, const TensorView& dy, const TensorView& dx, bool accumulate,
                    float* gradients);
  void MatMul(const TensorView& x, const PackedMatrix& w, const TensorView& y);
  void WeightGradient(const TensorView& x, const TensorView& dy, const TensorView& dw);

  const ModelConfig config_;
  const MtpLayout layout_;
  const int64_t max_rows_;
  const int32_t max_steps_;
  TrainingOps& ops_;
  std::shared_ptr<void> storage_;
  Arrays arrays_;
  const float* parameters_ = nullptr;
};

}  // namespace bebop
