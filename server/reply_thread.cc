// SPDX-License-Identifier: Apache-2.0
#include "server/reply_thread.h"

#include <utility>

namespace bebop {

ReplyThread::ReplyThread() : thread_([this] { Work(); }) {}

ReplyThread::~ReplyThread() {
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    changed_.NotifyAll();
  }
  thread_.join();
}

void ReplyThread::Add(std::function<void()> task) {
  MutexLock lock(&mutex_);
  tasks_.push_back(std::move(task));
  ++num_added_;
  changed_.NotifyAll();
}

void ReplyThread::Flush() {
  MutexLock lock(&mutex_);
  const int64_t num_before = num_added_;
  while (num_done_ < num_before) changed_.Wait(&mutex_);
}

void ReplyThread::Work() {
  while (true) {
    std::function<void()> task;
    {
      MutexLock lock(&mutex_);
      while (tasks_.empty() && !stopping_) changed_.Wait(&mutex_);
      if (tasks_.empty()) return;
      task = std::move(tasks_.front());
      tasks_.pop_front();
    }
    task();
    task = nullptr;
    MutexLock lock(&mutex_);
    ++num_done_;
    changed_.NotifyAll();
  }
}

}  // namespace bebop
