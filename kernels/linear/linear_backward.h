// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/stream.h"
#include "kernels/common/tensor_view.h"
#include "kernels/common/thread_pool.h"
#include "kernels/linear/linear.h"
#include "kernels/linear/packed_matrix.h"

namespace bebop {

// Backward of y = x Wᵀ with W [N, K] row-major in float32 (training keeps its weights as rows and packs them once a step):
//   dx = dy W      is Linear with the packed transpose of W (PackTransposed)
//   dW = dyᵀ x     is LinearBackwardWeight
// On the CPU both run on the tiles of Linear, so they have its rate, and bits that do not depend on the thread count.

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

// On the device, products round their float32 operands to bf16 (nearest even) and accumulate in float32; no operand is transposed
// in memory (linear_plans.cc). The order of a sum is cuBLASLt's, for the shape at hand.
namespace cuda {

// Where operands in bf16 go, for one call at a time: device memory aligned to 256 bytes. REQUIRES: 2 bytes for each value of an
// operand.
struct LinearBackwardScratch {
  void* operands[2] = {nullptr, nullptr};
  int64_t bytes = 0;  // of each
};

// to <- from, float32 or bf16 either side (rounded to nearest even): [T, C], rows aligned to 16 bytes, C a multiple of 8, no
// overlap.
void Convert(const TensorView& from, const TensorView& to, Stream& stream);

// destination <- W [rows, cols] of the float32 matrix `w` in bf16: 2·rows·cols bytes, aligned to 256. rows and cols multiples
// of 8. The same bytes serve as W (in rows) and as Wᵀ (in columns).
PackedMatrix PackBf16(const TensorView& w, void* destination, Stream& stream);
PackedMatrix PackBf16Transposed(const TensorView& w, void* destination, Stream& stream);
// Row by row: zeros.
void Clear(const TensorView& view, Stream& stream);

// y = x Wᵀ with x float32 or bf16, which is rounded to bf16 where the weights are. Else as Linear.
void LinearRounded(const LinearArgs& args, LinearPlans& plans, const LinearBackwardScratch& scratch, Stream& stream);
// x and dy as there; N and K multiples of 8, any T; rows of dw aligned to 16 bytes.
void LinearBackwardWeight(const LinearBackwardWeightArgs& args, LinearPlans& plans, const LinearBackwardScratch& scratch,
                          Stream& stream);

}  // namespace cuda
}  // namespace bebop
