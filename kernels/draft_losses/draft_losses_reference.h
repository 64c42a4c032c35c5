// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

#include "kernels/draft_losses/draft_losses.h"

// The same losses in double from end to end, one row at a time and without vectors: what the kernels are judged by, and what is
// held against PyTorch's autograd (tests/oracle/draft_losses_test.py). Slow.
namespace bebop::reference {

// `draft`, `target`: [V]. `token` is read for cross-entropy alone.
DraftLossRow DraftLossForward(DraftLoss loss, std::span<const double> draft, std::span<const double> target, uint32_t token);

// d(weight · row loss) / d(draft): [V]; may not alias the logits.
void DraftLossBackward(DraftLoss loss, std::span<const double> draft, std::span<const double> target, uint32_t token,
                       double weight, std::span<double> gradient);

}  // namespace bebop::reference
