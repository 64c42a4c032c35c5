// SPDX-License-Identifier: Apache-2.0
// The draft losses: one block a row, eight neighbouring values a thread and turn.
//
//   Normalize   one pass: every thread keeps its own largest logit and the sum of exponentials under it; the block joins them.
//   Forward     the same for the draft's row, then one pass over draft and target. The row (1 MB in float32 at V = 248,320) comes
//               from L2 the second time.
//   Backward    one pass over both, storing the gradient.
//   ChainLoss   one block over all bases.
//
// Bytes of memory a row in bf16: 2 V, 4 V and 6 V; at V = 248,320 and 4,096 rows 2, 4 and 6 GB (estimated: 0.5, 0.9 and 1.4 ms).
// Some 20, 60 and 45 float operations an id: at full memory speed an SM has about 40 for each two bytes, so all passes are bound
// by memory or close to it.

#include <algorithm>

#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/common/gpu.h"
#include "kernels/common/gpu_vector.h"
#include "kernels/draft_losses/draft_losses.h"
#include "kernels/draft_losses/draft_losses_row.h"

namespace bebop::cuda {
namespace {

using draft_losses::GradientForm;
using draft_losses::GradientPlan;
using draft_losses::kLargestLogit;
using draft_losses::kLowest;
using draft_losses::RowSums;
using gpu::kVector;

constexpr int kWarp = 32;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

// Σ over the block, in every thread and in one order. `scratch`: a double for each warp.
__device__ double BlockSum(double value, double* scratch) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(gpu::kAllLanes, value, offset);
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();  // nobody reads the last sum's scratch any more
  if (thread % kWarp == 0) scratch[thread / kWarp] = value;
  __syncthreads();
  double sum = 0.0;
  for (int warp = 0; warp < kWarps; ++warp) sum += scratch[warp];
  return sum;
}
__device__ float BlockMax(float value, double* scratch) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(gpu::kAllLanes, value, offset));
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (thread % kWarp == 0) scratch[thread / kWarp] = value;
  __syncthreads();
  float max = kLowest;
  for (int warp = 0; warp < kWarps; ++warp) max = fmaxf(max, static_cast<float>(scratch[warp]));
  return max;
}

// The normalizer of one row, in every thread of the block.
__device__ LogitNormalizer NormalizeRow(const TensorView& logits, int64_t row, double* scratch) {
  float max = kLowest;
  double sum = 0.0;
  float broken = 0.0f;  // NaN once a logit is not finite
  for (int64_t col = static_cast<int64_t>(threadIdx.x) * kVector; col < logits.cols; col += kThreads * kVector) {
    float values[kVector];
    gpu::Load8(logits.data, logits.dtype, row * logits.row_stride + col, values);
    float new_max = max;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      new_max = fmaxf(new_max, values[i]);
      broken += values[i] * 0.0f;
    }
    if (new_max > max) {
      sum *= exp(static_cast<double>(max) - static_cast<double>(new_max));
      max = new_max;
    }
    float partial = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) partial += expf(values[i] - max);
    sum += static_cast<double>(partial);
  }
  LogitNormalizer out;
  out.max = BlockMax(max, scratch);
  // A thread without ids, or with broken ones only, has nothing to move.
  const double moved = sum == 0.0 ? 0.0 : sum * exp(static_cast<double>(max) - static_cast<double>(out.max));
  out.sum = BlockSum(moved, scratch);
  out.finite = BlockSum(static_cast<double>(broken), scratch) == 0.0 && out.max > -kLargestLogit && out.max < kLargestLogit;
  return out;
}

struct RowConstants {
  float draft_max, draft_scale;
  float target_max, target_scale;
  float log_sum_difference;
};
__device__ RowConstants MakeConstants(const LogitNormalizer& draft, const LogitNormalizer& target) {
  return {draft.max, static_cast<float>(1.0 / draft.sum), target.max, static_cast<float>(1.0 / target.sum),
          static_cast<float>(log(draft.sum) - log(target.sum))};
}

// What both passes over draft and target need of an id, by the same operations with one rounding each: the S of the forward pass
// is the sum of just the q for which the backward pass finds q <= p.
struct Pair {
  float draft_shifted, target_shifted;
  float draft_prob, target_prob;
  float log_ratio;
};
__device__ Pair MakePair(float draft, float target, const RowConstants& constants) {
  Pair pair;
  pair.draft_shifted = __fsub_rn(draft, constants.draft_max);
  pair.target_shifted = __fsub_rn(target, constants.target_max);
  pair.draft_prob = __fmul_rn(expf(pair.draft_shifted), constants.draft_scale);
  pair.target_prob = __fmul_rn(expf(pair.target_shifted), constants.target_scale);
  pair.log_ratio = __fsub_rn(__fsub_rn(pair.draft_shifted, pair.target_shifted), constants.log_sum_difference);
  return pair;
}

__global__ void __launch_bounds__(kThreads) NormalizeKernel(TensorView logits, LogitNormalizer* normalizers) {
  __shared__ double scratch[kWarps];
  const LogitNormalizer normalizer = NormalizeRow(logits, blockIdx.x, scratch);
  if (threadIdx.x == 0) normalizers[blockIdx.x] = normalizer;
}

__global__ void __launch_bounds__(kThreads) ForwardKernel(DraftLossArgs args) {
  __shared__ double scratch[kWarps];
  const int64_t row_idx = blockIdx.x;
  const int64_t target_row = args.target_rows[row_idx];
  DraftLossRow row;
  // The whole block takes the same branches.
  if (target_row < 0) {
    if (threadIdx.x == 0) args.rows[row_idx] = row;
    return;
  }
  const LogitNormalizer target = args.target_normalizers[target_row];
  row.draft = NormalizeRow(args.draft, row_idx, scratch);
  row.finite = row.draft.finite && target.finite;
  if (!row.finite) {
    if (threadIdx.x == 0) args.rows[row_idx] = row;
    return;
  }
  const RowConstants constants = MakeConstants(row.draft, target);
  RowSums sums;
  for (int64_t col = static_cast<int64_t>(threadIdx.x) * kVector; col < args.draft.cols; col += kThreads * kVector) {
    float draft[kVector], targets[kVector];
    gpu::Load8(args.draft.data, args.draft.dtype, row_idx * args.draft.row_stride + col, draft);
    gpu::Load8(args.target.data, args.target.dtype, target_row * args.target.row_stride + col, targets);
    float overlap = 0.0f, covered = 0.0f, target_ratio = 0.0f, draft_ratio = 0.0f, target_shifted = 0.0f, draft_shifted = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const Pair pair = MakePair(draft[i], targets[i], constants);
      overlap += fminf(pair.draft_prob, pair.target_prob);
      covered += pair.draft_prob <= pair.target_prob ? pair.draft_prob : 0.0f;
      target_ratio = fmaf(pair.target_prob, pair.log_ratio, target_ratio);
      draft_ratio = fmaf(pair.draft_prob, pair.log_ratio, draft_ratio);
      target_shifted = fmaf(pair.target_prob, pair.target_shifted, target_shifted);
      draft_shifted = fmaf(pair.draft_prob, pair.draft_shifted, draft_shifted);
    }
    sums.overlap += static_cast<double>(overlap);
    sums.covered += static_cast<double>(covered);
    sums.target_log_ratio += static_cast<double>(target_ratio);
    sums.draft_log_ratio += static_cast<double>(draft_ratio);
    sums.target_shifted += static_cast<double>(target_shifted);
    sums.draft_shifted += static_cast<double>(draft_shifted);
  }
  sums.overlap = BlockSum(sums.overlap, scratch);
  sums.covered = BlockSum(sums.covered, scratch);
  sums.target_log_ratio = BlockSum(sums.target_log_ratio, scratch);
  sums.draft_log_ratio = BlockSum(sums.draft_log_ratio, scratch);
  sums.target_shifted = BlockSum(sums.target_shifted, scratch);
  sums.draft_shifted = BlockSum(sums.draft_shifted, scratch);
  if (threadIdx.x != 0) return;
  double token_logit = 0.0;
  if (args.loss == DraftLoss::kCrossEntropy) {
    const int64_t at = row_idx * args.draft.row_stride + args.tokens[row_idx];
    token_logit = args.draft.dtype == DType::kFloat32 ? static_cast<const float*>(args.draft.data)[at]
                                                      : ToFloat(static_cast<const BFloat16*>(args.draft.data)[at]);
  }
  draft_losses::FinishRow(args.loss, sums, target, row.draft.max, row.draft.sum, token_logit, &row);
  args.rows[row_idx] = row;
}

__global__ void __launch_bounds__(kThreads) BackwardKernel(DraftLossGradientArgs args) {
  const DraftLossArgs& forward = args.forward;
  const int64_t row_idx = blockIdx.x;
  const int64_t target_row = forward.target_rows[row_idx];
  const DraftLossRow row = forward.rows[row_idx];
  const GradientPlan plan = draft_losses::PlanGradient(forward.loss, row, args.row_weights[row_idx]);
  const bool zero = target_row < 0 || (plan.scale == 0.0 && plan.shift == 0.0);
  RowConstants constants = {};
  if (!zero) constants = MakeConstants(row.draft, forward.target_normalizers[target_row]);
  const float scale = static_cast<float>(plan.scale), shift = static_cast<float>(plan.shift);
  for (int64_t col = static_cast<int64_t>(threadIdx.x) * kVector; col < forward.draft.cols; col += kThreads * kVector) {
    float gradient[kVector] = {};
    if (!zero) {
      float draft[kVector], target[kVector] = {};
      gpu::Load8(forward.draft.data, forward.draft.dtype, row_idx * forward.draft.row_stride + col, draft);
      if (plan.form != GradientForm::kDraftMass) {
        gpu::Load8(forward.target.data, forward.target.dtype, target_row * forward.target.row_stride + col, target);
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const Pair pair = MakePair(draft[i], target[i], constants);
        switch (plan.form) {
          case GradientForm::kDraftMass: {
            const bool is_token = col + i == static_cast<int64_t>(forward.tokens[row_idx]);
            gradient[i] = scale * pair.draft_prob - (is_token ? scale : 0.0f);
            break;
          }
          case GradientForm::kDifference:
            gradient[i] = scale * (pair.draft_prob - pair.target_prob);
            break;
          case GradientForm::kLogRatio:
            gradient[i] = pair.draft_prob * (scale * pair.log_ratio - shift);
            break;
          case GradientForm::kCoveredMass:
            gradient[i] = pair.draft_prob * (shift - (pair.draft_prob <= pair.target_prob ? scale : 0.0f));
            break;
        }
      }
    }
    gpu::Store8(args.gradient.data, args.gradient.dtype, row_idx * args.gradient.row_stride + col, gradient);
  }
}

__global__ void __launch_bounds__(kThreads) ChainLossKernel(ChainLossArgs args, ChainLossResult* result) {
  __shared__ double scratch[kWarps];
  double loss = 0.0, broken = 0.0;
  for (int64_t base = threadIdx.x; base < args.num_bases; base += kThreads) {
    const ChainLossResult chain = draft_losses::FinishChain(args, base);
    loss += chain.loss;
    broken += chain.finite ? 0.0 : 1.0;
  }
  loss = BlockSum(loss, scratch);
  broken = BlockSum(broken, scratch);
  if (threadIdx.x != 0) return;
  result->loss = loss;
  result->finite = broken == 0.0 && loss - loss == 0.0;
}

void CheckArgs(const DraftLossArgs& args) {
  BEBOP_CHECK(args.draft.cols >= 1 && args.draft.cols == args.target.cols);
  BEBOP_CHECK(gpu::RowsAligned(args.draft) && gpu::RowsAligned(args.target));
  BEBOP_CHECK(args.loss != DraftLoss::kCrossEntropy || args.tokens != nullptr || args.draft.rows == 0);
}

dim3 Blocks(const TensorView& rows) { return dim3(static_cast<unsigned>(rows.rows)); }

}  // namespace

void Normalize(const TensorView& logits, LogitNormalizer* normalizers, Stream& stream) {
  BEBOP_CHECK(logits.cols >= 1 && gpu::RowsAligned(logits));
  if (logits.rows == 0) return;
  BEBOP_CUDA_TRY(stream,
                 gpu::Launch(NormalizeKernel, Blocks(logits), dim3(kThreads), 0, stream.handle(), logits, normalizers));
}

void DraftLossForward(const DraftLossArgs& args, Stream& stream) {
  CheckArgs(args);
  if (args.draft.rows == 0) return;
  BEBOP_CUDA_TRY(stream, gpu::Launch(ForwardKernel, Blocks(args.draft), dim3(kThreads), 0, stream.handle(), args));
}

void ChainLoss(const ChainLossArgs& args, ChainLossResult* result, Stream& stream) {
  BEBOP_CHECK(args.num_steps >= 1 && args.num_bases >= 0);
  BEBOP_CUDA_TRY(stream, gpu::Launch(ChainLossKernel, dim3(1), dim3(kThreads), 0, stream.handle(), args, result));
}

void DraftLossBackward(const DraftLossGradientArgs& args, Stream& stream) {
  CheckArgs(args.forward);
  BEBOP_CHECK(args.gradient.rows == args.forward.draft.rows && args.gradient.cols == args.forward.draft.cols);
  BEBOP_CHECK(gpu::RowsAligned(args.gradient));
  if (args.gradient.rows == 0) return;
  BEBOP_CUDA_TRY(stream, gpu::Launch(BackwardKernel, Blocks(args.gradient), dim3(kThreads), 0, stream.handle(), args));
}

}  // namespace bebop::cuda
