// SPDX-License-Identifier: Apache-2.0
//
// The server over an engine whose device fails, which only an emulated one does on demand: clients get the error, health says so, and the
// process is to end with a status that a supervisor acts on.
#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <memory>
#include <thread>

#include "client/cpp/client.h"
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
  Client client({.server = (*server)->rollout_address(), .timeout = absl::Seconds(60)});
  EXPECT_EQ(*client.Health(""), "SERVING");

  v1::GenerateRequest request;
  for (const uint32_t token : {1u, 2u, 3u}) request.add_prompt_token_ids(token);
  request.mutable_stopping()->set_max_new_tokens(100);
  emulation::InjectStickyErrorAfter(60, cudaErrorIllegalAddress);
  // A client whose request runs, and one that comes after, in the grace, get the same clear error.
  absl::Status running, refused;
  bool not_serving = false;
  std::thread caller([&] {
    running = client.Generate(request).status();
    refused = client.Generate(request).status();
    for (int i = 0; i < 200 && !not_serving; ++i) {
      not_serving = client.Health("").value_or("") == "NOT_SERVING";
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  });
  ServeOptions options{};
  sigemptyset(&options.stop_signals);
  options.failure_grace = absl::Seconds(4);
  EXPECT_EQ(ServeUntilStopped(**engine, **server, options), kEngineFailedStatus);
  caller.join();
  for (const absl::Status& status : {running, refused}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
    EXPECT_EQ(GetErrorDetails(status).reason, "ENGINE_FAILED") << status;
    EXPECT_NE(status.message().find("illegal"), absl::string_view::npos) << status;
  }
  EXPECT_TRUE(not_serving);
}

}  // namespace
}  // namespace bebop::test
