// SPDX-License-Identifier: Apache-2.0
//
// The server over an engine whose device fails, which only an emulated one does on demand: clients get the error, health says so, and the
// process is to end with a status that a supervisor acts on.
#include <gtest/gtest.h>
#include <signal.h>

#include <memory>

#include "cuda_emulation_control.h"
#include "server/serve.h"
#include "tests/engine/runtime/device_engine.h"

namespace bebop::test {
namespace {

TEST(DeviceFailureTest, AStickyErrorEndsTheProcess) {
  auto engine = Engine::Create(SmallEngineOptions(DeviceName()));
  ASSERT_TRUE(engine.ok()) << engine.status();
  auto server = Server::Start(engine->get(), ListenOptions());
  ASSERT_TRUE(server.ok()) << server.status();
  const auto generate = std::make_shared<WaitingGenerate>();
  emulation::InjectStickyErrorAfter(60, cudaErrorIllegalAddress);
  ASSERT_TRUE((*engine)->Submit(Request("long", {1, 2, 3}, 100), generate).ok());
  ServeOptions options{};
  sigemptyset(&options.stop_signals);
  options.failure_grace = absl::Milliseconds(200);
  EXPECT_EQ(ServeUntilStopped(**engine, **server, options), kEngineFailedStatus);
  ASSERT_TRUE(generate->Wait());
  EXPECT_EQ(generate->status.code(), absl::StatusCode::kInternal) << generate->status;
}

}  // namespace
}  // namespace bebop::test
