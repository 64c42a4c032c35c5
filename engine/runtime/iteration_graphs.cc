// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/iteration_graphs.h"

#include <algorithm>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "engine/base/logging.h"
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
  Invalidate();
  for (const cudaGraphExec_t graph : stale_) (void)cudaGraphExecDestroy(graph);
}

void IterationGraphs::Invalidate() {
  for (const auto& [key, entry] : graphs_) {
    if (entry.graph != nullptr) stale_.push_back(entry.graph);
  }
  graphs_.clear();
  num_graphs_ = 0;
  enabled_ = wanted_;  // what becomes free may do for others
}

void IterationGraphs::Clear() {
  Invalidate();
  while (!stale_.empty()) DropStale();
}

void IterationGraphs::Run(const IterationKey& key, absl::FunctionRef<void()> enqueue) {
  Enqueue(key, enqueue);
  if (!stale_.empty()) DropStale();
}

void IterationGraphs::Enqueue(const IterationKey& key, absl::FunctionRef<void()> enqueue) {
  if (!enabled_ && num_graphs_ == 0) return enqueue();
  const auto [found, first] = graphs_.try_emplace(key);
  Entry& entry = found->second;
  entry.last_run = ++num_runs_;
  if (first) return enqueue();
  if (entry.graph == nullptr && enabled_) entry.graph = Capture(enqueue);
  if (entry.graph == nullptr) return enqueue();
  BEBOP_CUDA_TRY(stream_, cudaGraphLaunch(entry.graph, stream_.handle()));
}

void IterationGraphs::DropStale() {
  BEBOP_CUDA_TRY(stream_, cudaGraphExecDestroy(stale_.back()));
  stale_.pop_back();
}

void IterationGraphs::DropOldest() {
  auto oldest = graphs_.end();
  for (auto entry = graphs_.begin(); entry != graphs_.end(); ++entry) {
    if (entry->second.graph == nullptr) continue;
    if (oldest == graphs_.end() || entry->second.last_run < oldest->second.last_run) oldest = entry;
  }
  BEBOP_CUDA_TRY(stream_, cudaGraphExecDestroy(oldest->second.graph));
  graphs_.erase(oldest);  // its key must come twice again
  --num_graphs_;
}

cudaGraphExec_t IterationGraphs::Capture(absl::FunctionRef<void()> enqueue) {
  // Stale ones need not be counted: each run drops one, and a graph is captured in every second run at most.
  if (num_graphs_ == max_graphs_) DropOldest();
  // Thread local: other threads, such as one that loads weights, may go on allocating.
  BEBOP_CUDA_TRY(stream_, cudaStreamBeginCapture(stream_.handle(), cudaStreamCaptureModeThreadLocal));
  enqueue();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  BEBOP_CUDA_TRY(stream_, cudaStreamEndCapture(stream_.handle(), &graph));
  if (stream_.ok()) {
    const cudaError_t result = cudaGraphInstantiate(&executable, graph, 0);
    if (result == cudaErrorMemoryAllocation && !stale_.empty()) {
      (void)cudaGetLastError();  // not sticky
      executable = nullptr;
      while (!stale_.empty()) DropStale();  // the key's next run tries again
    } else if (result == cudaErrorMemoryAllocation) {
      (void)cudaGetLastError();
      executable = nullptr;
      enabled_ = false;
      Log(LogLevel::kWarning, absl::StrCat("no device memory for another captured iteration beside ", num_graphs_,
                                           "; the others run kernel by kernel. A lower gpu_memory_utilization leaves room"));
    } else {
      stream_.Note(result, "cudaGraphInstantiate", __FILE__, __LINE__);
    }
  }
  if (graph != nullptr) (void)cudaGraphDestroy(graph);
  if (executable == nullptr) return nullptr;
  ++num_captured_;
  ++num_graphs_;
  return executable;
}

}  // namespace bebop
