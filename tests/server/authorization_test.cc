// SPDX-License-Identifier: Apache-2.0
// Every method of every service, on both ports of a real server, with every kind of credential (I21).
#include <google/protobuf/descriptor.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/rpc_service_method.h>
#include <grpcpp/impl/server_builder_plugin.h>
#include <grpcpp/impl/server_initializer.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "bebop/rpc/status.pb.h"
#include "bebop/v1/control.pb.h"
#include "bebop/v1/info.pb.h"
#include "bebop/v1/rollout.pb.h"
#include "bebop/v1/weights.pb.h"
#include "client/cpp/client.h"
#include "server/server.h"
#include "tests/server/fake_engine.h"

namespace bebop {
namespace {

struct Credential {
  const char* name;
  std::optional<std::string> header;
  std::vector<std::string> roles;  // empty: no token that the server knows
};

const std::vector<Credential>& Credentials() {
  static const auto* const credentials = new std::vector<Credential>{
      {"none", std::nullopt, {}},
      {"unknown", "Bearer someone-elses-token-0000", {}},
      {"scheme", "Basic admin-token-0123456789", {}},
      {"rollout", "Bearer rollout-token-0123456789", {"rollout"}},
      {"weights", "Bearer weights-token-0123456789", {"weights"}},
      {"learner", "Bearer learner-token-0123456789", {"rollout", "weights"}},
      {"admin", "Bearer admin-token-0123456789", {"admin"}},
  };
  return *credentials;
}

struct Answer {
  grpc::StatusCode code;
  std::string reason;
};

// Calls with an empty message.
Answer Call(const std::shared_ptr<grpc::Channel>& channel, const std::string& path, const Credential& credential) {
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  if (credential.header.has_value()) context.AddMetadata("authorization", *credential.header);
  grpc::CompletionQueue queue;
  const auto call = stub.PrepareCall(&context, path, &queue);
  void* tag = nullptr;
  bool ok = false;
  call->StartCall(nullptr);
  queue.Next(&tag, &ok);
  const grpc::Slice slice("");
  if (ok) {
    call->WriteLast(grpc::ByteBuffer(&slice, 1), grpc::WriteOptions(), nullptr);
    queue.Next(&tag, &ok);
  }
  grpc::ByteBuffer reply;
  do {
    call->Read(&reply, nullptr);
    queue.Next(&tag, &ok);
  } while (ok);
  grpc::Status status;
  call->Finish(&status, nullptr);
  queue.Next(&tag, &ok);
  Answer answer = {status.error_code(), ""};
  rpc::Status details;
  rpc::ErrorInfo info;
  if (details.ParseFromString(status.error_details()) && details.details_size() > 0 && info.ParseFromString(details.details(0).value())) {
    answer.reason = info.reason();
  }
  return answer;
}

// Written out once more, so that a slip in the server's table shows.
bool May(const Credential& credential, const google::protobuf::MethodDescriptor& method) {
  const std::string& service = method.service()->name();
  for (const std::string& role : credential.roles) {
    if (role == "admin" || service == "Info") return true;
    if (method.name() == "Drain") continue;
    if (role == (service == "Rollout" ? "rollout" : "weights")) return true;
  }
  return false;
}

std::vector<const google::protobuf::MethodDescriptor*> AllMethods() {
  std::vector<const google::protobuf::MethodDescriptor*> methods;
  for (const google::protobuf::FileDescriptor* file :
       {v1::GenerateRequest::descriptor()->file(), v1::ServerInfo::descriptor()->file(), v1::WeightChunk::descriptor()->file(),
        v1::ControlState::descriptor()->file()}) {
    for (int i = 0; i < file->service_count(); ++i) {
      for (int j = 0; j < file->service(i)->method_count(); ++j) methods.push_back(file->service(i)->method(j));
    }
  }
  return methods;
}

class AuthorizationTest : public testing::Test {
 protected:
  AuthorizationTest() {
    const std::string path = absl::StrCat(testing::TempDir(), "bebop_authorization_", ::getpid());
    std::ofstream(path) << "rollout rollout-token-0123456789\nweights weights-token-0123456789\nrollout,weights learner-token-0123456789\n"
                           "admin admin-token-0123456789\n";
    ::chmod(path.c_str(), 0600);
    auto access = Access::FromFile(path);
    ::unlink(path.c_str());
    EXPECT_TRUE(access.ok()) << access.status();
    ListenOptions options;
    options.access = *std::move(access);
    auto server = Server::Start(&engine_, options);
    EXPECT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }

  void Walk(const std::string& address, const std::vector<std::string>& services) {
    const auto channel = grpc::CreateChannel(address, grpc::InsecureChannelCredentials());
    int num_calls = 0;
    for (const google::protobuf::MethodDescriptor* method : AllMethods()) {
      const std::string& service = method->service()->name();
      const bool is_here = std::find(services.begin(), services.end(), service) != services.end();
      const std::string path = absl::StrCat("/", method->service()->full_name(), "/", method->name());
      for (const Credential& credential : Credentials()) {
        const bool may = May(credential, *method);
        if (method->name() == "Drain" && may && is_here) continue;  // ends the server: a test of its own
        const Answer answer = Call(channel, path, credential);
        const std::string shown = absl::StrCat(address, path, " ", credential.name, ": ", answer.code, " ", answer.reason);
        ++num_calls;
        if (!is_here) {
          EXPECT_EQ(answer.code, grpc::StatusCode::UNIMPLEMENTED) << shown;
        } else if (credential.roles.empty()) {
          EXPECT_EQ(answer.code, grpc::StatusCode::UNAUTHENTICATED) << shown;
          EXPECT_EQ(answer.reason, credential.header.has_value() ? "UNKNOWN_TOKEN" : "NO_TOKEN") << shown;
        } else if (!may) {
          EXPECT_EQ(answer.code, grpc::StatusCode::PERMISSION_DENIED) << shown;
          EXPECT_EQ(answer.reason, "WRONG_ROLE") << shown;
        } else {
          // Whatever the handler makes of an empty message.
          EXPECT_NE(answer.code, grpc::StatusCode::UNAUTHENTICATED) << shown;
          EXPECT_NE(answer.reason, "WRONG_ROLE") << shown;
          EXPECT_NE(answer.code, grpc::StatusCode::UNIMPLEMENTED) << shown;
        }
      }
    }
    EXPECT_GE(num_calls, 150);
  }

  FakeEngine engine_;
  std::unique_ptr<Server> server_;
};

TEST_F(AuthorizationTest, RolloutPort) { Walk(server_->rollout_address(), {"Rollout", "Info"}); }
TEST_F(AuthorizationTest, AdminPort) { Walk(server_->admin_address(), {"Weights", "Control", "Info"}); }

TEST_F(AuthorizationTest, AnAdminMayDrain) {
  const auto channel = grpc::CreateChannel(server_->admin_address(), grpc::InsecureChannelCredentials());
  EXPECT_FALSE(engine_.draining());
  EXPECT_EQ(Call(channel, "/bebop.v1.Control/Drain", Credentials().back()).code, grpc::StatusCode::OK);
  EXPECT_TRUE(FakeEngine::WaitUntil([this] { return engine_.draining(); }));
}

TEST_F(AuthorizationTest, HealthNeedsNoToken) {
  for (const std::string& address : {server_->rollout_address(), server_->admin_address()}) {
    const auto health = Client(ClientOptions{address, absl::Seconds(20), ""}).Health("");
    ASSERT_TRUE(health.ok()) << health.status();
    EXPECT_EQ(*health, "SERVING");
  }
}

TEST_F(AuthorizationTest, TheClientShowsItsToken) {
  ClientOptions options{server_->admin_address(), absl::Seconds(20), ""};
  EXPECT_EQ(Client(options).GetLoads().status().code(), absl::StatusCode::kUnauthenticated);
  options.token = "weights-token-0123456789";
  EXPECT_TRUE(Client(options).GetLoads().ok());
}

// ---- a service that the table of roles does not know ----

class DebugService final : public grpc::Service {
 public:
  DebugService() { AddMethod(new grpc::internal::RpcServiceMethod("/bebop.v1.Debug/Crash", grpc::internal::RpcMethod::NORMAL_RPC, nullptr)); }
};

std::atomic<bool> add_debug_service = false;

class DebugPlugin final : public grpc::ServerBuilderPlugin {
 public:
  std::string name() override { return "debug"; }
  void InitServer(grpc::ServerInitializer* initializer) override {
    if (add_debug_service) initializer->RegisterService(std::make_shared<DebugService>());
  }
  void Finish(grpc::ServerInitializer*) override {}
  void ChangeArguments(const std::string&, void*) override {}
};

TEST(StartTest, AServiceWithoutRolesKeepsTheServerFromStarting) {
  grpc::ServerBuilder::InternalAddPluginFactory([]() -> std::unique_ptr<grpc::ServerBuilderPlugin> { return std::make_unique<DebugPlugin>(); });
  FakeEngine engine;
  EXPECT_TRUE(Server::Start(&engine, ListenOptions()).ok());
  add_debug_service = true;
  const auto server = Server::Start(&engine, ListenOptions());
  add_debug_service = false;
  ASSERT_FALSE(server.ok());
  EXPECT_EQ(server.status().code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(absl::StrContains(server.status().message(), "bebop.v1.Debug")) << server.status();
}

}  // namespace
}  // namespace bebop
