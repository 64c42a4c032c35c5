// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/attention/attention.h"

// The kernels behind cuda::Attention, by name (tests and benchmarks).
namespace bebop::cuda {

enum class AttentionKernel : uint8_t {
  kSplit,    // bf16; keys split over blocks, partial results merged
  kPrefill,  // bf16; a block has all keys of 64 (row, q head) pairs. No chain, not on a batch-invariant stream
  kFloat,    // float32
};

// From host values only: dtype, bounds of the batch, the stream's mode and its device.
AttentionKernel ChooseAttentionKernel(const AttentionArgs& args, const Stream& stream);
// REQUIRES: the kernel does what the arguments ask for.
void AttentionWith(AttentionKernel kernel, const AttentionArgs& args, Stream& stream);

}  // namespace bebop::cuda
