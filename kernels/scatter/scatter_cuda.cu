// SPDX-License-Identifier: Apache-2.0
// Scatter: a block a write, whose threads copy word by word. A few KB in all: latency bound (two dependent loads and the launch).

#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/common/gpu.h"
#include "kernels/scatter/scatter.h"

namespace bebop::cuda {
namespace {

// Most writes are one or two words; the longest, a page table or a list of ids, a few thousand.
constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) ScatterKernel(const ScatterWrite* writes, const uint32_t* words) {
  const ScatterWrite write = writes[blockIdx.x];
  uint32_t* const destination = static_cast<uint32_t*>(write.destination);
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < write.num_words; i += kThreads)
    destination[i] = words[write.source + i];
}

}  // namespace

void Scatter(const ScatterArgs& args, Stream& stream) {
  BEBOP_CHECK(args.num_writes >= 0);
  if (args.num_writes == 0) return;
  BEBOP_CUDA_TRY(stream, gpu::Launch(ScatterKernel, dim3(static_cast<unsigned>(args.num_writes)), dim3(kThreads), 0,
                                     stream.handle(), args.writes, args.words));
}

}  // namespace bebop::cuda
