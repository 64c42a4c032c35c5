// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/draft_losses/draft_losses.h"

// What the float kernels and the double reference share: from the sums of a row to its values, and from these to the few constants of
// its gradient. Internal to the folder and its tests.
namespace bebop::cpu {

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
inline void FinishRow(DraftLoss loss, const RowSums& sums, const LogitNormalizer& target, double draft_max, double draft_sum,
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
  // std::max drops a NaN in its second place, so the sums are asked themselves. One test for all: inf - inf and NaN both stay NaN.
  const double all = sums.overlap + sums.covered + sums.target_log_ratio + sums.draft_log_ratio + sums.target_shifted +
                     sums.draft_shifted + row->loss;
  row->finite = std::isfinite(all);
}

// The four forms of the gradient; all are linear in the row's weight.
enum class GradientForm : uint8_t {
  kDraftMass,     // scale q                      (cross-entropy, before the token's own term)
  kDifference,    // scale (q - p)                (KL)
  kLogRatio,      // q (scale log_ratio - shift)  (reverse KL)
  kCoveredMass,   // q (shift - [q <= p] scale)   (TV, e2e TV, LK)
};
struct GradientPlan {
  GradientForm form = GradientForm::kDraftMass;
  double scale = 0.0;
  double shift = 0.0;
};

inline GradientPlan PlanGradient(DraftLoss loss, const DraftLossRow& row, double weight) {
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

}  // namespace bebop::cpu
