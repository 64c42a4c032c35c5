// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/tensor_view.h"

namespace bebop {

// Restricts the distributions of both sides to the `top_k` largest target logits of a row (ties with the last of them stay),
// which the softmax of the rest then renormalises: all other logits become -1e30, in `target` and, at the same places, in each
// row of `draft` that target_rows names (-1: left alone). Host memory, float32. The experiment of arXiv 2606.12370, Fig. 14b.
void TruncateLogits(int32_t top_k, const TensorView& target, const int32_t* target_rows, const TensorView& draft);

}  // namespace bebop
