// SPDX-License-Identifier: Apache-2.0
#include "server/blocking_calls.h"

#include <utility>

namespace bebop {

BlockingCalls::BlockingCalls(int num_threads) {
  for (int i = 0; i < num_threads; ++i) threads_.emplace_back([this] { Work(); });
}

BlockingCalls::~BlockingCalls() { Stop(); }

bool BlockingCalls::Run(std::function<void()> call) {
  MutexLock lock(&mutex_);
  if (stopping_ || waiting_.size() >= kMaxWaiting) return false;
  waiting_.push_back(std::move(call));
  changed_.NotifyOne();
  return true;
}

void BlockingCalls::Stop() {
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    changed_.NotifyAll();
  }
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

void BlockingCalls::Work() {
  while (true) {
    std::function<void()> call;
    {
      MutexLock lock(&mutex_);
      while (waiting_.empty() && !stopping_) changed_.Wait(&mutex_);
      if (waiting_.empty()) return;
      call = std::move(waiting_.front());
      waiting_.pop_front();
    }
    call();
  }
}

}  // namespace bebop
