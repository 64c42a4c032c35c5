// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/config/model_config.h"
#include "engine/runtime/backend.h"
#include "engine/training/optimizer.h"
#include "engine/training/training_data.h"
#include "engine/training/training_ops.h"
#include "engine/weights/model_weights.h"
#include "kernels/common/dtype.h"
#include "kernels/draft_losses/draft_losses.h"

namespace bebop {

// The ranges of options, for whoever checks them before a trainer is made, under names of its own.
struct TrainerLimits {
  static constexpr double kLearningRate = 1.0;
  static constexpr double kWeightDecay = 1e6;
  static constexpr double kClipNorm = 1e30;
  static constexpr int64_t kBatchTokens = int64_t{1} << 24;
  // Of a batch, and of a document that is trained on: one base whose chain's targets are all there.
  static constexpr int32_t LeastTokens(int32_t num_steps_ahead) { return num_steps_ahead + 2; }
};

struct TrainerOptions {
  DraftLoss loss = DraftLoss::kEndToEndTotalVariation;
  int32_t num_steps_ahead = 5;  // K: steps of the chain, forward and backward; 1 .. 8
  int64_t batch_tokens = 2048;  // most rows of a batch
  // Rows of logits that exist at a time, targets and drafts of all steps; >= 2K; 0: as many as fit in 32 MiB, on a device 2 GiB.
  int64_t chunk_rows = 0;
  // An experiment of the paper (Fig. 14b), not for use: p and q are restricted to the target's K largest logits of a place and
  // renormalised; 0: full vocabulary. All that is reported is of the restricted distributions, evaluations included: α is then
  // larger than that of decoding, and no number compares with a run over the full vocabulary.
  int32_t truncate_top_k = 0;
  OptimizerOptions optimizer;
};

// What a batch came to. Means are over its terms (chains for e2e TV, else single steps that count). Which places count depends on
// the loss (BatchPlan): cross-entropy has one target less a document, e2e TV only whole chains. So numbers of two losses are means
// over slightly different places, also of the same data.
struct TrainingReport {
  int64_t step = 0;  // of the optimizer, after it; 0 for an evaluation
  double loss = 0.0;
  std::vector<double> acceptance;  // [K] mean α_k = Σ min(p, q) of chain step k, teacher-forced
  double target_entropy = 0.0;     // nats; means over the counted rows of all steps
  double draft_entropy = 0.0;
  double kl = 0.0;             // KL(p‖q)
  double gradient_norm = 0.0;  // before clipping; 0 for an evaluation
  double learning_rate = 0.0;
  int64_t tokens = 0;         // rows of the batch
  int64_t terms = 0;          // what the means are over: batches are combined with it
  std::vector<int64_t> rows;  // [K] counted rows of chain step k
  double seconds = 0.0;
  double gemm_flops = 0.0;  // of all matrix products, target pass included (docs/training.md)
};

// Trains the MTP layer of a checkpoint against its frozen target (algorithm.md section 4, architecture.md section 7): one batch,
// one step. The target runs as it is served: hidden states and p come from `weights` in their dtype, once a batch. The MTP
// layer's float32 master weights, gradients and moments live here.
//
// Deterministic: the bits of every result depend on the arguments, the data and the instruction set, not on threads or time.
// One caller at a time. All pointers must outlive the trainer.
class MtpTrainer {
 public:
  // `parameters`: initial weights in the order of MtpLayout, host memory. INVALID_ARGUMENT: an option out of its range, with both
  // values. UNIMPLEMENTED: see MtpBlock. RESOURCE_EXHAUSTED: not the memory, with the bytes by part.
  static absl::StatusOr<std::unique_ptr<MtpTrainer>> Create(const ModelConfig& config, const ModelWeights* weights,
                                                            Backend* backend, TrainingOps* ops, const TrainerOptions& options,
                                                            std::span<const float> parameters);
  virtual ~MtpTrainer() = default;
  // Bytes beside the target's weights, by the formula of docs/training.md.
  static int64_t Bytes(const ModelConfig& config, const TrainerOptions& options, DType weight_dtype, const Backend& backend,
                       const TrainingOps& ops);

  // One optimizer step over the batch; none when nothing in the batch counts (terms 0). An error leaves the parameters as they
  // were. DATA_LOSS: the loss or the gradient is not finite; says which, the first chain that is not, and the lines of the batch's
  // documents. INVALID_ARGUMENT: more than batch_tokens rows. INTERNAL: the device failed.
  virtual absl::StatusOr<TrainingReport> Step(std::span<const TrainingDocument* const> batch) = 0;
  // The same quantities with the weights as they are, and no step. Errors as there.
  virtual absl::StatusOr<TrainingReport> Evaluate(std::span<const TrainingDocument* const> batch) = 0;

  // What a checkpoint holds, in host memory, in the order of MtpLayout.
  struct State {
    int64_t step = 0;
    std::vector<float> parameters, first_moment, second_moment;
  };
  virtual State state() = 0;
  virtual void SetState(const State& state) = 0;
  virtual const MtpLayout& layout() const = 0;
};

}  // namespace bebop
