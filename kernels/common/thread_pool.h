// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace bebop {

// A fixed set of worker threads for the CPU kernels: the CPU's counterpart of a device stream.
//
// ParallelFor splits [0, count) into at most num_threads() contiguous ranges that depend on `count`, `grain` and num_threads() only,
// runs them on the workers and the calling thread, and returns when all are done; what the ranges wrote is then visible to the
// caller. Results must not depend on the split: every kernel gives an output element to exactly one range. Not reentrant (a body
// must not call ParallelFor of the same pool), one caller at a time (the engine thread). No allocation per call.
//
// A worker that has nothing to do spins for a bounded time (tens of microseconds, so that the operators of one step find it awake),
// then sleeps. With more threads than processors nobody spins.
//
// Example:
//   ThreadPool pool(2);
//   pool.ParallelFor(rows, 1, [&](int64_t begin, int64_t end) { for (int64_t i = begin; i < end; ++i) y[i] = f(x[i]); });
class ThreadPool {
 public:
  // `num_threads` >= 1 counts the calling thread.
  explicit ThreadPool(int num_threads);
  // Joins the workers. REQUIRES: no ParallelFor is running.
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const;

  // Calls body(begin, end) for each range. `grain` >= 1: smallest range worth a thread; range borders are multiples of it.
  // count <= 0 calls nothing; a single range runs on the calling thread alone.
  template <typename Body>
  void ParallelFor(int64_t count, int64_t grain, Body&& body) {
    using BodyType = std::remove_reference_t<Body>;
    Run(count, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<BodyType*>(context))(begin, end); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  using RangeFunction = void (*)(void* context, int64_t begin, int64_t end);
  void Run(int64_t count, int64_t grain, RangeFunction function, void* context);

  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace bebop
