// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/common/cpu_features.h"
#include "kernels/common/tensor_view.h"
#include "kernels/common/thread_pool.h"
#include "kernels/linear/packed_matrix.h"

namespace bebop {

// y = x Wᵀ.
//   x: [T, K] float32. With bf16 weights x is rounded to bf16 first (as the reference network does); products accumulate in float32.
//   w: [N, K] packed, bf16 or float32.
//   y: [T, N] float32 (N = w.rows; padding rows are not written). Must not alias x.
//
// Every y[t, n] is accumulated over K in one fixed order that depends on the instruction set alone, never on T, the thread count or
// the other rows: a row alone and the same row in a batch of 512 agree bit for bit. Up to 16 rows stream the weights once.
struct LinearArgs {
  TensorView x;
  PackedMatrix w;
  TensorView y;
};

namespace cpu {

// Scratch for the packed copy of x: grows to its largest use and stays (the engine sizes it at start). One call at a time.
class LinearScratch {
 public:
  LinearScratch();
  ~LinearScratch();
  LinearScratch(const LinearScratch&) = delete;
  LinearScratch& operator=(const LinearScratch&) = delete;
  // Makes room for x of `rows` x `cols`, so that later calls up to this size do not allocate. Takes 4 bytes a value.
  void Reserve(int64_t rows, int64_t cols);
  uint32_t* data() const { return data_; }
  int64_t capacity() const { return capacity_; }

 private:
  uint32_t* data_ = nullptr;  // 64-byte aligned
  int64_t capacity_ = 0;      // values
};

// Runs on `pool` with the detected instruction set.
void Linear(const LinearArgs& args, LinearScratch& scratch, ThreadPool& pool);
// The same with a chosen set (tests). REQUIRES: the processor has it.
void LinearWith(InstructionSet set, const LinearArgs& args, LinearScratch& scratch, ThreadPool& pool);

}  // namespace cpu
}  // namespace bebop
