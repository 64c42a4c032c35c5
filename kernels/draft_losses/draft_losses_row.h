// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/draft_losses/draft_losses.h"

// What the CPU's kernels, the device's and the double reference share: from the sums of a row to its values, and from these to
// the few constants of its gradient; and one chain. Constexpr, so that device code may call it. Internal to the folder and its
// tests.
namespace bebop::draft_losses {

// A row whose largest logit is not within ± this is refused. Below it, kLowest lies under every maximum, so that it may stand for
// "none yet" and for columns beyond the vocabulary's end.
inline constexpr float kLargestLogit = 1e29f, kLowest = -1e30f;

// Sums over the vocabulary of pass 2. `log_ratio` is log(q/p).
struct RowSums {
  double overlap = 0.0;           // Σ min(p, q)
  double covered = 0.0;           // Σ [q <= p] q
  double target_log_ratio = 0.0;  // Σ p log_ratio
  double draft_log_ratio = 0.0;   // Σ q log_ratio
  double target_shifted = 0.0;    // Σ p (y - max y)
  double draft_shifted = 0.0;     // Σ q (z - max z)
};

// Fills everything but row->draft. `token_logit`: z(x), read for cross-entropy alone.
constexpr void FinishRow(DraftLoss loss, const RowSums& sums, const LogitNormalizer& target, double draft_max, double draft_sum,
                      double token_logit, DraftLossRow* row) {
  row->acceptance = std::min(sums.overlap, 1.0);
  row->covered_mass = std::min(sums.covered, 1.0);
  row->kl = std::max(0.0, -sums.target_log_ratio);
  row->reverse_kl = std::max(0.0, sums.draft_log_ratio);
  row->target_entropy = std::max(0.0, std::log(target.sum) - sums.target_shifted);
  row->draft_entropy = std::max(0.0, std::log(draft_sum) - sums.draft_shifted);
  switch (loss) {
    case DraftLoss::kCrossEntropy:
      row->loss = std::log(draft_sum) - (token_logit - draft_max);
      break;
    case DraftLoss::kKl:
      row->loss = row->kl;
      break;
    case DraftLoss::kReverseKl:
      row->loss = row->reverse_kl;
      break;
    case DraftLoss::kTotalVariation:
    case DraftLoss::kEndToEndTotalVariation:
      row->loss = 1.0 - row->acceptance;
      break;
    case DraftLoss::kLk:
      row->loss = -std::log(std::max(row->acceptance, kLkSmallestAcceptance));
      break;
  }
  // std::max drops a NaN in its second place, so the sums are asked themselves.
  const double all = sums.overlap + sums.covered + sums.target_log_ratio + sums.draft_log_ratio + sums.target_shifted +
                     sums.draft_shifted + row->loss;
  row->finite = all - all == 0.0;  // inf - inf is NaN
}

// One chain of ChainLoss: writes its weights, returns its part of the loss.
constexpr ChainLossResult FinishChain(const ChainLossArgs& args, int64_t base) {
  const int64_t num_bases = args.num_bases;
  const int32_t count = args.steps[base];
  const DraftLossRow* const rows = args.rows + base;
  double* const weights = args.row_weights + base;
  ChainLossResult result;
  for (int32_t k = 0; k < args.num_steps; ++k) {
    weights[k * num_bases] = k < count ? args.scale : 0.0;
    if (k >= count) continue;
    result.finite = result.finite && rows[k * num_bases].finite;
    result.loss += args.scale * rows[k * num_bases].loss;
  }
  if (args.loss != DraftLoss::kEndToEndTotalVariation || count == 0) return result;
  // Σ_{j>=i} Π_{k<=j, k≠i} α_k = (Π_{k<i} α_k) · r_i with r_K = 1, r_i = 1 + α_{i+1} r_{i+1}.
  double tail = 1.0;
  for (int32_t k = count - 1; k >= 0; --k) {
    weights[k * num_bases] = args.scale / args.num_steps * tail;
    tail = 1.0 + rows[k * num_bases].acceptance * tail;
  }
  double reached = 1.0, drafts = 0.0;
  for (int32_t k = 0; k < count; ++k) {
    weights[k * num_bases] *= reached;
    reached *= rows[k * num_bases].acceptance;
    drafts += reached;
  }
  result.loss = args.scale * (1.0 - drafts / args.num_steps);
  return result;
}

// The four forms of the gradient; all are linear in the row's weight.
enum class GradientForm : uint8_t {
  kDraftMass,    // scale q                      (cross-entropy, before the token's own term)
  kDifference,   // scale (q - p)                (KL)
  kLogRatio,     // q (scale log_ratio - shift)  (reverse KL)
  kCoveredMass,  // q (shift - [q <= p] scale)   (TV, e2e TV, LK)
};
struct GradientPlan {
  GradientForm form = GradientForm::kDraftMass;
  double scale = 0.0;
  double shift = 0.0;
};

constexpr GradientPlan PlanGradient(DraftLoss loss, const DraftLossRow& row, double weight) {
  switch (loss) {
    case DraftLoss::kCrossEntropy:
      return {GradientForm::kDraftMass, weight, 0.0};
    case DraftLoss::kKl:
      return {GradientForm::kDifference, weight, 0.0};
    case DraftLoss::kReverseKl:
      return {GradientForm::kLogRatio, weight, weight * row.reverse_kl};
    case DraftLoss::kTotalVariation:
    case DraftLoss::kEndToEndTotalVariation:
      break;
    case DraftLoss::kLk:
      weight = row.acceptance < kLkSmallestAcceptance ? 0.0 : weight / row.acceptance;
      break;
  }
  return {GradientForm::kCoveredMass, weight, weight * row.covered_mass};
}

}  // namespace bebop::draft_losses
