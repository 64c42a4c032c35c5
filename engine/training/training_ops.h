// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <limits>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/config/model_config.h"
#include "engine/runtime/backend.h"
#include "kernels/adamw/adamw.h"
#include "kernels/attention/chain_attention.h"
#include "kernels/common/dtype.h"
#include "kernels/common/stream.h"
#include "kernels/common/thread_pool.h"
#include "kernels/draft_losses/draft_losses.h"
#include "kernels/embedding/embedding.h"
#include "kernels/linear/linear.h"
#include "kernels/linear/linear_backward.h"
#include "kernels/qk_norm_rope/qk_norm_rope.h"
#include "kernels/qk_norm_rope/qk_norm_rope_backward.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/rms_norm/rms_norm_backward.h"
#include "kernels/swiglu/swiglu.h"
#include "kernels/swiglu/swiglu_backward.h"

namespace bebop {

// The operators of a training step on one backend, beside engine/model/ops.h, which has those of the frozen target: the one place of
// engine/training where a backend is chosen. Contracts are those of the kernels' headers. Activations and gradients are float32 on
// every backend; on a device products round their operands to bf16 and accumulate in float32, and a call enqueues and returns
// (SquaredNorm and BatchLoss wait). All pointers are memory of the backend (DeviceMemory), unless a comment says host. One caller at a
// time.
class TrainingOps {
 public:
  virtual ~TrainingOps() = default;

  // OK when the operators take this model with weights of `weight_dtype`; else UNIMPLEMENTED names the key, its value and what is
  // needed.
  virtual absl::Status CheckModel(const ModelConfig& config, DType weight_dtype) const = 0;
  // Most rows of a batch that the operators take, whatever the memory.
  virtual int64_t MaxRows(const ModelConfig& config) const {
    (void)config;
    return std::numeric_limits<int64_t>::max();
  }

  // Makes room for copies of operands of up to `values` floats, padding included, which products read: rearranged on the CPU,
  // rounded to bf16 on a device. Enough for every product to come. RESOURCE_EXHAUSTED: not the memory.
  virtual absl::Status ReserveOperands(int64_t values) = 0;
  virtual int64_t OperandBytes(int64_t values) const = 0;  // that it takes

  // Products. A trained or frozen matrix W [rows, cols], float32 in rows, is packed once a change and then read as often as wanted.
  virtual int64_t PackedMatrixBytes(int64_t rows, int64_t cols) const = 0;
  virtual PackedMatrix Pack(const TensorView& w, void* destination) = 0;            // of W
  virtual PackedMatrix PackTransposed(const TensorView& w, void* destination) = 0;  // of Wᵀ [cols, rows]: dx = Linear(dy, Wᵀ)
  // Whether Linear also takes a matrix that lies as its transpose (MatrixLayout::kColumns): then what was packed as W, and a
  // weight of the target, serve as Wᵀ without a second copy.
  virtual bool reads_columns() const { return false; }
  virtual void Linear(const LinearArgs& args) = 0;
  virtual void LinearBackwardWeight(const LinearBackwardWeightArgs& args) = 0;

  virtual void Embedding(const EmbeddingArgs& args) = 0;
  virtual void RmsNorm(const RmsNormArgs& args) = 0;
  virtual void RmsNormBackward(const RmsNormBackwardArgs& args) = 0;
  virtual void SwiGlu(const SwiGluArgs& args) = 0;
  virtual void SwiGluBackward(const SwiGluBackwardArgs& args) = 0;
  virtual void QkNormRope(const QkNormRopeArgs& args) = 0;
  virtual void QkNormRopeBackward(const QkNormRopeBackwardArgs& args) = 0;
  virtual void ChainAttention(const ChainAttentionArgs& args) = 0;
  virtual void ChainAttentionBackward(const ChainAttentionBackwardArgs& args) = 0;
  // Row by row, as columns may be a part of wider rows. Same shape, no overlap.
  virtual void Copy(const TensorView& from, const TensorView& to) = 0;
  virtual void Clear(const TensorView& view) = 0;

  // Losses over logits of logits_dtype(): kFloat32 on the CPU, kBFloat16 on a device.
  virtual DType logits_dtype() const = 0;
  virtual void Normalize(const TensorView& logits, LogitNormalizer* normalizers) = 0;
  virtual void DraftLossForward(const DraftLossArgs& args) = 0;
  virtual void DraftLossBackward(const DraftLossGradientArgs& args) = 0;
  // Writes args.row_weights; waits for and returns the rest.
  virtual ChainLossResult BatchLoss(const ChainLossArgs& args) = 0;

  // Σ values[i]² over `count` floats in double, in an order that `count` alone decides. Not finite when a value is not.
  virtual double SquaredNorm(const float* values, int64_t count) = 0;
  virtual void AdamWUpdate(const AdamWArgs& args) = 0;
};

// The operators of a backend, on its stream where it has one. Both pointers must outlive them. Errors: of MakeCudaTrainingOps.
absl::StatusOr<std::unique_ptr<TrainingOps>> MakeTrainingOps(Backend* backend, ThreadPool* pool);
// `pool` must outlive it.
std::unique_ptr<TrainingOps> MakeCpuTrainingOps(ThreadPool* pool);
// `stream` must outlive it. Only in builds with CUDA. RESOURCE_EXHAUSTED: not the memory. INTERNAL: the device failed.
absl::StatusOr<std::unique_ptr<TrainingOps>> MakeCudaTrainingOps(cuda::Stream* stream);

}  // namespace bebop
