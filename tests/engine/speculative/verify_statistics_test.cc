// SPDX-License-Identifier: Apache-2.0
// The sampled law with real Philox draws (invariant I17b,d): chi-square and G-test on the joint law of the first two tokens, and
// the measured acceptance against the summed expected acceptance of the same reached places.
//
// 10^6 samples for each of 12 configurations (style.md: 1/100 under sanitizers), vocabulary of 16, each test at a false alarm
// rate of 1e-6. For 255 degrees of freedom that detects a distortion of w = 0.0152 (w^2 = Σ (actual - expected)^2 / expected of
// the probabilities) with probability 0.999 (non-centrality 231); DetectsADistortionOfThatSize checks the claim.
#include <cmath>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/engine/speculative/toy_model.h"

namespace bebop {
namespace {

#ifdef BEBOP_SANITIZED
constexpr uint32_t kSamples = 10000;
#else
constexpr uint32_t kSamples = 1000000;
#endif
constexpr int32_t kVocab = 16;
constexpr double kAlpha = 1e-6;
constexpr double kAlphaQuantile = 4.89;  // of the standard normal, two-sided 1e-6

// Q(a, x), the upper regularised incomplete gamma function: the series of P for x < a + 1, else Lentz's continued fraction.
double UpperGamma(double a, double x) {
  if (x <= 0.0) return 1.0;
  const double front = std::exp(a * std::log(x) - x - std::lgamma(a));
  if (x < a + 1.0) {
    double term = 1.0 / a, sum = term;
    for (double n = a + 1.0; term > sum * 1e-16; n += 1.0) sum += term *= x / n;
    return 1.0 - front * sum;
  }
  double b = x + 1.0 - a, c = 1e300, d = 1.0 / b, fraction = d;
  for (int i = 1; i < 10000; ++i) {
    const double numerator = -i * (i - a);
    b += 2.0;
    d = 1.0 / (numerator * d + b);
    c = b + numerator / c;
    const double factor = c * d;
    fraction *= factor;
    if (std::abs(factor - 1.0) < 1e-15) break;
  }
  return front * fraction;
}

struct Fit {
  double chi_square_p_value, g_p_value;
  int32_t degrees_of_freedom;
};

// Counts against probabilities; cells with expectation under 5 are merged into one. A count where the probability is 0 gives p =
// 0.
Fit TestFit(const std::vector<int64_t>& counts, const std::vector<double>& probabilities) {
  int64_t total = 0, rest_count = 0;
  for (int64_t count : counts) total += count;
  double rest = 0.0, chi_square = 0.0, g = 0.0;
  int32_t cells = 0;
  const auto add = [&](double count, double expected) {
    chi_square += (count - expected) * (count - expected) / expected;
    if (count > 0.0) g += 2.0 * count * std::log(count / expected);
    ++cells;
  };
  for (size_t i = 0; i < counts.size(); ++i) {
    const double expected = probabilities[i] * static_cast<double>(total);
    if (probabilities[i] == 0.0 && counts[i] > 0) return {0.0, 0.0, 0};
    if (expected < 5.0) {
      rest += expected;
      rest_count += counts[i];
    } else {
      add(static_cast<double>(counts[i]), expected);
    }
  }
  if (rest >= 5.0) add(static_cast<double>(rest_count), rest);
  const double half = (cells - 1) / 2.0;
  return {UpperGamma(half, chi_square / 2.0), UpperGamma(half, g / 2.0), cells - 1};
}

TEST(TestFit, QuantilesOfChiSquare) {
  // reliability.md: critical values at 1e-6 for 7, 15 and 63 degrees of freedom; and the one for joint pairs.
  EXPECT_NEAR(UpperGamma(3.5, 40.5 / 2) / 1e-6, 1.0, 0.05);
  EXPECT_NEAR(UpperGamma(7.5, 56.5 / 2) / 1e-6, 1.0, 0.05);
  EXPECT_NEAR(UpperGamma(31.5, 131.4 / 2) / 1e-6, 1.0, 0.05);
  EXPECT_NEAR(UpperGamma(127.5, 377.1 / 2) / 1e-6, 1.0, 0.05);
  EXPECT_NEAR(UpperGamma(127.5, 254.3 / 2), 0.5, 0.01);
}

struct StatisticsCase {
  const char* name;
  SpeculationMode mode;
  int32_t num_drafts;
  DraftKind draft;
  SamplingParams sampling;
  size_t banned_tokens;
};

void PrintTo(const StatisticsCase& test, std::ostream* stream) { *stream << test.name; }

ToyOptions ToyFor(const StatisticsCase& test) {
  ToyOptions toy;
  toy.num_live = kVocab;
  toy.deviation = 1.2f;
  toy.history = 2;
  toy.seed = 2026;
  toy.draft = test.draft;
  toy.sampling = test.sampling;
  toy.banned_tokens = test.banned_tokens;
  return toy;
}

std::vector<double> PairLaw(ToyModel& model) {
  std::vector<double> law(kVocab * kVocab, 0.0);
  const ToyModel::Row& first = model.Target({});
  for (uint32_t a = 0; a < kVocab; ++a) {
    const ToyModel::Row& second = model.Target(std::vector<uint32_t>{a});
    for (uint32_t b = 0; b < kVocab; ++b) law[a * kVocab + b] = first.reference[a] * second.reference[b];
  }
  return law;
}

class VerifyStatistics : public ::testing::TestWithParam<StatisticsCase> {};

TEST_P(VerifyStatistics, PairsFollowTheTargetAndAcceptanceItsExpectation) {
  const StatisticsCase& test = GetParam();
  ToyModel model(ToyFor(test));
  std::vector<int64_t> counts(kVocab * kVocab, 0);
  // Acceptance per place: the sum of (accepted - expected) is a martingale with the summed variance below.
  std::vector<double> difference(kMaxDraftTokens, 0.0), variance(kMaxDraftTokens, 0.0), reached(kMaxDraftTokens, 0.0);
  const auto observe = [&](std::span<const uint32_t> prefix, const Iteration& iteration) {
    std::vector<uint32_t> context(prefix.begin(), prefix.end());
    for (int32_t i = 0; i < iteration.outcome.num_reached; ++i) {
      const double expected = ExpectedAcceptance(test.mode, model.greedy(), iteration.drafts[i],
                                                 model.Target(context).distribution, model.Draft(context).distribution);
      difference[i] += (i < iteration.outcome.num_accepted ? 1.0 : 0.0) - expected;
      variance[i] += expected * (1.0 - expected);
      reached[i] += 1.0;
      context.push_back(iteration.drafts[i]);
    }
  };
  for (uint32_t sample = 0; sample < kSamples; ++sample) {
    const std::vector<uint32_t> pair = Decode(model, test.mode, test.num_drafts, /*seed=*/77, sample, 2, observe);
    ++counts[pair[0] * kVocab + pair[1]];
  }
  const Fit fit = TestFit(counts, PairLaw(model));
  EXPECT_GT(fit.chi_square_p_value, kAlpha) << fit.degrees_of_freedom;
  EXPECT_GT(fit.g_p_value, kAlpha) << fit.degrees_of_freedom;
  RecordProperty("chi_square_p_value", std::to_string(fit.chi_square_p_value));
  for (int32_t i = 0; i < test.num_drafts; ++i) {
    ASSERT_GT(reached[i], kSamples / 100.0) << "place " << i + 1 << " is hardly reached: the case proves nothing there";
    EXPECT_LE(std::abs(difference[i]), kAlphaQuantile * std::sqrt(variance[i]) + 1e-6) << "acceptance at place " << i + 1;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Twelve, VerifyStatistics,
    ::testing::Values(
        StatisticsCase{"Plain", SpeculationMode::kOff, 0, DraftKind::kGood, {}, 0},
        StatisticsCase{"RejectionGood", SpeculationMode::kRejection, 3, DraftKind::kGood, {}, 0},
        StatisticsCase{"RejectionBad", SpeculationMode::kRejection, 1, DraftKind::kBad, {}, 0},
        StatisticsCase{"RejectionTopKTopP", SpeculationMode::kRejection, 3, DraftKind::kGood, {.top_k = 10, .top_p = 0.9f}, 0},
        StatisticsCase{
            "RejectionMinP", SpeculationMode::kRejection, 2, DraftKind::kGood, {.temperature = 1.4f, .min_p = 0.1f}, 0},
        StatisticsCase{"RejectionBanned", SpeculationMode::kRejection, 2, DraftKind::kUniform, {.temperature = 0.8f}, 2},
        StatisticsCase{"TargetOnlyGood", SpeculationMode::kTargetOnly, 2, DraftKind::kGood, {.temperature = 0.7f}, 0},
        StatisticsCase{
            "TargetOnlyTopP", SpeculationMode::kTargetOnly, 2, DraftKind::kGood, {.temperature = 0.7f, .top_p = 0.8f}, 0},
        StatisticsCase{"CoupledPlain", SpeculationMode::kCoupled, 0, DraftKind::kGood, {}, 0},
        StatisticsCase{"CoupledGood", SpeculationMode::kCoupled, 3, DraftKind::kGood, {}, 0},
        StatisticsCase{"CoupledBad", SpeculationMode::kCoupled, 1, DraftKind::kBad, {}, 0},
        StatisticsCase{"CoupledTopK", SpeculationMode::kCoupled, 3, DraftKind::kGood, {.temperature = 1.3f, .top_k = 6}, 0}),
    [](const ::testing::TestParamInfo<StatisticsCase>& info) { return info.param.name; });

// The power that the head of this file states: pairs whose law is off by w = 0.0152 are refused.
TEST(VerifyStatisticsPower, DetectsADistortionOfThatSize) {
#ifdef BEBOP_SANITIZED
  GTEST_SKIP() << "needs the full number of samples";
#endif
  ToyModel model(ToyFor({"Plain", SpeculationMode::kOff, 0, DraftKind::kGood, {}, 0}));
  std::vector<int64_t> counts(kVocab * kVocab, 0);
  for (uint32_t sample = 0; sample < kSamples; ++sample) {
    const std::vector<uint32_t> pair =
        Decode(model, SpeculationMode::kOff, 0, 77, sample, 2, [](std::span<const uint32_t>, const Iteration&) {});
    ++counts[pair[0] * kVocab + pair[1]];
  }
  std::vector<double> distorted = PairLaw(model);
  EXPECT_GT(TestFit(counts, distorted).chi_square_p_value, kAlpha);
  for (size_t i = 0; i < distorted.size(); ++i) distorted[i] *= i % 2 ? 1.0153 : 0.9847;  // w = 0.0153
  double sum = 0.0;
  for (double value : distorted) sum += value;
  for (double& value : distorted) value /= sum;
  EXPECT_LT(TestFit(counts, distorted).chi_square_p_value, kAlpha);
}

}  // namespace
}  // namespace bebop
