// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/linear/linear.h"

// Inside kernels/linear: the seam between the choice of a way (linear_plans.cc, host code) and our own kernels (linear_cuda.cu).
namespace bebop::cuda {

// Most rows of x for which our kernel is taken outside batch-invariant mode: there the weights' bytes are all the work, and the
// kernel reads them once, where a library's tiles of 64 rows and more leave much of the memory idle. More rows go to cuBLASLt.
inline constexpr int64_t kMaxStreamRows = 32;

// Columns of a pipeline stage, and rows of w of the smallest tile.
inline constexpr int64_t kStageCols = 64;
inline constexpr int64_t kTileRows = 64;

// Every sum over K is cut into `count` runs of `cols` columns (the last one may be shorter), which are added up in their order. A
// function of N and K alone, of the device neither, so that the bits of a row do not depend on T.
struct Splits {
  int64_t count = 1;
  int64_t cols = 0;  // a multiple of kStageCols
};

// Blocks that a product should have at least: about two for each multiprocessor of the largest device, which keep enough bytes in
// flight (40 KiB each) to hide the latency of memory.
inline constexpr int64_t kWantedBlocks = 264;
// A shorter run is not worth the partial sums that it writes and reads back.
inline constexpr int64_t kMinSplitCols = 256;
inline constexpr int64_t kMaxSplits = 32;

constexpr Splits SplitsOf(int64_t n, int64_t k) {
  const int64_t tiles = (n + kTileRows - 1) / kTileRows;
  const int64_t wanted = std::clamp<int64_t>(std::min(kWantedBlocks / tiles, k / kMinSplitCols), 1, kMaxSplits);
  const int64_t cols = RoundUp((k + wanted - 1) / wanted, kStageCols);
  return {(k + cols - 1) / cols, cols};
}

// Arrival counters of split products, one a tile: zero between launches.
inline constexpr int64_t kNumCounters = kWantedBlocks / 2;

// bf16 weights, any T >= 1. A row's bits depend on N and K alone. REQUIRES: kNumCounters zeros at `counters`, used by nobody
// else.
void LinearBf16(const LinearArgs& args, int32_t* counters, Stream& stream);
// float32 weights, any T >= 1. One chain of fmaf over the columns in their order for every output.
void LinearFloat32(const LinearArgs& args, Stream& stream);

}  // namespace bebop::cuda
