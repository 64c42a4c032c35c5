// SPDX-License-Identifier: Apache-2.0
#include "kernels/draft_losses/draft_losses_reference.h"

#include <algorithm>
#include <cmath>

#include "kernels/common/check.h"
#include "kernels/draft_losses/draft_losses_row.h"

namespace bebop::reference {
namespace {

struct Normalizer {
  double max = 0.0, sum = 0.0;
};

Normalizer Normalize(std::span<const double> logits) {
  Normalizer out{*std::max_element(logits.begin(), logits.end()), 0.0};
  for (const double logit : logits) out.sum += std::exp(logit - out.max);
  return out;
}

struct Pair {
  double draft_prob, target_prob, log_ratio;
};

Pair MakePair(double draft_logit, double target_logit, const Normalizer& draft, const Normalizer& target) {
  const double draft_shifted = draft_logit - draft.max, target_shifted = target_logit - target.max;
  return {std::exp(draft_shifted) / draft.sum, std::exp(target_shifted) / target.sum,
          (draft_shifted - target_shifted) - (std::log(draft.sum) - std::log(target.sum))};
}

}  // namespace

DraftLossRow DraftLossForward(DraftLoss loss, std::span<const double> draft, std::span<const double> target, uint32_t token) {
  BEBOP_CHECK(!draft.empty() && draft.size() == target.size());
  const Normalizer draft_normalizer = Normalize(draft), target_normalizer = Normalize(target);
  draft_losses::RowSums sums;
  for (size_t v = 0; v < draft.size(); ++v) {
    const Pair pair = MakePair(draft[v], target[v], draft_normalizer, target_normalizer);
    sums.overlap += std::min(pair.draft_prob, pair.target_prob);
    sums.covered += pair.draft_prob <= pair.target_prob ? pair.draft_prob : 0.0;
    sums.target_log_ratio += pair.target_prob * pair.log_ratio;
    sums.draft_log_ratio += pair.draft_prob * pair.log_ratio;
    sums.target_shifted += pair.target_prob * (target[v] - target_normalizer.max);
    sums.draft_shifted += pair.draft_prob * (draft[v] - draft_normalizer.max);
  }
  DraftLossRow row;
  row.draft = {draft_normalizer.sum, static_cast<float>(draft_normalizer.max), true};
  const LogitNormalizer target_out{target_normalizer.sum, static_cast<float>(target_normalizer.max), true};
  const double token_logit = loss == DraftLoss::kCrossEntropy ? draft[token] : 0.0;
  draft_losses::FinishRow(loss, sums, target_out, draft_normalizer.max, draft_normalizer.sum, token_logit, &row);
  return row;
}

void DraftLossBackward(DraftLoss loss, std::span<const double> draft, std::span<const double> target, uint32_t token,
                       double weight, std::span<double> gradient) {
  BEBOP_CHECK(gradient.size() == draft.size());
  const DraftLossRow row = DraftLossForward(loss, draft, target, token);
  const Normalizer draft_normalizer = Normalize(draft), target_normalizer = Normalize(target);
  const draft_losses::GradientPlan plan = draft_losses::PlanGradient(loss, row, weight);
  for (size_t v = 0; v < draft.size(); ++v) {
    const Pair pair = MakePair(draft[v], target[v], draft_normalizer, target_normalizer);
    switch (plan.form) {
      case draft_losses::GradientForm::kDraftMass:
        gradient[v] = plan.scale * (pair.draft_prob - (v == token ? 1.0 : 0.0));
        break;
      case draft_losses::GradientForm::kDifference:
        gradient[v] = plan.scale * (pair.draft_prob - pair.target_prob);
        break;
      case draft_losses::GradientForm::kLogRatio:
        gradient[v] = pair.draft_prob * (plan.scale * pair.log_ratio - plan.shift);
        break;
      case draft_losses::GradientForm::kCoveredMass:
        gradient[v] = pair.draft_prob * (plan.shift - (pair.draft_prob <= pair.target_prob ? plan.scale : 0.0));
        break;
    }
  }
}

}  // namespace bebop::reference
