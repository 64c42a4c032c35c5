// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <compare>
#include <cstdint>
#include <map>
#include <vector>

#include "absl/functional/function_ref.h"
#include "kernels/common/cuda_stream.h"

namespace bebop {

// What shapes an iteration's launches.
struct IterationKey {
  int32_t bucket = 0;         // sequences, with padding
  int32_t num_drafts = 0;     // γ of the pass
  int32_t max_positions = 0;  // bound of what a row attends to
  auto operator<=>(const IterationKey&) const = default;
};

// The batch size that `count` sequences are captured with: at most three eighths of a batch is padding, a third from 9 sequences
// on and a fifth from 129 on; an engine of 256 sequences has 16 sizes. The largest is max_num_seqs itself: no more rows than the
// engine was sized for. REQUIRES: 1 <= count <= max_num_seqs.
int32_t BatchBucket(int32_t count, int32_t max_num_seqs);

// The bound of attended positions that an iteration is captured with: `shortest` times a power of four, or the most there is. A
// launch over a long bound that finds short sequences wastes some blocks that return at once, but one class for all lengths would
// give short sequences the splits that were chosen for long ones. `needed` may overestimate: beyond `most` there is nothing.
int32_t LengthClass(int32_t needed, int32_t shortest, int32_t most);

// The captured iterations of an engine: a few hundred launches become one. An iteration of a key is enqueued kernel by kernel the
// first time, which makes the libraries' plans and loads the kernels (neither may happen under capture), captured at its second
// time, and replayed from then on. Capturing takes host time and memory once a key; what ran once may never come again.
//
// Graphs live in device memory, and requests of many draft numbers under a changing load have hundreds of keys. So there are at
// most `max_graphs`: a new one takes the place of the one that ran longest ago. When the device has no memory for another one, no
// more are made; iterations without one are enqueued kernel by kernel, which is slower and otherwise the same.
//
// Not thread safe: the engine thread.
class IterationGraphs {
 public:
  static constexpr int32_t kMaxGraphs = 64;

  // Not `enabled`: everything is enqueued kernel by kernel. REQUIRES: max_graphs is more than the iterations that may be in flight, so
  // that a graph that gives way is not running.
  IterationGraphs(bool enabled, cuda::Stream* stream, int32_t max_graphs = kMaxGraphs)
      : wanted_(enabled), enabled_(enabled), max_graphs_(max_graphs), stream_(*stream) {}
  ~IterationGraphs();
  IterationGraphs(const IterationGraphs&) = delete;
  IterationGraphs& operator=(const IterationGraphs&) = delete;

  // Enqueues the iteration. `enqueue` must enqueue the same work for the same key, from one Invalidate to the next.
  void Run(const IterationKey& key, absl::FunctionRef<void()> enqueue);
  // What was captured so far is never launched again, because addresses in it are no longer right: each key starts over. The graphs
  // themselves go one by one, each after an iteration has been enqueued, so that the device does not wait while the host takes
  // them apart. REQUIRES: none of them runs.
  void Invalidate();
  // The same, and all of them go at once.
  void Clear();
  int32_t num_captured() const { return num_captured_; }  // ever
  int32_t num_graphs() const { return num_graphs_; }      // that can be launched now
  // Those that still take memory, stale ones included: at most max_graphs.
  int32_t num_held() const { return num_graphs_ + static_cast<int32_t>(stale_.size()); }

 private:
  struct Entry {
    cudaGraphExec_t graph = nullptr;  // null: the key has run once
    uint64_t last_run = 0;
  };

  void Enqueue(const IterationKey& key, absl::FunctionRef<void()> enqueue);
  // Null when capturing failed (the stream says why) or there is no memory for another graph.
  cudaGraphExec_t Capture(absl::FunctionRef<void()> enqueue);
  void DropOldest();
  void DropStale();  // one

  const bool wanted_;
  bool enabled_;  // may make graphs: wanted, and there was memory for the last one
  const int32_t max_graphs_;
  cuda::Stream& stream_;
  std::map<IterationKey, Entry> graphs_;
  std::vector<cudaGraphExec_t> stale_;  // invalidated
  uint64_t num_runs_ = 0;
  int32_t num_captured_ = 0, num_graphs_ = 0;
};

}  // namespace bebop
