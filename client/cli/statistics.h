// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace bebop {

// Counts of categories; any 64-bit key.
using Histogram = std::map<uint64_t, int64_t>;

struct ChiSquare {
  double statistic = 0.0;
  int32_t degrees_of_freedom = 0;  // bins - 1; 0: nothing to compare
};

// Pearson's two-sample homogeneity test: do `a` and `b` come from one distribution? Categories whose expected count in the smaller
// sample is below 5 are merged into one bin.
ChiSquare CompareHistograms(const Histogram& a, const Histogram& b);

// Upper quantile of the chi-square distribution at normal deviate z, by Wilson and Hilferty (1931): df (1 - 2/(9 df) + z sqrt(2/(9 df)))^3.
// At the far tail used here it lies above the true value (20 % at 1 degree of freedom, 3 % at 7, 1.5 % at 15), so a test errs
// towards passing.
double ChiSquareQuantile(int32_t degrees_of_freedom, double z);

// Value below which the fraction `share` of `values` lies (nearest rank); 0 without values. Reorders them.
double Quantile(std::vector<double>* values, double share);

// The acceptance probability s with 1 + s + s^2 + ... + s^num_draft_tokens = accept_length. REQUIRES: 1 <= accept_length <= num_draft_tokens + 1.
double SolveAcceptance(double accept_length, int32_t num_draft_tokens);

}  // namespace bebop
