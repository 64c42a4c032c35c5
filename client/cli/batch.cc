// SPDX-License-Identifier: Apache-2.0
#include "client/cli/batch.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace bebop {

void RunOrdered(size_t count, int32_t concurrency, const std::function<void(size_t)>& call, const std::function<void(size_t)>& print) {
  std::mutex mutex;
  std::condition_variable finished;
  std::vector<bool> done(count, false);  // guarded by `mutex`
  std::atomic<size_t> next = 0;
  const auto work = [&] {
    for (size_t i = next++; i < count; i = next++) {
      call(i);
      const std::lock_guard<std::mutex> lock(mutex);
      done[i] = true;
      finished.notify_one();
    }
  };
  std::vector<std::thread> threads;
  const size_t num_threads = std::min(count, static_cast<size_t>(std::max(1, concurrency)));
  for (size_t i = 0; i < num_threads; ++i) threads.emplace_back(work);
  for (size_t i = 0; i < count; ++i) {
    {
      std::unique_lock<std::mutex> lock(mutex);
      finished.wait(lock, [&] { return done[i]; });
    }
    print(i);
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace bebop
