// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/iteration_graphs.h"

namespace bebop {

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
