// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "kernels/common/check.h"
#include "kernels/draft_losses/draft_losses.h"
#include "kernels/draft_losses/draft_losses_row.h"

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
  const bool whole = args.loss == DraftLoss::kEndToEndTotalVariation;
  ChainLossResult result;
  for (int64_t base = 0; base < args.num_bases; ++base) {
    const int32_t count = args.steps[base];
    BEBOP_CHECK(count >= 0 && count <= args.num_steps && (!whole || count == 0 || count == args.num_steps));
    const ChainLossResult chain = draft_losses::FinishChain(args, base);
    result.loss += chain.loss;
    result.finite = result.finite && chain.finite;
  }
  result.finite = result.finite && std::isfinite(result.loss);
  return result;
}

}  // namespace bebop
