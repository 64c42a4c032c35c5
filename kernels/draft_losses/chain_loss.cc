// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "kernels/common/check.h"
#include "kernels/draft_losses/draft_losses.h"

namespace bebop {

void ChainSteps(DraftLoss loss, int32_t num_steps, std::span<const int32_t> document_starts, std::span<int32_t> steps) {
  BEBOP_CHECK(num_steps >= 1 && !document_starts.empty() && document_starts.front() == 0);
  BEBOP_CHECK(document_starts.back() == static_cast<int32_t>(steps.size()));
  for (size_t document = 0; document + 1 < document_starts.size(); ++document) {
    const int32_t first = document_starts[document], end = document_starts[document + 1];
    BEBOP_CHECK(first <= end);
    const int32_t last_target = loss == DraftLoss::kCrossEntropy ? end - 2 : end - 1;
    for (int32_t base = first; base < end; ++base) {
      int32_t count = std::clamp(last_target - base, 0, num_steps);
      if (loss == DraftLoss::kEndToEndTotalVariation && count < num_steps) count = 0;
      steps[static_cast<size_t>(base)] = count;
    }
  }
}

int64_t NumChainTerms(DraftLoss loss, std::span<const int32_t> steps) {
  int64_t terms = 0;
  for (const int32_t count : steps) terms += loss == DraftLoss::kEndToEndTotalVariation ? (count > 0 ? 1 : 0) : count;
  return terms;
}

ChainLossResult ChainLoss(const ChainLossArgs& args) {
  BEBOP_CHECK(args.num_steps >= 1 && args.num_bases >= 0);
  const int64_t num_bases = args.num_bases;
  const bool chained = args.loss == DraftLoss::kEndToEndTotalVariation;
  ChainLossResult result;
  for (int64_t base = 0; base < num_bases; ++base) {
    const int32_t count = args.steps[base];
    BEBOP_CHECK(count >= 0 && count <= args.num_steps && (!chained || count == 0 || count == args.num_steps));
    const DraftLossRow* const rows = args.rows + base;
    double* const weights = args.row_weights + base;
    for (int32_t k = 0; k < args.num_steps; ++k) {
      weights[k * num_bases] = k < count ? args.scale : 0.0;
      if (k >= count) continue;
      result.finite = result.finite && rows[k * num_bases].finite;
      if (!chained) result.loss += args.scale * rows[k * num_bases].loss;
    }
    if (!chained || count == 0) continue;
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
    result.loss += args.scale * (1.0 - drafts / args.num_steps);
  }
  result.finite = result.finite && std::isfinite(result.loss);
  return result;
}

}  // namespace bebop
