// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <deque>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "engine/base/mutex.h"
#include "server/limits.h"

namespace bebop {

// Threads for handlers that block (a commit waits for a step, a pause for samples), so that gRPC's few never do. Some threads are for short
// handlers alone (a look, an abort, a resume), which therefore never wait behind the others. Thread safe.
class BlockingCalls {
 public:
  explicit BlockingCalls(int num_threads, int num_short_threads = limits::kShortCalls);
  ~BlockingCalls();  // Stop()
  BlockingCalls(const BlockingCalls&) = delete;
  BlockingCalls& operator=(const BlockingCalls&) = delete;

  // Runs `call` on one of the threads, in the order of calls. False: stopped, or kMaxWaiting calls wait already; then `call` will not run.
  bool Run(std::function<void()> call) { return Add(&long_, std::move(call)); }
  // The same on the threads for short calls: `call` must not wait for longer than a step of the engine. REQUIRES: there are such threads.
  bool RunShort(std::function<void()> call) { return Add(&short_, std::move(call)); }
  // Waits for the calls that were taken. Repeating it is harmless.
  void Stop();

  static constexpr size_t kMaxWaiting = limits::kQueuedCalls;  // of either kind

 private:
  struct Queue {
    CondVar changed;
    std::deque<std::function<void()>> waiting;  // guarded by mutex_
  };

  bool Add(Queue* queue, std::function<void()> call);
  void Work(Queue* queue);

  Mutex mutex_;
  Queue long_, short_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace bebop
