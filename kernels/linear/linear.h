// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>

#include "kernels/common/cpu_features.h"
#include "kernels/common/stream.h"
#include "kernels/common/tensor_view.h"
#include "kernels/common/thread_pool.h"
#include "kernels/linear/packed_matrix.h"

namespace bebop {

// y = x Wᵀ.
//   x: [T, K] float32. With bf16 weights x is rounded to bf16 first (as the reference network does); products accumulate in float32.
//   w: [N, K] packed, bf16 or float32; its padding must be zero.
//   y: [T, N] float32 (N = w.rows; padding rows are not written). Must not alias x. T = 0 does nothing.
//
// Every y[t, n] is one float32 sum over the columns in their order. How it rounds depends on the instruction set (with kAvx512Bf16
// also on the maker of the processor) alone, never on T, the thread count or the other rows: a row alone and the same row in a batch
// of 512 agree bit for bit, also when another row holds a NaN. |error| <= (K + 1) 2^-24 sum |x| |w| to first order, for the x and w
// after their rounding (docs/numerics.md). kAvx512Bf16 takes denormal x and w as zero.
//
// The weights are read from memory once a call. Where they do not fit in the caches, a few rows (about 8 on two Zen 4 cores) cost
// little more than one.
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
  // Makes room for x of `rows` x `cols` (and every smaller product), so that later calls do not allocate. Takes 4 bytes a value,
  // cols rounded up to kPanelCols. What it held is lost.
  void Reserve(int64_t rows, int64_t cols);
  uint32_t* data() const { return data_; }
  int64_t capacity() const { return capacity_; }

 private:
  uint32_t* data_ = nullptr;  // 64-byte aligned
  int64_t capacity_ = 0;      // values
};

// Runs on `pool` with the detected instruction set. Shapes that do not fit together are our own bug (BEBOP_CHECK). Allocates only
// when `scratch` has to grow.
void Linear(const LinearArgs& args, LinearScratch& scratch, ThreadPool& pool);
// The same with a chosen set (tests, benchmarks). REQUIRES: the processor has it.
void LinearWith(InstructionSet set, const LinearArgs& args, LinearScratch& scratch, ThreadPool& pool);

}  // namespace cpu

struct LinearBackwardWeightArgs;  // kernels/linear/linear_backward.h

namespace cuda {

struct LinearBackwardScratch;  // kernels/linear/linear_backward.h

// Chooses and caches how to run a product on the device: our small-row kernel (few rows: the weights are read once at memory
// speed) or a cuBLASLt plan. A plan is made at the first use of a shape (sizes, strides, alignments, layouts, type of y), which
// allocates and asks cuBLASLt's heuristic: warm up before a graph is captured or a steady step begins. T is the exact number of rows, since
// rows beyond it are not ours to write; of prompts of many lengths the kMaxPlans plans used last are kept. With the stream's
// batch_invariant, every T takes our own kernel with tiles and a K order that depend on N and K alone, so a row's bits do not
// depend on T.
class LinearPlans {
 public:
  static constexpr int64_t kMaxPlans = 1024;  // about a hundred chunk lengths with the ten products of a model

  explicit LinearPlans(Stream* stream);  // must outlive the plans
  ~LinearPlans();
  LinearPlans(const LinearPlans&) = delete;
  LinearPlans& operator=(const LinearPlans&) = delete;
  int64_t num_plans() const;  // of cuBLASLt, now

 private:
  friend void Linear(const LinearArgs& args, LinearPlans& plans, Stream& stream);
  friend void LinearBackwardWeight(const LinearBackwardWeightArgs& args, LinearPlans& plans, const LinearBackwardScratch& scratch,
                                   Stream& stream);
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Enqueues y = x Wᵀ; w in rows (MatrixLayout::kRows). bf16 weights: x bf16, y bf16 or float32. float32 weights: x and y float32,
// plain float32 products. K a multiple of 8; x.row_stride too. bf16 weights may also lie in columns (kColumns; N a multiple of
// 8), which always is a plan of cuBLASLt.
void Linear(const LinearArgs& args, LinearPlans& plans, Stream& stream);

}  // namespace cuda
}  // namespace bebop
