// SPDX-License-Identifier: Apache-2.0
#include "kernels/common/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "kernels/common/check.h"

namespace bebop {
namespace {

// How often a waiter looks before it sleeps: tens of microseconds (a pause is 10-50 ns). Longer than the serial stretches between
// two operators of a forward pass, so that the workers stay awake within a step; waking a sleeper costs as much again.
constexpr int kSpins = 1000;

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Waits until `value` is not `old`, and returns it.
int32_t WaitWhileEqual(const std::atomic<int32_t>& value, int32_t old, int spins) {
  for (int i = 0; i < spins; ++i) {
    const int32_t now = value.load(std::memory_order_acquire);
    if (now != old) return now;
    Pause();
  }
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

// One worker's mailbox, on cache lines of its own. The caller fills in the range and then bumps `posted`; the worker runs it and then
// bumps `done` to the same number. So each field has one writer, and a worker reads nothing that the caller may be writing.
struct alignas(128) Mailbox {
  std::atomic<int32_t> posted{0};
  void (*function)(void* context, int64_t begin, int64_t end) = nullptr;  // null: stop
  void* context = nullptr;
  int64_t begin = 0;
  int64_t end = 0;
  alignas(64) std::atomic<int32_t> done{0};
};

void Work(Mailbox& box, int spins) {
  for (int32_t seen = 0;;) {
    seen = WaitWhileEqual(box.posted, seen, spins);
    if (box.function == nullptr) return;
    box.function(box.context, box.begin, box.end);
    box.done.store(seen, std::memory_order_release);
    box.done.notify_one();
  }
}

// The numbers wrap around: unsigned arithmetic, and only equality is ever asked.
int32_t Next(int32_t number) { return static_cast<int32_t>(static_cast<uint32_t>(number) + 1); }

void Post(Mailbox& box) {
  box.posted.store(Next(box.posted.load(std::memory_order_relaxed)), std::memory_order_release);
  box.posted.notify_one();
}

}  // namespace

struct ThreadPool::State {
  explicit State(int num_threads) : boxes(static_cast<size_t>(num_threads - 1)) {
    // Spinning threads beyond the processors would keep the working ones from running.
    spins = num_threads <= static_cast<int>(std::thread::hardware_concurrency()) ? kSpins : 0;
    workers.reserve(boxes.size());
    for (Mailbox& box : boxes) workers.emplace_back([&box, spins = spins] { Work(box, spins); });
  }
  ~State() {
    for (Mailbox& box : boxes) {
      box.function = nullptr;
      Post(box);
    }
    for (std::thread& worker : workers) worker.join();
  }

  std::vector<Mailbox> boxes;
  std::vector<std::thread> workers;
  int spins = 0;
};

ThreadPool::ThreadPool(int num_threads) {
  BEBOP_CHECK(num_threads >= 1);
  state_ = std::make_unique<State>(num_threads);
}

ThreadPool::~ThreadPool() = default;

int ThreadPool::num_threads() const { return static_cast<int>(state_->boxes.size()) + 1; }

void ThreadPool::Run(int64_t count, int64_t grain, RangeFunction function, void* context) {
  BEBOP_DCHECK(grain >= 1);
  if (count <= 0) return;
  const int64_t units = (count + grain - 1) / grain;
  const int64_t ranges = std::min<int64_t>(num_threads(), units);
  const auto border = [&](int64_t i) { return std::min(count, units * i / ranges * grain); };
  // The caller takes the first range, worker i the range i + 1.
  for (int64_t i = 1; i < ranges; ++i) {
    Mailbox& box = state_->boxes[static_cast<size_t>(i - 1)];
    box.function = function;
    box.context = context;
    box.begin = border(i);
    box.end = border(i + 1);
    Post(box);
  }
  function(context, 0, border(1));
  for (int64_t i = 1; i < ranges; ++i) {
    Mailbox& box = state_->boxes[static_cast<size_t>(i - 1)];
    const int32_t target = box.posted.load(std::memory_order_relaxed);
    for (int32_t done = box.done.load(std::memory_order_acquire); done != target;) {
      done = WaitWhileEqual(box.done, done, state_->spins);
    }
  }
}

}  // namespace bebop
