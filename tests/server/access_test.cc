// SPDX-License-Identifier: Apache-2.0
#include "server/access.h"

#include <fcntl.h>
#include <google/protobuf/descriptor.h>
#include <google/protobuf/descriptor.pb.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "bebop/v1/control.pb.h"
#include "bebop/v1/info.pb.h"
#include "bebop/v1/rollout.pb.h"
#include "bebop/v1/weights.pb.h"
#include "server/status_details.h"

namespace bebop {
namespace {

constexpr char kRolloutToken[] = "rollout-token-0123456789";
constexpr char kWeightsToken[] = "weights-token-0123456789";
constexpr char kAdminToken[] = "admin-token-0123456789";
constexpr char kLearnerToken[] = "learner-token-0123456789";  // rollout and weights

class AccessTest : public testing::Test {
 protected:
  ~AccessTest() override { ::unlink(path_.c_str()); }

  std::string Write(const std::string& text, mode_t mode = 0600) {
    std::ofstream(path_, std::ios::binary) << text;
    ::chmod(path_.c_str(), mode);
    return path_;
  }
  absl::Status Refusal(const std::string& text) { return Access::FromFile(Write(text)).status(); }
  Access Load() {
    auto access = Access::FromFile(Write(absl::StrCat("# who\n\nrollout ", kRolloutToken, "\n  weights\t", kWeightsToken, "  \r\nadmin ", kAdminToken,
                                                      "\nrollout,weights ", kLearnerToken)));
    EXPECT_TRUE(access.ok()) << access.status();
    return *std::move(access);
  }

  const std::string path_ = absl::StrCat(testing::TempDir(), "bebop_tokens_", ::getpid());
};

absl::Status Check(const Access& access, const std::string& token, absl::string_view method) {
  const std::string header = absl::StrCat("Bearer ", token);
  const absl::string_view headers[] = {header};
  return access.CheckHeaders(headers, method);
}

// Written out once more, by service, so that a slip in the server's table shows.
std::string ExpectedRole(const google::protobuf::MethodDescriptor& method) {
  const std::string& service = method.service()->name();
  if (service == "Info") return "any";
  if (service == "Rollout") return "rollout";
  if (service == "Control" && method.name() == "Drain") return "admin";
  return "weights";
}

TEST_F(AccessTest, EveryMethodAndRole) {
  const Access access = Load();
  EXPECT_FALSE(access.open());
  const std::map<std::string, std::string> tokens = {
      {kRolloutToken, "rollout"}, {kWeightsToken, "weights"}, {kAdminToken, "admin"}, {kLearnerToken, "rollout,weights"}};
  int num_methods = 0;
  for (const google::protobuf::FileDescriptor* file :
       {v1::GenerateRequest::descriptor()->file(), v1::ServerInfo::descriptor()->file(), v1::WeightChunk::descriptor()->file(),
        v1::ControlState::descriptor()->file()}) {
    for (int i = 0; i < file->service_count(); ++i) {
      for (int j = 0; j < file->service(i)->method_count(); ++j) {
        const google::protobuf::MethodDescriptor& method = *file->service(i)->method(j);
        const std::string needed = ExpectedRole(method);
        for (const auto& [token, roles] : tokens) {
          const bool may = needed == "any" || roles == "admin" || absl::StrContains(roles, needed);
          const absl::Status status = Check(access, token, method.full_name());
          EXPECT_EQ(status.code(), may ? absl::StatusCode::kOk : absl::StatusCode::kPermissionDenied) << method.full_name() << " " << roles;
          if (may) continue;
          EXPECT_EQ(ErrorReason(status), "WRONG_ROLE");
          EXPECT_TRUE(absl::StrContains(ErrorMetadata(status, "needed"), needed)) << status;
          EXPECT_TRUE(absl::StrContains(ErrorMetadata(status, "needed"), "admin")) << status;
          EXPECT_FALSE(absl::StrContains(status.message(), token)) << status;
        }
        ++num_methods;
      }
    }
  }
  EXPECT_GE(num_methods, 23);
}

TEST_F(AccessTest, MethodsThatNobodyWasGivenAreDenied) {
  const Access access = Load();
  for (const char* method : {"bebop.v1.Rollout.Generat", "bebop.v1.Rollout.", "", "/bebop.v1.Rollout/Generate", "bebop.v1.Debug.Crash"}) {
    for (const char* token : {kRolloutToken, kAdminToken}) {
      const absl::Status status = Check(access, token, method);
      EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied) << method;
      EXPECT_EQ(ErrorReason(status), "WRONG_ROLE");
    }
  }
}

TEST_F(AccessTest, HeadersThatAreNoKnownToken) {
  const Access access = Load();
  const std::string good = absl::StrCat("Bearer ", kAdminToken);
  const std::string lower = absl::StrCat("bearer  ", kAdminToken, " ");
  const auto check = [&access](std::vector<absl::string_view> headers) { return access.CheckHeaders(headers, "bebop.v1.Info.GetLoads"); };
  EXPECT_TRUE(check({good}).ok());
  EXPECT_TRUE(check({lower}).ok());
  const absl::Status none = check({});
  EXPECT_EQ(none.code(), absl::StatusCode::kUnauthenticated);
  EXPECT_EQ(ErrorReason(none), "NO_TOKEN");
  const std::string cut = good.substr(0, good.size() - 1);
  const std::string longer = absl::StrCat(good, "x");
  const std::string upper = absl::AsciiStrToUpper(good);
  for (const std::vector<absl::string_view>& headers : std::vector<std::vector<absl::string_view>>{
           {cut}, {longer}, {upper}, {kAdminToken}, {"Bearer "}, {"Bearer"}, {""}, {"Basic YWRtaW46YWRtaW4="}, {good, good}, {cut, good}}) {
    const absl::Status status = check(headers);
    EXPECT_EQ(status.code(), absl::StatusCode::kUnauthenticated) << headers[0];
    EXPECT_EQ(ErrorReason(status), "UNKNOWN_TOKEN") << headers[0];
    EXPECT_FALSE(absl::StrContains(status.message(), "admin-token")) << status;
  }
}

TEST(OpenAccessTest, WithoutTokensEverybodyMayDoEverything) {
  const Access access;
  EXPECT_TRUE(access.open());
  EXPECT_TRUE(access.CheckHeaders({}, "bebop.v1.Control.Drain").ok());
}

TEST_F(AccessTest, FilesThatAreNoTokenFiles) {
  EXPECT_EQ(Access::FromFile(path_ + ".none").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(Access::FromFile(testing::TempDir()).status().code(), absl::StatusCode::kInvalidArgument);
  const std::string secret = kAdminToken;
  const std::map<std::string, std::string> faults = {
      {"", "holds no token"},
      {"# only words\n\n", "holds no token"},
      {"admin", "line 1: not `ROLE[,ROLE] TOKEN`"},
      {"\nadmin " + secret + " more", "line 2: not `ROLE[,ROLE] TOKEN`"},
      {secret + " admin", "line 1: the line does not begin with roles"},
      {"Admin " + secret, "line 1: the line does not begin with roles"},
      {"admin, " + secret, "line 1: the line does not begin with roles"},
      {"health " + secret, "line 1: the line does not begin with roles"},
      {"admin 123456789012345", "line 1: the token has 15 characters; at least 16"},
      {"admin " + std::string(513, 'a'), "line 1: the token has 513 characters; at most 512"},
      {"admin " + secret + "\x01", "line 1: the token holds a character that is not visible ASCII"},
      {"admin " + secret + "\xc3\xa4", "line 1: the token holds a character that is not visible ASCII"},
      {"rollout " + secret + "\n\nadmin " + secret, "line 3: the token of line 1 again"},
      {std::string((1 << 20) + 1, '\n'), "1048577 bytes; at most 1048576"},
  };
  for (const auto& [text, fault] : faults) {
    const absl::Status status = Refusal(text);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text.substr(0, 80);
    EXPECT_TRUE(absl::StrContains(status.message(), fault)) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), path_)) << status;
    EXPECT_FALSE(absl::StrContains(status.message(), secret)) << status;
  }
}

TEST_F(AccessTest, AFileThatEverybodyMayWriteIsRefused) {
  const std::string text = absl::StrCat("admin ", kAdminToken);
  for (const mode_t mode : {0602u, 0646u, 0666u}) {
    EXPECT_EQ(Access::FromFile(Write(text, mode)).status().code(), absl::StatusCode::kPermissionDenied) << mode;
  }
  testing::internal::CaptureStderr();
  EXPECT_TRUE(Access::FromFile(Write(text, 0640)).ok());
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
  testing::internal::CaptureStderr();
  EXPECT_TRUE(Access::FromFile(Write(text, 0644)).ok());  // as orchestrators mount secrets
  const std::string log = testing::internal::GetCapturedStderr();
  EXPECT_TRUE(absl::StrContains(log, "everybody on this machine may read it")) << log;
  EXPECT_FALSE(absl::StrContains(log, kAdminToken)) << log;
}

TEST(CheckCompleteTest, AMethodOutsideTheTableIsNamed) {
  google::protobuf::FileDescriptorProto file;
  file.set_name("test.proto");
  file.set_package("bebop.v1");
  file.add_message_type()->set_name("Nothing");
  google::protobuf::ServiceDescriptorProto* service = file.add_service();
  service->set_name("Rollout");
  for (const char* name : {"Generate", "TestOnly"}) {
    google::protobuf::MethodDescriptorProto* method = service->add_method();
    method->set_name(name);
    method->set_input_type(".bebop.v1.Nothing");
    method->set_output_type(".bebop.v1.Nothing");
  }
  google::protobuf::DescriptorPool pool;
  ASSERT_NE(pool.BuildFile(file), nullptr);
  const google::protobuf::ServiceDescriptor* services[] = {pool.FindServiceByName("bebop.v1.Rollout")};
  const absl::Status status = CheckComplete(services);
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(absl::StrContains(status.message(), "bebop.v1.Rollout.TestOnly")) << status;
}

TEST(CheckCompleteTest, TheRealServicesAreComplete) {
  const std::vector<std::string> names = {"bebop.v1.Rollout", "bebop.v1.Info", "bebop.v1.Weights", "bebop.v1.Control", "grpc.health.v1.Health",
                                          "grpc.reflection.v1alpha.ServerReflection"};
  EXPECT_TRUE(CheckComplete(names).ok()) << CheckComplete(names);
  const std::vector<std::string> unknown = {"bebop.v1.Debug"};
  EXPECT_EQ(CheckComplete(unknown).code(), absl::StatusCode::kInternal);
}

}  // namespace
}  // namespace bebop
