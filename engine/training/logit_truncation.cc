// SPDX-License-Identifier: Apache-2.0
#include "engine/training/logit_truncation.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "kernels/common/check.h"

namespace bebop {
namespace {

// Of probability 0, and finite, as a logit must be. It also marks the cut places: a target logit that is -1e30 of itself has
// probability 0 anyway, so that cutting the draft there, too, changes only what the draft may spend on it.
constexpr float kCut = -1e30f;

}  // namespace

void TruncateLogits(int32_t top_k, const TensorView& target, const int32_t* target_rows, const TensorView& draft) {
  BEBOP_CHECK(top_k >= 1 && target.dtype == DType::kFloat32 && draft.dtype == DType::kFloat32 && target.cols == draft.cols);
  if (top_k >= target.cols) return;
  std::vector<float> sorted(static_cast<size_t>(target.cols));
  for (int64_t row = 0; row < target.rows; ++row) {
    float* const logits = target.Row<float>(row);
    std::copy_n(logits, target.cols, sorted.begin());
    std::nth_element(sorted.begin(), sorted.begin() + top_k - 1, sorted.end(), std::greater<float>());
    const float smallest = sorted[static_cast<size_t>(top_k) - 1];
    for (int64_t v = 0; v < target.cols; ++v) {
      if (logits[v] < smallest) logits[v] = kCut;
    }
  }
  for (int64_t row = 0; row < draft.rows; ++row) {
    if (target_rows[row] < 0) continue;
    const float* const judge = target.Row<float>(target_rows[row]);
    float* const logits = draft.Row<float>(row);
    for (int64_t v = 0; v < draft.cols; ++v) {
      if (judge[v] == kCut) logits[v] = kCut;
    }
  }
}

}  // namespace bebop
