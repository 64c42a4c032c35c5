// SPDX-License-Identifier: Apache-2.0
#include "client/cli/console.h"

#include <gtest/gtest.h>

#include <atomic>
#include <fstream>
#include <limits>
#include <thread>

#include "bebop/v1/info.pb.h"
#include "bebop/v1/rollout.pb.h"
#include "client/cli/batch.h"
#include "client/cpp/client.h"
#include "nlohmann/json.hpp"

namespace bebop {
namespace {

TEST(Address, WhatIsOne) {
  for (const char* good : {"host:1", "127.0.0.1:65535", "a.b.c:50051", "[::1]:50051", "unix:/tmp/socket", "dns:///host:50051", "ipv4:127.0.0.1:50051", "dns:50051"}) {
    EXPECT_TRUE(CheckAddress(good).ok()) << good;
  }
  for (const char* bad : {"", "nonsense", "host:", ":50051", "host:port", "host:0", "host:65536", "host:+1", "::1:50051", "[]:1", "host:50051/path", "unix:"}) {
    const absl::Status status = CheckAddress(bad);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_NE(status.message().find("expected HOST:PORT"), absl::string_view::npos) << status.message();
  }
  EXPECT_EQ(CheckAddress("http://127.0.0.1:50051").message(), "\"http://127.0.0.1:50051\": expected HOST:PORT, without http://");
  EXPECT_EQ(CheckAddress("https://host").message(), "\"https://host\": expected HOST:PORT, without https://");
}

TEST(Json, ProtoNamesAndDefaults) {
  v1::SampleResult sample;
  sample.set_seed_used(1ULL << 63);
  sample.add_draft_logprobs(std::numeric_limits<float>::quiet_NaN());
  const std::string json = ToJsonLine(sample);
  EXPECT_EQ(json.find('\n'), std::string::npos);
  EXPECT_NE(json.find("\"sample_index\":0"), std::string::npos) << json;
  EXPECT_NE(json.find("\"seed_used\":\"9223372036854775808\""), std::string::npos) << json;
  EXPECT_NE(json.find("\"token_ids\":[]"), std::string::npos) << json;
  EXPECT_NE(json.find("\"draft_logprobs\":[\"NaN\"]"), std::string::npos) << json;
}

TEST(Json, ParsesProtoNamesAndRefusesOthers) {
  v1::GenerateRequest request;
  ASSERT_TRUE(FromJson(R"({"prompt_token_ids":[1,2],"speculation":{"mode":"COUPLED"},"sampling":{"seed":"5"}})", &request).ok());
  EXPECT_EQ(request.prompt_token_ids_size(), 2);
  EXPECT_EQ(request.speculation().mode(), v1::SpeculationParams::COUPLED);
  EXPECT_EQ(request.sampling().seed(), 5u);
  for (const char* bad : {"{", "[]", "{\"nope\":1}", "{\"num_samples\":1.5}", "{\"prompt_token_ids\":[-1]}", "{\"speculation\":{\"mode\":\"FAST\"}}"}) {
    v1::GenerateRequest ignored;
    const absl::Status status = FromJson(bad, &ignored);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_EQ(std::string(status.message()).find('\n'), std::string::npos) << status;
  }
}

TEST(Json, ErrorLine) {
  EXPECT_EQ(ErrorToJsonLine(absl::InvalidArgumentError("say \"no\"")),
            R"({"error":{"code":"INVALID_ARGUMENT","reason":"","message":"say \"no\""}})");
}

TEST(Json, InfoIsOneObject) {
  v1::ServerInfo server;
  server.set_api_version("bebop.v1");
  v1::ModelInfo model;
  model.set_layer_bytes(1LL << 40);
  const auto json = nlohmann::json::parse(ToJsonLine(server, model));
  EXPECT_EQ(json["api_version"], "bebop.v1");
  EXPECT_EQ(json["layer_bytes"], "1099511627776");
  EXPECT_EQ(json["vocab_size"], 0);
  for (int i = 0; i < server.GetDescriptor()->field_count(); ++i) {
    EXPECT_EQ(model.GetDescriptor()->FindFieldByName(server.GetDescriptor()->field(i)->name()), nullptr) << "a name in both: one would be lost";
  }
}

TEST(Batch, LinesThatDoNotParseHaveAReason) {
  EXPECT_EQ(ErrorToJsonLine(MalformedLine(7, absl::InvalidArgumentError("not a thing"))),
            R"({"error":{"code":"INVALID_ARGUMENT","reason":"MALFORMED_LINE","message":"line 7: not a thing"}})");
}

TEST(Batch, FlagsFillWhatALineLeavesUnset) {
  v1::GenerateRequest flags, line;
  const char* const flags_json =
      R"({"num_samples":4,"sampling":{"temperature":0.5,"seed":"3"},"stopping":{"stop":["a","b"],"stop_token_ids":[1]}})";
  ASSERT_TRUE(FromJson(flags_json, &flags).ok());
  ASSERT_TRUE(FromJson(R"({"prompt_token_ids":[9],"sampling":{"seed":"0"},"stopping":{"stop":["c"]}})", &line).ok());
  FillUnset(flags, &line);
  EXPECT_EQ(line.prompt_token_ids_size(), 1);
  EXPECT_EQ(line.num_samples(), 4);
  EXPECT_EQ(line.sampling().temperature(), 0.5f);
  EXPECT_EQ(line.sampling().seed(), 0u);  // set to 0 is set
  ASSERT_EQ(line.stopping().stop_size(), 1);
  EXPECT_EQ(line.stopping().stop(0), "c");
  EXPECT_EQ(line.stopping().stop_token_ids_size(), 1);
  v1::TokenizeRequest special, text;
  special.set_parse_special(true);
  text.set_text("x");
  FillUnset(special, &text);
  EXPECT_TRUE(text.parse_special());
  EXPECT_EQ(text.text(), "x");
}

TEST(ExitCodes, FollowTheStatus) {
  EXPECT_EQ(ExitCodeOf(absl::OkStatus()), 0);
  EXPECT_EQ(ExitCodeOf(absl::InvalidArgumentError("")), 1);
  EXPECT_EQ(ExitCodeOf(absl::InternalError("")), 1);
  EXPECT_EQ(ExitCodeOf(absl::UnavailableError("refused")), 3);  // no ErrorInfo: nobody answered
  EXPECT_EQ(ExitCodeOf(absl::DeadlineExceededError("")), 4);
}

TEST(ParseTokenIds, Forms) {
  EXPECT_EQ(*ParseTokenIds("1 2 3"), (std::vector<uint32_t>{1, 2, 3}));
  EXPECT_EQ(*ParseTokenIds("[1,2, 4294967295]"), (std::vector<uint32_t>{1, 2, 4294967295u}));
  EXPECT_TRUE(ParseTokenIds("")->empty());
  for (const char* bad : {"1 x", "-1", "4294967296", "1.5"}) EXPECT_FALSE(ParseTokenIds(bad).ok()) << bad;
}

TEST(ReadLines, SkipsBlankLinesAndKeepsNumbers) {
  const std::string path = ::testing::TempDir() + "/lines.jsonl";
  std::ofstream(path) << "a\n\n  \nb\r\nc";
  const auto lines = ReadLines(path);
  ASSERT_TRUE(lines.ok());
  ASSERT_EQ(lines->size(), 3u);
  EXPECT_EQ((*lines)[1].number, 4);
  EXPECT_EQ((*lines)[2].text, "c");
  EXPECT_FALSE(ReadLines("/nowhere/at/all").ok());
}

TEST(RunOrdered, PrintsInOrderWithManyInFlight) {
  std::atomic<int> in_flight = 0, most = 0;
  std::vector<size_t> printed;
  std::vector<std::atomic<bool>> called(40);
  RunOrdered(
      40, 8,
      [&](size_t i) {
        const int now = ++in_flight;
        int seen = most;
        while (now > seen && !most.compare_exchange_weak(seen, now)) {
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(i % 5 == 0 ? 20 : 1));
        called[i] = true;
        --in_flight;
      },
      [&](size_t i) {
        EXPECT_TRUE(called[i]);
        printed.push_back(i);
      });
  ASSERT_EQ(printed.size(), 40u);
  for (size_t i = 0; i < printed.size(); ++i) EXPECT_EQ(printed[i], i);
  EXPECT_GT(most, 1);
  EXPECT_LE(most, 8);
  RunOrdered(0, 8, [](size_t) { FAIL(); }, [](size_t) { FAIL(); });
}

}  // namespace
}  // namespace bebop
