// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

#include "kernels/common/cpu_features.h"
#include "kernels/common/stream.h"
#include "kernels/common/tensor_view.h"
#include "kernels/common/thread_pool.h"

// The losses that train an MTP layer against a frozen target (algorithm.md section 4; arXiv 2606.12370 for e2e TV, arXiv
// 2602.23881 for LK), over the full vocabulary, without ever storing a probability.
//
// Per row, z are the draft's logits and y the target's; q = softmax(z), p = softmax(y), x the data token, all at temperature 1:
//
//   loss                        value                    gradient with respect to z_j
//   kCrossEntropy               -log q(x)                q_j - [j = x]
//   kKl                         Σ p log(p/q)             q_j - p_j
//   kReverseKl                  Σ q log(q/p)             q_j (log(q_j/p_j) - value)
//   kTotalVariation             1 - α, α = Σ min(p, q)   -q_j ([q_j <= p_j] - S), S = Σ_v [q_v <= p_v] q_v
//   kEndToEndTotalVariation     1 - α (per row)          as kTotalVariation; ChainLoss makes the weights of the rows
//   kLk                         -log max(α, 1e-6)        that of kTotalVariation over α; 0 where α < 1e-6
//
// A batch of T bases (packed documents) and K chain steps takes three passes over the logits, any number of rows at a time, so
// that logits need not exist for more rows than that:
//   1. Normalize        target rows, once: largest logit and Σ exp.
//   2. DraftLossForward the same for each draft row, then value, α, S and the quantities that are reported.
//      ChainLoss        (no vocabulary) the loss of the batch and the weight of every row in its gradient.
//   3. DraftLossBackward gradient rows, over the draft's logits if wanted.
//
// Example, for step k of a chunk of bases [first, first + n) of one batch:
//   cpu::Normalize(target, normalizers, pool);                                                  // once for all steps
//   cpu::DraftLossForward({loss, draft, target, normalizers, target_rows, tokens, rows}, pool);  // target row first + i + k
//   const ChainLossResult result = ChainLoss({loss, T, K, all_rows, steps, scale, weights});     // after all steps and chunks
//   cpu::DraftLossBackward({{loss, draft, target, ...}, weights + ..., draft}, pool);
//
// Rows that are equal in p and q have α = 1 and the gradient 0 up to rounding: [q <= p] holds at ties, a valid subgradient.
namespace bebop {

enum class DraftLoss : uint8_t { kCrossEntropy, kKl, kReverseKl, kTotalVariation, kEndToEndTotalVariation, kLk };

// Below this α the LK loss is flat (algorithm.md section 4).
inline constexpr double kLkSmallestAcceptance = 1e-6;

// softmax(logits)_v = exp(logits_v - max) / sum. `finite`: every logit is finite, and the largest within ±1e29; otherwise the
// rest is unspecified.
struct LogitNormalizer {
  double sum = 1.0;
  float max = 0.0f;
  bool finite = false;
};

// What the forward pass finds in a row, in nats where logarithmic. A masked row (target_rows[i] < 0) is all zeros and `finite`.
// `finite` is false when a logit of either side, or a result, is not: the row is then unusable and training must stop.
struct DraftLossRow {
  LogitNormalizer draft;
  double loss = 0.0;            // the row's own value, as in the table
  double acceptance = 0.0;      // α = Σ min(p, q) <= 1
  double covered_mass = 0.0;    // S
  double kl = 0.0;              // KL(p‖q)
  double reverse_kl = 0.0;      // KL(q‖p)
  double target_entropy = 0.0;  // H(p)
  double draft_entropy = 0.0;   // H(q)
  bool finite = true;
};

struct DraftLossArgs {
  DraftLoss loss = DraftLoss::kTotalVariation;
  TensorView draft;                                     // z: [R, V] float32 (on the device also bf16), V >= 1
  TensorView target;                                    // y: [N, V], as `draft`
  const LogitNormalizer* target_normalizers = nullptr;  // [N], of `target`
  const int32_t* target_rows = nullptr;                 // [R]: the row of `target` that judges this draft row; < 0: masked
  const uint32_t* tokens = nullptr;                     // [R]: the data token; cross-entropy alone reads it, at rows not masked
  DraftLossRow* rows = nullptr;                         // [R]: the forward pass writes it, the backward pass reads it
};

struct DraftLossGradientArgs {
  DraftLossArgs forward;                // as the forward pass had it
  const double* row_weights = nullptr;  // [R]: d(loss of the batch) / d(loss of the row); 0 makes a row of zeros
  TensorView gradient;                  // [R, V]; may be `forward.draft` itself, otherwise no overlap
};

// Steps of the chains of T packed rows that count. `document_starts`: ascending, first 0, last T, one more than documents.
// Document row t of n judges step k = 1..K of its chain by target row t + k, which must be one of its n rows; cross-entropy also
// needs the token that follows that row. steps[t] = how many steps do, at most `num_steps`; for kEndToEndTotalVariation all or 0.
void ChainSteps(DraftLoss loss, int32_t num_steps, std::span<const int32_t> document_starts, std::span<int32_t> steps);

// Terms of the mean: chains with steps for kEndToEndTotalVariation, otherwise single steps.
int64_t NumChainTerms(DraftLoss loss, std::span<const int32_t> steps);

struct ChainLossArgs {
  DraftLoss loss = DraftLoss::kTotalVariation;
  int32_t num_bases = 0;               // T
  int32_t num_steps = 0;               // K >= 1 (γ of the training chain)
  const DraftLossRow* rows = nullptr;  // [K, T]: step k of base t at k · T + t
  const int32_t* steps = nullptr;      // [T], of ChainSteps; a caller may set more of them to 0 (prompts)
  double scale = 1.0;                  // of the loss and all weights: usually 1 / NumChainTerms of the whole batch
  double* row_weights = nullptr;       // [K, T], written: 0 for steps that do not count
};

struct ChainLossResult {
  double loss = 0.0;   // scale · Σ over the terms
  bool finite = true;  // of all rows that count
};

// kEndToEndTotalVariation: each chain adds 1 - (1/K) Σ_{j<=K} Π_{i<=j} α_i, and row i of it has the weight
// (1/K) Σ_{j>=i} Π_{k<=j, k≠i} α_k, computed without a division (α may be 0). Others: each step that counts adds its row's loss
// with weight 1.
ChainLossResult ChainLoss(const ChainLossArgs& args);

namespace cpu {
// Rows are independent: a row's result depends on its logits and the instruction set, not on the rows or threads beside it.
// Exponentials are float: within (1.5 |logit - max| + 5) 2^-24, and 0 under 2^-80. Sums are float over at most 16 values of a
// lane, then double.
void Normalize(const TensorView& logits, LogitNormalizer* normalizers, ThreadPool& pool);
void DraftLossForward(const DraftLossArgs& args, ThreadPool& pool);
void DraftLossBackward(const DraftLossGradientArgs& args, ThreadPool& pool);

// The same with a chosen instruction set (tests). REQUIRES: the processor has it.
void NormalizeWith(InstructionSet set, const TensorView& logits, LogitNormalizer* normalizers, ThreadPool& pool);
void DraftLossForwardWith(InstructionSet set, const DraftLossArgs& args, ThreadPool& pool);
void DraftLossBackwardWith(InstructionSet set, const DraftLossGradientArgs& args, ThreadPool& pool);
}  // namespace cpu

namespace cuda {
// The same on the device, enqueued; everything the arguments point to is device memory. Logits and gradient are float32 or bf16,
// each in its own dtype, in rows of whole 8 values aligned to 16 bytes; values of target_rows, tokens and steps are not checked.
// Sums are float over 8 neighbours, then double, in an order that depends on V alone. `result` is one struct.
void Normalize(const TensorView& logits, LogitNormalizer* normalizers, Stream& stream);
void DraftLossForward(const DraftLossArgs& args, Stream& stream);
void ChainLoss(const ChainLossArgs& args, ChainLossResult* result, Stream& stream);
void DraftLossBackward(const DraftLossGradientArgs& args, Stream& stream);
}  // namespace cuda

}  // namespace bebop
