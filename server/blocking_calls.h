// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "engine/base/mutex.h"

namespace bebop {

// Threads for handlers that block (a commit waits for a step, a pause for samples), so that gRPC's few never do. Thread safe.
class BlockingCalls {
 public:
  explicit BlockingCalls(int num_threads);
  ~BlockingCalls();  // Stop()
  BlockingCalls(const BlockingCalls&) = delete;
  BlockingCalls& operator=(const BlockingCalls&) = delete;

  // Runs `call` on one of the threads, in the order of calls. False: stopped, or kMaxWaiting calls wait already; then `call` will not run.
  bool Run(std::function<void()> call);
  // Waits for the calls that were taken. Repeating it is harmless.
  void Stop();

  static constexpr size_t kMaxWaiting = 64;

 private:
  void Work();

  Mutex mutex_;
  CondVar changed_;
  std::deque<std::function<void()>> waiting_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace bebop
