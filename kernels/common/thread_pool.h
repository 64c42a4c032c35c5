// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>

namespace bebop {

// A fixed set of worker threads for the CPU kernels: the CPU's counterpart of a device stream.
//
// ParallelFor splits [0, count) into at most num_threads() contiguous ranges that depend on `count` and num_threads() only, runs
// them on the workers and the calling thread, and returns when all are done. Results must not depend on the split: every kernel
// gives an output element to exactly one range. Not reentrant, one caller at a time (the engine thread). No allocation per call.
class ThreadPool {
 public:
  // `num_threads` >= 1 counts the calling thread.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const;

  // Calls body(begin, end) for each range. `grain`: smallest range worth a thread (alignment of range borders, too).
  template <typename Body>
  void ParallelFor(int64_t count, int64_t grain, Body&& body) {
    Run(count, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  using RangeFunction = void (*)(void* context, int64_t begin, int64_t end);
  void Run(int64_t count, int64_t grain, RangeFunction function, void* context);

  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace bebop
