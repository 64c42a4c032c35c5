// SPDX-License-Identifier: Apache-2.0
#include "client/cli/statistics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace bebop {
namespace {

TEST(CompareHistograms, HandComputed) {
  // 2 x 2 table 30 20 / 20 30: every expectation 25, so 4 * 25 / 25 = 4.
  const ChiSquare result = CompareHistograms({{1, 30}, {2, 20}}, {{1, 20}, {2, 30}});
  EXPECT_DOUBLE_EQ(result.statistic, 4.0);
  EXPECT_EQ(result.degrees_of_freedom, 1);
  // Unequal sizes: 10 10 / 40 60, expectations 8.33 11.67 / 41.67 58.33.
  const ChiSquare unequal = CompareHistograms({{1, 10}, {2, 10}}, {{1, 40}, {2, 60}});
  EXPECT_NEAR(unequal.statistic, (25.0 / 9) * (1 / (25.0 / 3) + 1 / (35.0 / 3) + 1 / (125.0 / 3) + 1 / (175.0 / 3)), 1e-12);
}

TEST(CompareHistograms, MergesRareCategories) {
  Histogram a = {{1, 100}}, b = {{1, 100}};
  for (uint64_t key = 10; key < 20; ++key) {
    a[key] = 1;
    b[key + 100] = 1;  // seen on one side only
  }
  const ChiSquare result = CompareHistograms(a, b);
  EXPECT_EQ(result.degrees_of_freedom, 1);  // the common one and the rest
  EXPECT_DOUBLE_EQ(result.statistic, 0.0);
}

TEST(CompareHistograms, NothingToCompare) {
  EXPECT_EQ(CompareHistograms({}, {{1, 5}}).degrees_of_freedom, 0);
  EXPECT_EQ(CompareHistograms({{1, 50}}, {{1, 70}}).degrees_of_freedom, 0);
  EXPECT_EQ(CompareHistograms({{1, 50}}, {{1, 70}}).statistic, 0.0);
}

TEST(CompareHistograms, SeesADifferenceAndNoDifference) {
  std::mt19937_64 random(7);
  std::discrete_distribution<int> same({8, 4, 2, 1, 1}), other({7, 5, 2, 1, 1});
  Histogram a, b, c;
  for (int i = 0; i < 20000; ++i) {
    ++a[static_cast<uint64_t>(same(random))];
    ++b[static_cast<uint64_t>(same(random))];
    ++c[static_cast<uint64_t>(other(random))];
  }
  const double threshold = ChiSquareQuantile(4, 5.2);
  EXPECT_LT(CompareHistograms(a, b).statistic, threshold);
  EXPECT_GT(CompareHistograms(a, c).statistic, threshold);
}

TEST(ChiSquareQuantile, AgreesWithTables) {
  // True upper 1e-6 points; the approximation lies above, by no more than the header says.
  const std::pair<int32_t, double> points[] = {{1, 23.93}, {7, 40.52}, {15, 56.49}, {63, 131.4}};
  const double excess[] = {1.2, 1.04, 1.02, 1.005};
  for (size_t i = 0; i < 4; ++i) {
    const double quantile = ChiSquareQuantile(points[i].first, 4.7534);
    EXPECT_GT(quantile, points[i].second * 0.999) << points[i].first;
    EXPECT_LT(quantile, points[i].second * excess[i]) << points[i].first;
  }
  EXPECT_NEAR(ChiSquareQuantile(10, 1.6449), 18.307, 0.05);
  EXPECT_EQ(ChiSquareQuantile(0, 5.0), 0.0);
}

TEST(Quantile, NearestRank) {
  std::vector<double> values = {5, 1, 4, 2, 3};
  EXPECT_EQ(Quantile(&values, 0.5), 3.0);
  EXPECT_EQ(Quantile(&values, 0.99), 5.0);
  EXPECT_EQ(Quantile(&values, 0.0), 1.0);
  std::vector<double> none;
  EXPECT_EQ(Quantile(&none, 0.5), 0.0);
}

TEST(SolveAcceptance, InvertsTheSum) {
  for (const int32_t drafts : {1, 2, 3, 8}) {
    for (const double acceptance : {0.0, 0.25, 0.7, 1.0}) {
      double length = 1.0;
      for (int32_t d = 1; d <= drafts; ++d) length += std::pow(acceptance, d);
      EXPECT_NEAR(SolveAcceptance(length, drafts), acceptance, 1e-9);
    }
  }
}

}  // namespace
}  // namespace bebop
