// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/iteration_graphs.h"

#include <algorithm>
#include <iterator>

#include "kernels/common/check.h"

namespace bebop {

int32_t BatchBucket(int32_t count, int32_t max_num_seqs) {
  static constexpr int32_t kBuckets[] = {1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256};
  BEBOP_CHECK(count >= 1 && count <= max_num_seqs);
  const int32_t* const bucket = std::lower_bound(std::begin(kBuckets), std::end(kBuckets), count);
  return std::min(bucket != std::end(kBuckets) ? *bucket : (count + 63) / 64 * 64, max_num_seqs);
}

int32_t LengthClass(int32_t needed, int32_t shortest, int32_t most) {
  int32_t bound = std::min(shortest, most);
  while (bound < std::min(needed, most)) bound = bound > most / 4 ? most : bound * 4;
  return bound;
}

IterationGraphs::~IterationGraphs() {
  for (const auto& [key, graph] : graphs_) {
    if (graph != nullptr) (void)cudaGraphExecDestroy(graph);
  }
}

void IterationGraphs::Run(const IterationKey& key, absl::FunctionRef<void()> enqueue) {
  if (!enabled_) return enqueue();
  const auto [entry, first] = graphs_.try_emplace(key, nullptr);
  if (first) return enqueue();
  if (entry->second == nullptr) entry->second = Capture(enqueue);
  BEBOP_CUDA_TRY(stream_, cudaGraphLaunch(entry->second, stream_.handle()));
}

cudaGraphExec_t IterationGraphs::Capture(absl::FunctionRef<void()> enqueue) {
  // Thread local: other threads, such as one that loads weights, may go on allocating.
  BEBOP_CUDA_TRY(stream_, cudaStreamBeginCapture(stream_.handle(), cudaStreamCaptureModeThreadLocal));
  enqueue();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  BEBOP_CUDA_TRY(stream_, cudaStreamEndCapture(stream_.handle(), &graph));
  BEBOP_CUDA_TRY(stream_, cudaGraphInstantiate(&executable, graph, 0));
  if (graph != nullptr) (void)cudaGraphDestroy(graph);
  if (executable != nullptr) ++num_captured_;
  return executable;
}

}  // namespace bebop
