// SPDX-License-Identifier: Apache-2.0
#include "server/blocking_calls.h"

namespace bebop {

BlockingCalls::BlockingCalls(int num_threads, int num_short_threads) {
  for (int i = 0; i < num_threads; ++i) threads_.emplace_back([this] { Work(&long_); });
  for (int i = 0; i < num_short_threads; ++i) threads_.emplace_back([this] { Work(&short_); });
}

BlockingCalls::~BlockingCalls() { Stop(); }

bool BlockingCalls::Add(Queue* queue, std::function<void()> call) {
  MutexLock lock(&mutex_);
  if (stopping_ || queue->waiting.size() >= kMaxWaiting) return false;
  queue->waiting.push_back(std::move(call));
  queue->changed.NotifyOne();
  return true;
}

void BlockingCalls::Stop() {
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    long_.changed.NotifyAll();
    short_.changed.NotifyAll();
  }
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

void BlockingCalls::Work(Queue* queue) {
  while (true) {
    std::function<void()> call;
    {
      MutexLock lock(&mutex_);
      while (queue->waiting.empty() && !stopping_) queue->changed.Wait(&mutex_);
      if (queue->waiting.empty()) return;
      call = std::move(queue->waiting.front());
      queue->waiting.pop_front();
    }
    call();
  }
}

}  // namespace bebop
