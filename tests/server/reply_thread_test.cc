// SPDX-License-Identifier: Apache-2.0
#include "server/reply_thread.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <set>
#include <thread>
#include <utility>
#include <vector>

namespace bebop {
namespace {

constexpr auto kLong = std::chrono::seconds(30);
constexpr auto kShort = std::chrono::milliseconds(50);  // enough to see something that should not happen

// A task that stays in the thread until it is let go.
class Gate {
 public:
  std::function<void()> Task() {
    return [this] {
      entered_.set_value();
      open_.get_future().wait();
    };
  }
  bool WaitUntilEntered() { return entered_.get_future().wait_for(kLong) == std::future_status::ready; }
  void Open() { open_.set_value(); }

 private:
  std::promise<void> entered_, open_;
};

TEST(ReplyThreadTest, OneThreadInTheOrderOfAdd) {
  std::vector<int> done;
  std::set<std::thread::id> threads;
  ReplyThread thread;
  for (int i = 0; i < 1000; ++i) {
    thread.Add([&, i] {
      done.push_back(i);
      threads.insert(std::this_thread::get_id());
    });
  }
  thread.Flush();
  ASSERT_EQ(done.size(), 1000u);
  for (int i = 0; i < 1000; ++i) ASSERT_EQ(done[static_cast<size_t>(i)], i);
  EXPECT_EQ(threads.size(), 1u);
  EXPECT_FALSE(threads.contains(std::this_thread::get_id()));
}

TEST(ReplyThreadTest, AddDoesNotWaitForTasks) {
  Gate gate;
  ReplyThread thread;
  thread.Add(gate.Task());
  ASSERT_TRUE(gate.WaitUntilEntered());
  bool done = false;
  thread.Add([&] { done = true; });  // or the test would hang here
  EXPECT_FALSE(done);
  gate.Open();
  thread.Flush();
  EXPECT_TRUE(done);
}

TEST(ReplyThreadTest, ManyMayAddAndEachKeepsItsOrder) {
  constexpr int kAdders = 4, kTasks = 500;
  std::vector<std::pair<int, int>> done;
  {
    ReplyThread thread;
    std::vector<std::thread> adders;
    for (int adder = 0; adder < kAdders; ++adder) {
      adders.emplace_back([&, adder] {
        for (int i = 0; i < kTasks; ++i) thread.Add([&, adder, i] { done.emplace_back(adder, i); });
      });
    }
    for (std::thread& adder : adders) adder.join();
    thread.Flush();
    EXPECT_EQ(done.size(), static_cast<size_t>(kAdders * kTasks));
  }
  std::vector<int> next(kAdders, 0);
  for (const auto& [adder, i] : done) ASSERT_EQ(i, next[static_cast<size_t>(adder)]++);
}

// A drain closes the server's ports right after Flush: what was added has to be out, and nothing of it may be held any longer.
TEST(ReplyThreadTest, FlushWaitsForTheTaskThatRunsAndForItsEnd) {
  Gate gate;
  ReplyThread thread;
  thread.Add(gate.Task());
  ASSERT_TRUE(gate.WaitUntilEntered());
  std::atomic<bool> gone = false;
  std::shared_ptr<int> held(new int(1), [&gone](const int* value) {
    std::this_thread::sleep_for(kShort);
    delete value;
    gone = true;
  });
  thread.Add([held = std::move(held)] {});
  auto flushed = std::async(std::launch::async, [&] {
    thread.Flush();
    return gone.load();
  });
  EXPECT_EQ(flushed.wait_for(kShort), std::future_status::timeout);
  gate.Open();
  EXPECT_TRUE(flushed.get());
}

// Others may go on adding; a drain does not wait for them.
TEST(ReplyThreadTest, FlushDoesNotWaitForWhatComesLater) {
  bool returned = false;
  for (int attempt = 0; attempt < 10 && !returned; ++attempt) {  // on a busy machine Flush may not have begun when the second comes
    Gate first, second;
    ReplyThread thread;
    thread.Add(first.Task());
    ASSERT_TRUE(first.WaitUntilEntered());
    auto flushed = std::async(std::launch::async, [&] { thread.Flush(); });
    EXPECT_EQ(flushed.wait_for(kShort), std::future_status::timeout);
    thread.Add(second.Task());
    first.Open();
    returned = flushed.wait_for(std::chrono::seconds(1)) == std::future_status::ready;
    second.Open();
    flushed.wait();  // before the gates go
  }
  EXPECT_TRUE(returned);
}

TEST(ReplyThreadTest, FlushOfNothingReturns) {
  ReplyThread thread;
  thread.Flush();
  thread.Add([] {});
  thread.Flush();
  thread.Flush();
}

TEST(ReplyThreadTest, DestructionDoesWhatWasAdded) {
  std::atomic<int> done = 0;
  Gate gate;
  auto thread = std::make_unique<ReplyThread>();
  thread->Add(gate.Task());
  ASSERT_TRUE(gate.WaitUntilEntered());
  for (int i = 0; i < 100; ++i) thread->Add([&] { ++done; });
  auto destroyed = std::async(std::launch::async, [&] { thread.reset(); });
  EXPECT_EQ(destroyed.wait_for(kShort), std::future_status::timeout);
  EXPECT_EQ(done, 0);
  gate.Open();
  destroyed.get();
  EXPECT_EQ(done, 100);
}

}  // namespace
}  // namespace bebop
