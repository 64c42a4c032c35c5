// SPDX-License-Identifier: Apache-2.0
#include "client/cli/statistics.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace bebop {
namespace {

constexpr double kMinExpected = 5.0;

int64_t Total(const Histogram& histogram) {
  int64_t total = 0;
  for (const auto& [key, count] : histogram) total += count;
  return total;
}

int64_t CountOf(const Histogram& histogram, uint64_t key) {
  const auto found = histogram.find(key);
  return found == histogram.end() ? 0 : found->second;
}

}  // namespace

ChiSquare CompareHistograms(const Histogram& a, const Histogram& b) {
  const auto total_a = static_cast<double>(Total(a));
  const auto total_b = static_cast<double>(Total(b));
  ChiSquare result;
  if (total_a == 0.0 || total_b == 0.0) return result;
  const double share_a = total_a / (total_a + total_b);
  const double smaller_share = std::min(share_a, 1.0 - share_a);
  int32_t num_bins = 0;
  const auto add_bin = [&](double count_a, double count_b) {
    const double expected_a = (count_a + count_b) * share_a;
    const double expected_b = (count_a + count_b) - expected_a;
    result.statistic += (count_a - expected_a) * (count_a - expected_a) / expected_a + (count_b - expected_b) * (count_b - expected_b) / expected_b;
    ++num_bins;
  };
  Histogram keys = a;
  keys.insert(b.begin(), b.end());
  double rest_a = 0.0, rest_b = 0.0;
  for (const auto& [key, unused] : keys) {
    const auto count_a = static_cast<double>(CountOf(a, key));
    const auto count_b = static_cast<double>(CountOf(b, key));
    if ((count_a + count_b) * smaller_share >= kMinExpected) {
      add_bin(count_a, count_b);
    } else {
      rest_a += count_a;
      rest_b += count_b;
    }
  }
  if ((rest_a + rest_b) * smaller_share >= kMinExpected) add_bin(rest_a, rest_b);
  result.degrees_of_freedom = std::max(0, num_bins - 1);
  if (result.degrees_of_freedom == 0) result.statistic = 0.0;
  return result;
}

double ChiSquareQuantile(int32_t degrees_of_freedom, double z) {
  if (degrees_of_freedom <= 0) return 0.0;
  const double spread = 2.0 / (9.0 * degrees_of_freedom);
  return degrees_of_freedom * std::pow(1.0 - spread + z * std::sqrt(spread), 3.0);
}

double Quantile(std::vector<double>* values, double share) {
  if (values->empty()) return 0.0;
  const double rank = std::ceil(share * static_cast<double>(values->size()));
  const size_t index = std::min(values->size() - 1, static_cast<size_t>(std::max(0.0, rank - 1.0)));
  std::nth_element(values->begin(), values->begin() + static_cast<std::ptrdiff_t>(index), values->end());
  return (*values)[index];
}

double SolveAcceptance(double accept_length, int32_t num_draft_tokens) {
  double low = 0.0, high = 1.0;
  for (int i = 0; i < 60; ++i) {
    const double middle = 0.5 * (low + high);
    double sum = 1.0, power = 1.0;
    for (int32_t depth = 0; depth < num_draft_tokens; ++depth) sum += power *= middle;
    (sum < accept_length ? low : high) = middle;
  }
  return 0.5 * (low + high);
}

}  // namespace bebop
