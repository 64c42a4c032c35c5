// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/sampling/sampling.h"

namespace bebop {

// Storage for a number of TokenDistributions, allocated once.
class DistributionRows {
 public:
  DistributionRows(int64_t rows, int32_t vocab_size)
      : weight_(static_cast<size_t>(rows) * vocab_size),
        block_sum_(static_cast<size_t>(rows) * NumSamplingBlocks(vocab_size)),
        rows_(static_cast<size_t>(rows)) {
    for (int64_t row = 0; row < rows; ++row) {
      rows_[row].weight = weight_.data() + row * vocab_size;
      rows_[row].block_sum = block_sum_.data() + row * NumSamplingBlocks(vocab_size);
      rows_[row].vocab_size = vocab_size;
    }
  }
  TokenDistribution& operator[](int64_t row) { return rows_[row]; }
  const TokenDistribution* data() const { return rows_.data(); }
  int64_t size() const { return static_cast<int64_t>(rows_.size()); }

 private:
  std::vector<float> weight_;
  std::vector<double> block_sum_;
  std::vector<TokenDistribution> rows_;
};

}  // namespace bebop
