// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "engine/base/mutex.h"

namespace bebop {

// Makes the replies that take long, in the order of Add, so that the engine's thread need not while everybody waits for its lock: a
// sample that is cut short brings all of itself along in a handle, and a pause or a commit may cut thousands short at once. Thread
// safe.
//
// The queue has no limit of its own: what waits are samples of calls that the engine had accepted, and what their streams say after
// them. Nor has Flush, and so a drain lasts longer than its deadline by the time that the handles take, which grows with the tokens
// of all samples that the deadline cut short: giving up would lose these tokens.
class ReplyThread {
 public:
  ReplyThread();
  ~ReplyThread();  // when everything that was added is done
  ReplyThread(const ReplyThread&) = delete;
  ReplyThread& operator=(const ReplyThread&) = delete;

  void Add(std::function<void()> task);
  void Flush();  // returns when everything that was added before is done, and destroyed

 private:
  void Work();

  Mutex mutex_;
  CondVar changed_;
  std::deque<std::function<void()>> tasks_ ABSL_GUARDED_BY(mutex_);
  int64_t num_added_ ABSL_GUARDED_BY(mutex_) = 0, num_done_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace bebop
