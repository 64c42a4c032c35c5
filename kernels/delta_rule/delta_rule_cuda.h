// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/gpu.h"
#include "kernels/common/gpu_vector.h"
#include "kernels/delta_rule/delta_rule.h"

// What the device's step form (delta_rule_cuda.cu) and chunked form (delta_rule_chunks_cuda.cu) share. For these two files only.
namespace bebop::cuda {

// A chunk is what a pass has of the rows between two absolute multiples of 64. Shorter ones take the step form: a chunk costs as
// much as some 30 steps, however short. This depends on positions and where the pass ends, not on where it begins at such a
// multiple, so cuts there change no bit.
inline constexpr int32_t kMaxStepRows = 32;
inline constexpr int32_t kChunkRows = 64;
inline constexpr int32_t kChunkHeadDim = 128;  // the one dk and dv with a chunked form (in bf16)

// The rows [begin, end) of a sequence that take the chunked form in a call that has one: prefill rows; those before and behind are short
// chunks, or no prefill rows. In device and host code.
struct ChunkRange {
  int32_t begin;
  int32_t end;
};
__host__ __device__ inline ChunkRange ChunkRangeOf(const SequenceRows& sequence) {
  const int32_t prefill = sequence.num_prefill_rows;
  const int32_t left = (kChunkRows - sequence.first_position % kChunkRows) % kChunkRows;  // up to the first multiple
  if (left >= prefill) return prefill > kMaxStepRows ? ChunkRange{0, prefill} : ChunkRange{prefill, prefill};
  const int32_t behind = (prefill - left) % kChunkRows;  // from the last multiple on
  const ChunkRange range = {left > kMaxStepRows ? 0 : left, behind > kMaxStepRows ? prefill : prefill - behind};
  return range.begin < range.end ? range : ChunkRange{prefill, prefill};
}

using gpu::Bf16Bits;

struct Gate {
  float log_decay;
  float beta;
};

// Every rounding is explicit, so that all kernels get the same bits from the same inputs. The quick quotient is good to 2 ulp,
// and to 1e-38.
template <typename T>
__device__ inline Gate GateOf(const DeltaRuleArgs& args, int64_t row, int32_t head) {
  const float x = __fadd_rn(gpu::ToValue(gpu::Row<const T>(args.a, row)[head]), args.dt_bias[head]);
  const float softplus = __fadd_rn(fmaxf(x, 0.0f), log1pf(expf(-fabsf(x))));
  const float b = gpu::ToValue(gpu::Row<const T>(args.b, row)[head]);
  return {__fmul_rn(-expf(args.a_log[head]), softplus), __fdividef(1.0f, __fadd_rn(1.0f, expf(-b)))};
}

__device__ inline float* MatrixOf(const LinearStateView& state, int64_t slot, int64_t head) {
  return state.matrix + (slot * state.num_value_heads + head) * state.key_head_dim * state.value_head_dim;
}

// Enqueues ChunkRangeOf of all sequences. The state before is in slot state_dst where the step form has run rows, else in slot
// state_src. REQUIRES: bf16, dk = dv = kChunkHeadDim, rows aligned to 16 bytes.
void DeltaRuleChunks(const DeltaRuleArgs& args, Stream& stream);

}  // namespace bebop::cuda
