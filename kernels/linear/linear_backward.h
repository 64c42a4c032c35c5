// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/tensor_view.h"
#include "kernels/common/thread_pool.h"
#include "kernels/linear/linear.h"
#include "kernels/linear/packed_matrix.h"

namespace bebop {

// Backward of y = x Wᵀ with W [N, K] row-major in float32 (training keeps its weights as rows and packs them once a step):
//   dx = dy W      is Linear with the packed transpose of W (PackTransposed)
//   dW = dyᵀ x     is LinearBackwardWeight
// Both run on the tiles of Linear, so they have its rate, and bits that do not depend on the thread count.

// dw (+)= dyᵀ x. x: [T, K], dy: [T, N], dw: [N, K], all float32; dw aliases neither.
// Every element is one float32 sum over the rows in their order; with `accumulate` it goes on from what dw holds.
struct LinearBackwardWeightArgs {
  TensorView x;
  TensorView dy;
  bool accumulate = false;
  TensorView dw;
};

namespace cpu {

// The buffers of LinearBackwardWeight: transposes of a block of rows. Grows to its largest use and stays. One call at a time.
class LinearBackwardScratch {
 public:
  LinearBackwardScratch() = default;
  ~LinearBackwardScratch();
  LinearBackwardScratch(const LinearBackwardScratch&) = delete;
  LinearBackwardScratch& operator=(const LinearBackwardScratch&) = delete;
  float* Reserve(int64_t count);  // at least `count` floats, 64-byte aligned; what it held is lost
  LinearScratch& linear() { return linear_; }

 private:
  float* data_ = nullptr;
  int64_t capacity_ = 0;
  LinearScratch linear_;
};

// destination <- packed W [rows, cols] of the float32 matrix `w`, padding included. PackedBytes(kFloat32, rows, cols) bytes,
// 64-byte aligned.
PackedMatrix PackFloat(const TensorView& w, float* destination, ThreadPool& pool);
// destination <- packed Wᵀ [w.cols, w.rows], padding included. PackedBytes(kFloat32, w.cols, w.rows) bytes, 64-byte aligned.
PackedMatrix PackTransposed(const TensorView& w, float* destination, ThreadPool& pool);

void LinearBackwardWeight(const LinearBackwardWeightArgs& args, LinearBackwardScratch& scratch, ThreadPool& pool);

}  // namespace cpu
}  // namespace bebop
