// SPDX-License-Identifier: Apache-2.0
#include "kernels/draft_losses/draft_losses.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/draft_losses/draft_losses_reference.h"
#include "tests/kernels/kernel_test_util.h"

// Against PyTorch: tests/oracle/draft_losses_test.py. Here: finite differences, hand-computed values, edges, masks, chunks,
// instruction sets.
namespace bebop {
namespace {

using testing::InstructionSets;
using testing::kNan;
using testing::kUnit;
using testing::PaddedMatrix;
using testing::Random;
using testing::SameBits;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr DraftLoss kLosses[] = {DraftLoss::kCrossEntropy,   DraftLoss::kKl,
                                 DraftLoss::kReverseKl,      DraftLoss::kTotalVariation,
                                 DraftLoss::kEndToEndTotalVariation, DraftLoss::kLk};
constexpr DraftLoss kOverlapLosses[] = {DraftLoss::kTotalVariation, DraftLoss::kEndToEndTotalVariation, DraftLoss::kLk};

std::vector<double> ToDouble(const std::vector<float>& values) { return {values.begin(), values.end()}; }

double LogSumExp(const std::vector<float>& logits) {
  const double max = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (const float logit : logits) sum += std::exp(logit - max);
  return max + std::log(sum);
}

struct RowResult {
  DraftLossRow row;
  std::vector<double> gradient;
};

RowResult ByReference(DraftLoss loss, const std::vector<float>& draft, const std::vector<float>& target, uint32_t token = 0,
                      double weight = 1.0) {
  RowResult out;
  out.row = reference::DraftLossForward(loss, ToDouble(draft), ToDouble(target), token);
  out.gradient.resize(draft.size());
  reference::DraftLossBackward(loss, ToDouble(draft), ToDouble(target), token, weight, out.gradient);
  return out;
}

RowResult ByKernel(cpu::InstructionSet set, DraftLoss loss, std::vector<float> draft, std::vector<float> target,
                   uint32_t token = 0, double weight = 1.0) {
  ThreadPool pool(1);
  const auto vocab_size = static_cast<int64_t>(draft.size());
  LogitNormalizer normalizer;
  cpu::NormalizeWith(set, FloatMatrix(target.data(), 1, vocab_size), &normalizer, pool);
  const int32_t target_row = 0;
  RowResult out;
  const TensorView logits = FloatMatrix(draft.data(), 1, vocab_size);
  const TensorView targets = FloatMatrix(target.data(), 1, vocab_size);
  const DraftLossArgs args = {loss, logits, targets, &normalizer, &target_row, &token, &out.row};
  cpu::DraftLossForwardWith(set, args, pool);
  cpu::DraftLossBackwardWith(set, {args, &weight, logits}, pool);
  out.gradient = ToDouble(draft);
  return out;
}

// Both ways to compute a row, for the edges that both must respect.
std::vector<RowResult> Everyway(DraftLoss loss, const std::vector<float>& draft, const std::vector<float>& target,
                                uint32_t token = 0, double weight = 1.0) {
  std::vector<RowResult> results = {ByReference(loss, draft, target, token, weight)};
  for (const auto set : InstructionSets()) results.push_back(ByKernel(set, loss, draft, target, token, weight));
  return results;
}

TEST(DraftLossesTest, HandComputed) {
  // q = (1/2, 1/4, 1/4), p = (1/4, 1/4, 1/2): α = 3/4; q <= p at ids 1 (a tie) and 2, S = 1/2.
  const double log2 = std::log(2.0);
  const std::vector<float> draft = {static_cast<float>(log2), 0.0f, 0.0f}, target = {0.0f, 0.0f, static_cast<float>(log2)};
  struct Case {
    DraftLoss loss;
    double value;
    double gradient[3];
  };
  const double tv[3] = {0.25, -0.125, -0.125};
  const Case cases[] = {
      {DraftLoss::kCrossEntropy, 2 * log2, {0.5, 0.25, -0.75}},
      {DraftLoss::kKl, 0.25 * log2, {0.25, 0.0, -0.25}},
      {DraftLoss::kReverseKl, 0.25 * log2, {0.5 * 0.75 * log2, -0.25 * 0.25 * log2, -0.25 * 1.25 * log2}},
      {DraftLoss::kTotalVariation, 0.25, {tv[0], tv[1], tv[2]}},
      {DraftLoss::kEndToEndTotalVariation, 0.25, {tv[0], tv[1], tv[2]}},
      {DraftLoss::kLk, -std::log(0.75), {tv[0] / 0.75, tv[1] / 0.75, tv[2] / 0.75}},
  };
  for (const Case& expected : cases) {
    for (const RowResult& result : Everyway(expected.loss, draft, target, /*token=*/2, /*weight=*/2.0)) {
      EXPECT_NEAR(result.row.loss, expected.value, 1e-6);
      EXPECT_NEAR(result.row.acceptance, 0.75, 1e-6);
      EXPECT_NEAR(result.row.covered_mass, 0.5, 1e-6);
      EXPECT_NEAR(result.row.kl, 0.25 * log2, 1e-6);
      EXPECT_NEAR(result.row.reverse_kl, 0.25 * log2, 1e-6);
      EXPECT_NEAR(result.row.target_entropy, 1.5 * log2, 1e-6);
      EXPECT_NEAR(result.row.draft_entropy, 1.5 * log2, 1e-6);
      EXPECT_TRUE(result.row.finite);
      for (size_t v = 0; v < 3; ++v) {
        EXPECT_NEAR(result.gradient[v], 2 * expected.gradient[v], 2e-6)
            << "loss " << static_cast<int>(expected.loss) << " id " << v;
      }
    }
  }
}

// The whole of it in double: chains over packed documents, differentiated numerically.
TEST(DraftLossesTest, FiniteDifferencesThroughTheChain) {
  constexpr int32_t kSteps = 3, kRows = 9, kVocab = 7;
  const std::vector<int32_t> starts = {0, 5, 5, 6, 9};  // an empty document, one of a single row
  for (const DraftLoss loss : kLosses) {
    Random random(static_cast<uint64_t>(loss) + 1);
    std::vector<double> target = ToDouble(random.Normals(kRows * kVocab, 1.5f));
    std::vector<double> draft = ToDouble(random.Normals(kSteps * kRows * kVocab, 1.5f));
    std::vector<int32_t> steps(kRows);
    ChainSteps(loss, kSteps, starts, steps);
    const double scale = 1.0 / static_cast<double>(NumChainTerms(loss, steps));
    std::vector<DraftLossRow> rows(kSteps * kRows);
    std::vector<double> weights(rows.size());
    const auto row_of = [&](std::span<const double> all, int32_t row) {
      return all.subspan(static_cast<size_t>(row) * kVocab, kVocab);
    };
    const auto loss_now = [&] {
      for (int32_t k = 0; k < kSteps; ++k) {
        for (int32_t t = 0; t < kRows; ++t) {
          if (k >= steps[t]) continue;
          const uint32_t token = static_cast<uint32_t>(t + k) % kVocab;
          rows[k * kRows + t] = reference::DraftLossForward(loss, row_of(draft, k * kRows + t), row_of(target, t + k + 1), token);
        }
      }
      const ChainLossResult result = ChainLoss({loss, kRows, kSteps, rows.data(), steps.data(), scale, weights.data()});
      EXPECT_TRUE(result.finite);
      return result.loss;
    };
    loss_now();
    const std::vector<double> row_weights = weights;
    int compared = 0;
    for (int32_t k = 0; k < kSteps; ++k) {
      for (int32_t t = 0; t < kRows; ++t) {
        const int32_t i = k * kRows + t;
        if (k >= steps[t]) {
          EXPECT_EQ(row_weights[i], 0.0);
          continue;
        }
        std::vector<double> gradient(kVocab);
        reference::DraftLossBackward(loss, row_of(draft, i), row_of(target, t + k + 1), static_cast<uint32_t>(t + k) % kVocab,
                                     row_weights[i], gradient);
        for (int32_t v = 0; v < kVocab; ++v) {
          constexpr double kStep = 1e-5;
          double& logit = draft[static_cast<size_t>(i) * kVocab + v];
          const double before = logit;
          logit = before + kStep;
          const double above = loss_now();
          logit = before - kStep;
          const double below = loss_now();
          logit = before;
          // Central differences: the third derivative is at most about 1, 1e-16 of rounding over 2e-5.
          ASSERT_NEAR(gradient[v], (above - below) / (2 * kStep), 1e-9)
              << "loss " << static_cast<int>(loss) << " step " << k + 1 << " base " << t << " id " << v;
          ++compared;
        }
      }
    }
    EXPECT_GE(compared, loss == DraftLoss::kEndToEndTotalVariation ? 2 * 3 * kVocab : 7 * kVocab);
  }
}

TEST(DraftLossesTest, KernelsAgreeWithTheReference) {
  // A float probability is off by the rounding of logit - max (here mostly within 40), the exponential, and two products.
  constexpr double kProbability = (2.5 * 40 + 6) * kUnit, kNearTie = 2 * kProbability;
  for (const int32_t vocab_size : {1, 2, 15, 16, 17, 255, 256, 257, 1000, 2047, 2048, 2049, 5000, 33333}) {
    Random random(static_cast<uint64_t>(vocab_size));
    // Ascending maxima make the running maximum of the normalizer move.
    std::vector<float> target = random.Normals(vocab_size, 4.0f), draft = target;
    for (int32_t v = 0; v < vocab_size; ++v) {
      target[v] += 10.0f * static_cast<float>(v) / static_cast<float>(vocab_size) - 300.0f;
      draft[v] += 12.0f * static_cast<float>(v) / static_cast<float>(vocab_size) + random.Normal() + 900.0f;
    }
    const uint32_t token = static_cast<uint32_t>(vocab_size - 1);
    const double draft_lse = LogSumExp(draft), target_lse = LogSumExp(target);
    double near_tie_mass = 0.0;
    for (int32_t v = 0; v < vocab_size; ++v) {
      const double log_draft = draft[v] - draft_lse, log_target = target[v] - target_lse;
      if (std::fabs(log_draft - log_target) < kNearTie) near_tie_mass += std::exp(log_draft);
    }
    for (const DraftLoss loss : kLosses) {
      const bool overlaps = std::count(std::begin(kOverlapLosses), std::end(kOverlapLosses), loss) > 0;
      const RowResult expected = ByReference(loss, draft, target, token, 0.5);
      for (const auto set : InstructionSets()) {
        const RowResult actual = ByKernel(set, loss, draft, target, token, 0.5);
        const auto near = [&](double a, double b) { EXPECT_NEAR(a, b, 3 * kProbability * (1 + std::fabs(b))) << vocab_size; };
        EXPECT_TRUE(actual.row.finite);
        near(actual.row.loss, expected.row.loss);
        near(actual.row.acceptance, expected.row.acceptance);
        near(actual.row.kl, expected.row.kl);
        near(actual.row.reverse_kl, expected.row.reverse_kl);
        near(actual.row.target_entropy, expected.row.target_entropy);
        near(actual.row.draft_entropy, expected.row.draft_entropy);
        const double weight = loss == DraftLoss::kLk ? 0.5 / expected.row.acceptance : 0.5;
        for (int32_t v = 0; v < vocab_size; ++v) {
          const double log_draft = draft[v] - draft_lse, log_target = target[v] - target_lse;
          const double both = std::exp(log_draft) + std::exp(log_target), ratio = std::fabs(log_draft - log_target);
          double tolerance = 3 * kProbability * weight * both * (1 + ratio);
          if (loss == DraftLoss::kCrossEntropy && v == vocab_size - 1) tolerance += weight * kUnit;
          if (overlaps) {
            // A tie within the rounding may fall on either side, which moves S for all entries and this one by its q.
            tolerance += weight * std::exp(log_draft) * ((ratio < kNearTie ? 1.0 : 0.0) + near_tie_mass);
          }
          ASSERT_NEAR(actual.gradient[v], expected.gradient[v], tolerance)
              << vocab_size << " loss " << static_cast<int>(loss) << " id " << v << " set " << cpu::InstructionSetName(set);
        }
      }
    }
  }
}

TEST(DraftLossesTest, EqualRowsAreTiesEverywhere) {
  Random random(3);
  for (const int64_t vocab_size : {2, 1000}) {
    const std::vector<float> logits = random.Normals(vocab_size, 3.0f);
    for (const DraftLoss loss : kLosses) {
      if (loss == DraftLoss::kCrossEntropy) continue;
      for (const RowResult& result : Everyway(loss, logits, logits)) {
        EXPECT_NEAR(result.row.acceptance, 1.0, 1e-6);
        EXPECT_NEAR(result.row.covered_mass, 1.0, 1e-6);
        EXPECT_EQ(result.row.kl, 0.0);
        EXPECT_EQ(result.row.reverse_kl, 0.0);
        for (const double value : result.gradient) EXPECT_NEAR(value, 0.0, 1e-6);
      }
    }
  }
}

TEST(DraftLossesTest, TiesCountAsCovered) {
  // q = (a, b, b, c), p = (b, a, b, c) with exact ties at ids 2 and 3.
  const std::vector<float> draft = {1.0f, 0.25f, 0.25f, -0.5f}, target = {0.25f, 1.0f, 0.25f, -0.5f};
  double sum = 0.0, probs[4];
  for (size_t v = 0; v < 4; ++v) sum += probs[v] = std::exp(static_cast<double>(draft[v]));
  for (double& value : probs) value /= sum;
  const double covered = probs[1] + probs[2] + probs[3];
  for (const DraftLoss loss : kOverlapLosses) {
    for (const RowResult& result : Everyway(loss, draft, target)) {
      const double weight = loss == DraftLoss::kLk ? 1.0 / result.row.acceptance : 1.0;
      EXPECT_NEAR(result.row.covered_mass, covered, 1e-6);
      for (size_t v = 0; v < 4; ++v) EXPECT_NEAR(result.gradient[v], -weight * probs[v] * ((v == 0 ? 0.0 : 1.0) - covered), 1e-6);
    }
  }
}

TEST(DraftLossesTest, OneHotTarget) {
  // p is one-hot at id 1: α = q(1) = S; dTV/dz_j = -q_j ([j = 1] - q_1) but for ids of q_j = 0.
  const std::vector<float> draft = {0.5f, -1.0f, 0.25f}, target = {-4e4f, 5e4f, -4e4f};
  double sum = 0.0, probs[3];
  for (size_t v = 0; v < 3; ++v) sum += probs[v] = std::exp(static_cast<double>(draft[v]));
  for (double& value : probs) value /= sum;
  for (const DraftLoss loss : kOverlapLosses) {
    for (const RowResult& result : Everyway(loss, draft, target)) {
      const double weight = loss == DraftLoss::kLk ? 1.0 / probs[1] : 1.0;
      EXPECT_NEAR(result.row.acceptance, probs[1], 1e-6);
      EXPECT_EQ(result.row.target_entropy, 0.0);
      for (size_t v = 0; v < 3; ++v) {
        EXPECT_NEAR(result.gradient[v], -weight * probs[v] * ((v == 1 ? 1.0 : 0.0) - probs[1]), 1e-6);
      }
    }
  }
  for (const RowResult& result : Everyway(DraftLoss::kKl, draft, target)) {
    EXPECT_NEAR(result.row.loss, -std::log(probs[1]), 1e-6);
    for (size_t v = 0; v < 3; ++v) EXPECT_NEAR(result.gradient[v], probs[v] - (v == 1 ? 1.0 : 0.0), 1e-6);
  }
  // log p comes from the logits and stays finite where p underflows.
  for (const RowResult& result : Everyway(DraftLoss::kReverseKl, draft, target)) {
    EXPECT_NEAR(result.row.loss, (probs[0] + probs[2]) * 9e4 - result.row.draft_entropy, 0.02);
    EXPECT_TRUE(result.row.finite);
    EXPECT_NEAR(result.gradient[1], probs[1] * (std::log(probs[1]) - result.row.loss), 0.05);
  }
}

TEST(DraftLossesTest, NoOverlap) {
  // Disjoint one-hot rows: α = 0, S = 0, TV does not move, LK is flat under 1e-6.
  const std::vector<float> draft = {0.0f, 1e4f, 0.0f}, target = {1e4f, 0.0f, 0.0f};
  for (const DraftLoss loss : kOverlapLosses) {
    for (const RowResult& result : Everyway(loss, draft, target)) {
      EXPECT_EQ(result.row.acceptance, 0.0);
      EXPECT_DOUBLE_EQ(result.row.loss, loss == DraftLoss::kLk ? -std::log(1e-6) : 1.0);
      for (const double value : result.gradient) EXPECT_EQ(value, 0.0);
    }
  }
  // Just above the threshold LK has its gradient, just below it has none.
  for (const float margin : {13.0f, 14.5f}) {
    const std::vector<float> near_draft = {0.0f, margin}, near_target = {1e4f, 0.0f};
    for (const RowResult& result : Everyway(DraftLoss::kLk, near_draft, near_target)) {
      const bool above = result.row.acceptance >= kLkSmallestAcceptance;
      EXPECT_EQ(above, margin < 14.0f);
      EXPECT_NEAR(result.gradient[0], above ? -(1 - result.row.acceptance) : 0.0, 1e-5);
    }
  }
}

TEST(DraftLossesTest, BrokenLogitsShow) {
  Random random(5);
  for (const int64_t vocab_size : {3, 40, 3000}) {
    const std::vector<float> good = random.Normals(vocab_size);
    for (const float broken : {kNan, kInfinity, -kInfinity, 2e29f}) {
      for (const size_t at : {size_t{0}, static_cast<size_t>(vocab_size - 1)}) {
        std::vector<float> bad = good;
        bad[at] = broken;
        for (const auto set : InstructionSets()) {
          ThreadPool pool(1);
          LogitNormalizer normalizer;
          cpu::NormalizeWith(set, FloatMatrix(bad.data(), 1, vocab_size), &normalizer, pool);
          EXPECT_FALSE(normalizer.finite) << broken;
          for (const DraftLoss loss : kLosses) {
            EXPECT_FALSE(ByKernel(set, loss, bad, good).row.finite) << broken;
            EXPECT_FALSE(ByKernel(set, loss, good, bad).row.finite) << broken;
            EXPECT_TRUE(ByKernel(set, loss, good, good).row.finite);
          }
        }
      }
    }
  }
}

TEST(DraftLossesTest, ChainsEndWithTheirDocuments) {
  const std::vector<int32_t> starts = {0, 4, 5, 7};
  std::vector<int32_t> steps(7);
  // Base t of n rows reaches target row t + k: 3, 2, 1, 0 steps in the first document, at most two wanted.
  ChainSteps(DraftLoss::kTotalVariation, 2, starts, steps);
  EXPECT_EQ(steps, (std::vector<int32_t>{2, 2, 1, 0, 0, 1, 0}));
  EXPECT_EQ(NumChainTerms(DraftLoss::kTotalVariation, steps), 6);
  ChainSteps(DraftLoss::kEndToEndTotalVariation, 2, starts, steps);
  EXPECT_EQ(steps, (std::vector<int32_t>{2, 2, 0, 0, 0, 0, 0}));
  EXPECT_EQ(NumChainTerms(DraftLoss::kEndToEndTotalVariation, steps), 2);
  // Cross-entropy needs the token after that row.
  ChainSteps(DraftLoss::kCrossEntropy, 2, starts, steps);
  EXPECT_EQ(steps, (std::vector<int32_t>{2, 1, 0, 0, 0, 0, 0}));
  EXPECT_EQ(NumChainTerms(DraftLoss::kCrossEntropy, steps), 3);
}

TEST(DraftLossesTest, ChainWeights) {
  // α = (1/2, 1/4, 1/5) and a chain whose first two α are 0, a row that no division survives.
  const double alphas[3][2] = {{0.5, 0.0}, {0.25, 0.0}, {0.2, 0.9}};
  std::vector<DraftLossRow> rows(6);
  for (int k = 0; k < 3; ++k) {
    for (int t = 0; t < 2; ++t) rows[k * 2 + t].acceptance = alphas[k][t];
  }
  const std::vector<int32_t> steps = {3, 3};
  std::vector<double> weights(6, kNan);
  const double scale = 0.5;
  const ChainLossResult result =
      ChainLoss({DraftLoss::kEndToEndTotalVariation, 2, 3, rows.data(), steps.data(), scale, weights.data()});
  EXPECT_NEAR(result.loss, scale * ((1 - (0.5 + 0.125 + 0.025) / 3) + 1), 1e-15);
  const double expected[6] = {1 + 0.25 + 0.05, 1.0, 0.5 + 0.1, 0.0, 0.125, 0.0};
  for (int i = 0; i < 6; ++i) EXPECT_NEAR(weights[i], scale / 3 * expected[i], 1e-15) << i;

  // A step that does not count is not asked for its values.
  for (DraftLossRow& row : rows) row.loss = 2.0;
  rows[5].finite = false;
  rows[5].loss = kNan;
  const std::vector<int32_t> fewer = {3, 2};
  const ChainLossResult sum = ChainLoss({DraftLoss::kKl, 2, 3, rows.data(), fewer.data(), 0.25, weights.data()});
  EXPECT_EQ(sum.loss, 2.5);
  EXPECT_TRUE(sum.finite);
  EXPECT_EQ(weights, (std::vector<double>{0.25, 0.25, 0.25, 0.25, 0.25, 0.0}));
  EXPECT_FALSE(ChainLoss({DraftLoss::kKl, 2, 3, rows.data(), steps.data(), 0.25, weights.data()}).finite);
}

TEST(DraftLossesTest, ChunksThreadsAndPlaceChangeNoBit) {
  constexpr int64_t kRows = 7, kVocab = 1003;
  Random random(9);
  const std::vector<float> draft = random.Normals(kRows * kVocab, 3.0f), target = random.Normals(kRows * kVocab, 3.0f);
  const std::vector<int32_t> target_rows = {3, -1, 0, 6, 6, -1, 1};
  const std::vector<uint32_t> tokens = {5, kVocab + 9, 0, 1002, 16, 4000000000u, 77};  // those of masked rows are not looked at
  const std::vector<double> weights = {0.5, 1, 0, -2, 0.125, 1, 3};
  for (const DraftLoss loss : kLosses) {
    std::vector<float> gradients[2];
    std::vector<DraftLossRow> rows[2];
    for (const int variant : {0, 1}) {
      // 0: one call, one thread, a gradient elsewhere. 1: calls of two rows on three threads, the gradient over the logits.
      ThreadPool pool(variant == 0 ? 1 : 3);
      PaddedMatrix drafts(draft, kRows, kVocab), targets(target, kRows, kVocab), out(kRows, kVocab);
      std::vector<LogitNormalizer> normalizers(kRows);
      cpu::Normalize(targets.View(), normalizers.data(), pool);
      rows[variant].resize(kRows);
      const int64_t chunk = variant == 0 ? kRows : 2;
      for (int64_t first = 0; first < kRows; first += chunk) {
        const int64_t count = std::min(chunk, kRows - first);
        const DraftLossArgs args = {loss,
                                    drafts.View().Rows(first, count),
                                    targets.View(),
                                    normalizers.data(),
                                    target_rows.data() + first,
                                    tokens.data() + first,
                                    rows[variant].data() + first};
        cpu::DraftLossForward(args, pool);
        cpu::DraftLossBackward({args, weights.data() + first, variant == 0 ? out.View().Rows(first, count) : args.draft}, pool);
      }
      gradients[variant] = variant == 0 ? out.Values() : drafts.Values();
      EXPECT_TRUE(drafts.GapsUntouched() && targets.GapsUntouched() && out.GapsUntouched());
      EXPECT_TRUE(SameBits(targets.Values(), target));
      if (variant == 0) {
        EXPECT_TRUE(SameBits(drafts.Values(), draft));
      }
    }
    EXPECT_TRUE(SameBits(gradients[0], gradients[1]));
    for (int64_t r = 0; r < kRows; ++r) {
      EXPECT_EQ(rows[0][r].loss, rows[1][r].loss);
      EXPECT_EQ(rows[0][r].acceptance, rows[1][r].acceptance);
      double largest = 0.0;
      for (int64_t v = 0; v < kVocab; ++v) largest = std::max(largest, std::fabs(double{gradients[0][r * kVocab + v]}));
      EXPECT_EQ(largest > 0.0, target_rows[r] >= 0 && weights[r] != 0.0) << r;
      if (target_rows[r] < 0) {
        EXPECT_TRUE(rows[0][r].finite && rows[0][r].loss == 0.0 && rows[0][r].acceptance == 0.0);
      }
    }
  }
}

}  // namespace
}  // namespace bebop
