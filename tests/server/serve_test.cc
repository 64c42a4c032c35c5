// SPDX-License-Identifier: Apache-2.0
#include "server/serve.h"

#include <gtest/gtest.h>
#include <pthread.h>

#include <chrono>
#include <memory>
#include <thread>

#include "tests/server/fake_engine.h"

namespace bebop {
namespace {

using Clock = std::chrono::steady_clock;

class Ignorer final : public GenerateObserver {
  void OnSample(const std::shared_ptr<const SampleResult>&) override {}
  void OnDone(const absl::Status&) override {}
};

class ServeTest : public testing::Test {
 protected:
  ServeTest() : server_(*Server::Start(&engine_, ListenOptions())) {
    sigemptyset(&options_.stop_signals);
    sigaddset(&options_.stop_signals, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &options_.stop_signals, nullptr);
    options_.drain_timeout = absl::Seconds(5);
    options_.failure_grace = absl::Milliseconds(300);
  }

  FakeEngine engine_;
  const std::unique_ptr<Server> server_;
  ServeOptions options_{};
};

TEST_F(ServeTest, ASignalDrainsAndEndsWithZero) {
  pthread_kill(pthread_self(), SIGUSR1);
  EXPECT_EQ(ServeUntilStopped(engine_, *server_, options_), 0);
}

TEST_F(ServeTest, AFailedEngineEndsTheProcessAfterTheGrace) {
  const Clock::time_point begin = Clock::now();
  std::thread failure([this] {
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    engine_.SetHealth(absl::InternalError("device error: cudaStreamSynchronize at x.cc:1: an illegal memory access was encountered"));
  });
  EXPECT_EQ(ServeUntilStopped(engine_, *server_, options_), kEngineFailedStatus);
  failure.join();
  EXPECT_GE(Clock::now() - begin, std::chrono::milliseconds(500));
  EXPECT_NE(kEngineFailedStatus, 0);
}

// The device may fail while the last requests drain; a supervisor must hear of it all the same.
TEST_F(ServeTest, AnEngineThatFailsWhileDrainingIsReported) {
  std::thread failure([this] {
    if (FakeEngine::WaitUntil([this] { return engine_.draining(); })) engine_.SetHealth(absl::InternalError("device error"));
    engine_.Done("r", absl::InternalError("device error"));
  });
  GenerateRequest request;
  request.request_id = "r";
  ASSERT_TRUE(engine_.Submit(request, std::make_shared<Ignorer>()).ok());
  pthread_kill(pthread_self(), SIGUSR1);
  EXPECT_EQ(ServeUntilStopped(engine_, *server_, options_), kEngineFailedStatus);
  failure.join();
}

TEST(StartFailureTest, OnlyADeviceErrorIsWorthAnotherStart) {
  EXPECT_EQ(StartFailureStatus(absl::InternalError("device error")), kEngineFailedStatus);
  EXPECT_EQ(StartFailureStatus(absl::InvalidArgumentError("--port")), 2);
  EXPECT_EQ(StartFailureStatus(absl::NotFoundError("config.json")), 2);
  EXPECT_EQ(StartFailureStatus(absl::ResourceExhaustedError("kv_cache_bytes")), 2);
}

TEST_F(ServeTest, ASignalCutsTheGraceShort) {
  options_.failure_grace = absl::Seconds(60);
  engine_.SetHealth(absl::InternalError("device error"));
  pthread_kill(pthread_self(), SIGUSR1);
  const Clock::time_point begin = Clock::now();
  EXPECT_EQ(ServeUntilStopped(engine_, *server_, options_), kEngineFailedStatus);
  EXPECT_LT(Clock::now() - begin, std::chrono::seconds(30));
}

}  // namespace
}  // namespace bebop
