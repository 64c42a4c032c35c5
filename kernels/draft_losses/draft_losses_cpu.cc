// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "kernels/common/check.h"
#include "kernels/draft_losses/draft_losses.h"
#include "kernels/draft_losses/draft_losses_row.h"

namespace bebop::cpu {
namespace {

using draft_losses::FinishRow;
using draft_losses::GradientForm;
using draft_losses::GradientPlan;
using draft_losses::kLargestLogit;
using draft_losses::kLowest;
using draft_losses::PlanGradient;
using draft_losses::RowSums;

constexpr int64_t kNormalizeBlock = 2048;  // ids read twice, the second time from the first cache
constexpr int64_t kFloatSums = 256;        // ids that 16 float lanes add up before they go to double: 16 a lane

// 2^r on [-1/2, 1/2], from r^0 to r^5: 1 and a polynomial of least largest relative error (Lawson's iteration).
constexpr float kExp2Polynomial[6] = {1.0f, 0.693147004f, 0.240222424f, 0.0555073358f, 0.00967151299f, 0.00132647273f};
constexpr float kSmallestExponent = -80.0f;  // of 2: smaller exponentials are 0; all of a vocabulary's would be 2e-19

// What one row's kernels need of both normalizers.
struct RowConstants {
  float draft_max, draft_scale;  // scale = 1 / sum
  float target_max, target_scale;
  float log_sum_difference;  // log Σ exp(z - max z) - log Σ exp(y - max y)
};

RowConstants MakeConstants(const LogitNormalizer& draft, const LogitNormalizer& target) {
  return {draft.max, static_cast<float>(1.0 / draft.sum), target.max, static_cast<float>(1.0 / target.sum),
          static_cast<float>(std::log(draft.sum) - std::log(target.sum))};
}

void CheckArgs(const DraftLossArgs& args) {
  BEBOP_CHECK(args.draft.dtype == DType::kFloat32 && args.target.dtype == DType::kFloat32);
  BEBOP_CHECK(args.draft.cols >= 1 && args.draft.cols == args.target.cols);
  BEBOP_CHECK(args.loss != DraftLoss::kCrossEntropy || args.tokens != nullptr || args.draft.rows == 0);
}

// The target row of draft row `row`, or -1.
int64_t TargetRow(const DraftLossArgs& args, int64_t row) {
  const int64_t target_row = args.target_rows[row];
  BEBOP_CHECK(target_row < args.target.rows);
  if (target_row >= 0 && args.loss == DraftLoss::kCrossEntropy) {
    BEBOP_CHECK(static_cast<int64_t>(args.tokens[row]) < args.draft.cols);
  }
  return target_row;
}

}  // namespace
}  // namespace bebop::cpu

#define BEBOP_SIMD_SOURCE "kernels/draft_losses/draft_losses_simd.inc"
#include "kernels/common/simd_targets.inc"

namespace bebop::cpu {

void Normalize(const TensorView& logits, LogitNormalizer* normalizers, ThreadPool& pool) {
  NormalizeWith(DetectInstructionSet(), logits, normalizers, pool);
}
void DraftLossForward(const DraftLossArgs& args, ThreadPool& pool) { DraftLossForwardWith(DetectInstructionSet(), args, pool); }
void DraftLossBackward(const DraftLossGradientArgs& args, ThreadPool& pool) {
  DraftLossBackwardWith(DetectInstructionSet(), args, pool);
}

void NormalizeWith(InstructionSet set, const TensorView& logits, LogitNormalizer* normalizers, ThreadPool& pool) {
  BEBOP_CHECK(logits.dtype == DType::kFloat32 && logits.cols >= 1);
  const auto normalize = BEBOP_SIMD_SELECT(set, NormalizeRow);
  pool.ParallelFor(logits.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) normalizers[row] = normalize(logits.Row<float>(row), logits.cols);
  });
}

void DraftLossForwardWith(InstructionSet set, const DraftLossArgs& args, ThreadPool& pool) {
  CheckArgs(args);
  const auto normalize = BEBOP_SIMD_SELECT(set, NormalizeRow);
  const auto compare = BEBOP_SIMD_SELECT(set, CompareRow);
  pool.ParallelFor(args.draft.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      DraftLossRow& row = args.rows[i];
      row = DraftLossRow{};
      const int64_t target_row = TargetRow(args, i);
      if (target_row < 0) continue;
      const float* const draft = args.draft.Row<float>(i);
      const LogitNormalizer& target = args.target_normalizers[target_row];
      row.draft = normalize(draft, args.draft.cols);
      row.finite = row.draft.finite && target.finite;
      if (!row.finite) continue;
      const RowSums sums =
          compare(draft, args.target.Row<float>(target_row), args.draft.cols, MakeConstants(row.draft, target));
      const double token_logit = args.loss == DraftLoss::kCrossEntropy ? draft[args.tokens[i]] : 0.0;
      FinishRow(args.loss, sums, target, row.draft.max, row.draft.sum, token_logit, &row);
    }
  });
}

void DraftLossBackwardWith(InstructionSet set, const DraftLossGradientArgs& args, ThreadPool& pool) {
  const DraftLossArgs& forward = args.forward;
  CheckArgs(forward);
  BEBOP_CHECK(args.gradient.dtype == DType::kFloat32);
  BEBOP_CHECK(args.gradient.rows == forward.draft.rows && args.gradient.cols == forward.draft.cols);
  const auto gradient_row = BEBOP_SIMD_SELECT(set, GradientRow);
  const int64_t vocab_size = forward.draft.cols;
  pool.ParallelFor(forward.draft.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* const gradient = args.gradient.Row<float>(i);
      const double weight = args.row_weights[i];
      const int64_t target_row = TargetRow(forward, i);
      const DraftLossRow& row = forward.rows[i];
      const GradientPlan plan = PlanGradient(forward.loss, row, weight);
      if (target_row < 0 || (plan.scale == 0.0 && plan.shift == 0.0)) {
        std::fill_n(gradient, vocab_size, 0.0f);
        continue;
      }
      const RowConstants constants = MakeConstants(row.draft, forward.target_normalizers[target_row]);
      gradient_row(forward.draft.Row<float>(i), forward.target.Row<float>(target_row), vocab_size, constants, plan, gradient);
      if (forward.loss == DraftLoss::kCrossEntropy) gradient[forward.tokens[i]] -= static_cast<float>(weight);
    }
  });
}

}  // namespace bebop::cpu
