// SPDX-License-Identifier: Apache-2.0
#include "server/metrics.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "server/http_endpoints.h"
#include "server/server.h"
#include "tests/server/fake_engine.h"

namespace bebop {
namespace {

// A strict reader of the text format: each family is one HELP, one TYPE and its samples in one piece; labels and values are well formed; no series
// comes twice. `series` maps "name{labels}" to values, labels as they stand.
struct Exposition {
  std::map<std::string, double> series;
  std::map<std::string, std::string> types;
  std::vector<std::string> faults;
};

bool IsName(absl::string_view text) {
  if (text.empty() || absl::ascii_isdigit(text[0])) return false;
  for (const unsigned char c : text) {
    if (!absl::ascii_isalnum(c) && c != '_' && c != ':') return false;
  }
  return true;
}

// The part of a series' name that its family has.
std::string FamilyOf(const std::string& name, const std::map<std::string, std::string>& types) {
  for (const char* suffix : {"_bucket", "_sum", "_count"}) {
    if (!absl::EndsWith(name, suffix)) continue;
    const std::string base = name.substr(0, name.size() - std::string(suffix).size());
    const auto found = types.find(base);
    if (found != types.end() && (found->second == "histogram" || found->second == "summary")) return base;
  }
  return name;
}

Exposition Parse(const std::string& text) {
  Exposition page;
  if (!absl::EndsWith(text, "\n")) page.faults.push_back("no newline at the end");
  std::string family;
  std::set<std::string> helped;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    if (line.empty()) continue;
    const auto fault = [&page, line](const char* what) { page.faults.push_back(absl::StrCat(what, ": ", line)); };
    if (line[0] == '#') {
      const std::vector<std::string> words = absl::StrSplit(line, absl::MaxSplits(' ', 3));
      if (words.size() != 4 || !IsName(words[2]) || words[3].empty()) {
        fault("comment");
      } else if (words[1] == "HELP") {
        if (!helped.insert(words[2]).second) fault("second HELP");
      } else if (words[1] == "TYPE") {
        family = words[2];
        if (!page.types.emplace(family, words[3]).second || helped.count(family) == 0) fault("TYPE");
      } else {
        fault("comment");
      }
      continue;
    }
    const size_t name_end = line.find_first_of("{ ");
    const size_t value_begin = line.rfind(' ');
    double value = 0.0;
    if (name_end == absl::string_view::npos || !absl::SimpleAtod(line.substr(value_begin + 1), &value)) {
      fault("not `series value`");
      continue;
    }
    const std::string name(line.substr(0, name_end));
    if (!IsName(name) || FamilyOf(name, page.types) != family) fault("outside its family");
    const absl::string_view labels = line.substr(name_end, value_begin - name_end);
    if (!labels.empty()) {
      if (labels.front() != '{' || labels.back() != '}') fault("labels");
      for (const absl::string_view label : absl::StrSplit(labels.substr(1, labels.size() - 2), ',', absl::SkipEmpty())) {
        const std::vector<absl::string_view> parts = absl::StrSplit(label, absl::MaxSplits('=', 1));
        if (parts.size() != 2 || !IsName(parts[0]) || parts[1].size() < 2 || parts[1].front() != '"' || parts[1].back() != '"') fault("label");
      }
    }
    if (!page.series.emplace(std::string(line.substr(0, value_begin)), value).second) fault("twice");
  }
  return page;
}

double Value(const Exposition& page, const std::string& name, const std::string& labels = "") {
  const std::string key = absl::StrCat(name, "{", labels, labels.empty() ? "" : ",", "model_name=\"m\"}");
  const auto found = page.series.find(key);
  EXPECT_NE(found, page.series.end()) << key;
  return found == page.series.end() ? std::numeric_limits<double>::quiet_NaN() : found->second;
}

SampleResult MakeSample(int num_tokens, FinishReason finish = FinishReason::kLength) {
  SampleResult sample;
  sample.finish = finish;
  sample.token_ids.resize(num_tokens);
  sample.queue_time = absl::Milliseconds(30);
  sample.prefill_time = absl::Milliseconds(70);
  sample.time_to_first_token = absl::Milliseconds(100);
  sample.decode_time = absl::Seconds(2);
  sample.total_time = absl::Milliseconds(2100);
  return sample;
}

EngineLoads MakeLoads() {
  EngineLoads loads;
  loads.running_requests = 2;
  loads.waiting_requests = 3;
  loads.submitted = 20;
  loads.finished = 9;
  loads.cancelled = 5;
  loads.failed = 1;
  loads.refused = 4;
  loads.used_pages = 25;
  loads.total_pages = 100;
  loads.prompt_tokens = 1'234'567'890'123;
  loads.generated_tokens = 77;
  loads.recomputed_tokens = 11;
  loads.spec.num_spec_steps = 10;
  loads.spec.num_draft_tokens = 30;
  loads.spec.num_accepted_draft_tokens = 15;
  loads.spec.accepted_per_pos = {8, 5, 2};
  loads.spec.drafted_per_pos = {10, 8, 5};
  loads.samples_by_finish[static_cast<int>(FinishReason::kStop)] = 6;
  loads.samples_by_finish[static_cast<int>(FinishReason::kSuperseded)] = 2;
  loads.samples_by_spread = {10, 3, 0, 0, 0, 0, 0, 1};
  loads.target_step = 42;
  loads.draft_step = 41;
  loads.weight_commits = 4;
  loads.total_swap_time = absl::Milliseconds(200);
  loads.version_spec = {.num_spec_steps = 2, .num_draft_tokens = 6, .num_accepted_draft_tokens = 3};
  return loads;
}

TEST(MetricsTest, EveryNumberOfTheLoadsIsThere) {
  const Metrics metrics({.model_name = "m", .build = "bebop-server 1"});
  const Exposition page = Parse(metrics.Exposition(MakeLoads(), {.since_heartbeat = absl::Seconds(3), .num_draft_tokens = 3}));
  EXPECT_EQ(page.faults, std::vector<std::string>());
  EXPECT_EQ(Value(page, "bebop:num_requests_running"), 2);
  EXPECT_EQ(Value(page, "bebop:num_requests_waiting"), 3);
  EXPECT_EQ(Value(page, "bebop:groups_inflight"), 5);
  EXPECT_EQ(Value(page, "bebop:requests_submitted_total"), 20);
  EXPECT_EQ(Value(page, "bebop:requests_finished_total"), 9);
  EXPECT_EQ(Value(page, "bebop:requests_cancelled_total"), 5);
  EXPECT_EQ(Value(page, "bebop:requests_failed_total"), 1);
  EXPECT_EQ(Value(page, "bebop:requests_refused_total"), 4);
  EXPECT_EQ(Value(page, "bebop:kv_cache_usage_perc"), 0.25);
  EXPECT_EQ(Value(page, "bebop:prompt_tokens_total"), 1'234'567'890'123);  // no digit is lost
  EXPECT_EQ(Value(page, "bebop:generation_tokens_total"), 77);
  EXPECT_EQ(Value(page, "bebop:kv_recomputed_tokens_total"), 11);
  EXPECT_EQ(Value(page, "bebop:request_success_total", "finished_reason=\"stop\""), 6);
  EXPECT_EQ(Value(page, "bebop:partial_results_total", "reason=\"superseded\""), 2);
  EXPECT_EQ(page.series.count("bebop:partial_results_total{reason=\"stop\",model_name=\"m\"}"), 0u);
  EXPECT_EQ(Value(page, "bebop:spec_decode_num_drafts_total"), 10);
  EXPECT_EQ(Value(page, "bebop:spec_decode_num_draft_tokens_total"), 30);
  EXPECT_EQ(Value(page, "bebop:spec_decode_num_accepted_tokens_total"), 15);
  EXPECT_EQ(Value(page, "bebop:spec_decode_num_accepted_tokens_per_pos_total", "position=\"1\""), 5);
  EXPECT_EQ(Value(page, "bebop:spec_decode_num_drafted_per_pos_total", "position=\"2\""), 5);
  EXPECT_EQ(Value(page, "bebop:spec_accept_length"), 2.5);
  EXPECT_EQ(Value(page, "bebop:spec_accept_rate"), 0.5);
  EXPECT_EQ(Value(page, "bebop:spec_current_k"), 3);
  EXPECT_EQ(Value(page, "bebop:spec_version_accept_length", "version=\"current\""), 2.5);
  EXPECT_EQ(Value(page, "bebop:spec_version_accept_rate", "version=\"previous\""), 0);  // none yet: a number all the same
  EXPECT_EQ(Value(page, "bebop:spec_acceptance_dropped"), 0);
  EXPECT_EQ(Value(page, "bebop:weight_version"), 42);
  EXPECT_EQ(Value(page, "bebop:draft_weight_version"), 41);
  EXPECT_EQ(Value(page, "bebop:weight_update_stall_seconds_count"), 4);
  EXPECT_DOUBLE_EQ(Value(page, "bebop:weight_update_stall_seconds_sum"), 0.2);
  EXPECT_EQ(Value(page, "bebop:samples_by_version_spread", "spread=\"0\""), 10);
  EXPECT_EQ(Value(page, "bebop:samples_by_version_spread", "spread=\"7+\""), 1);
  EXPECT_EQ(Value(page, "bebop:heartbeat_age_seconds"), 3);
  EXPECT_EQ(Value(page, "bebop:insecure_no_auth"), 0);
  for (const auto& [name, type] : page.types) EXPECT_TRUE(absl::StartsWith(name, "bebop:")) << name;
}

TEST(MetricsTest, StateAndAnInsecureServerShow) {
  const Metrics metrics({.model_name = "m", .insecure_no_auth = true});
  MetricsState state;
  state.serving = false;
  state.draining = true;
  state.control.paused = true;
  state.control.sleeping.kv_cache = true;
  const Exposition page = Parse(metrics.Exposition(EngineLoads(), state));
  EXPECT_EQ(Value(page, "bebop:insecure_no_auth"), 1);
  EXPECT_EQ(Value(page, "bebop:serving"), 0);
  EXPECT_EQ(Value(page, "bebop:draining"), 1);
  EXPECT_EQ(Value(page, "bebop:paused"), 1);
  EXPECT_EQ(Value(page, "bebop:sleeping", "tag=\"kv_cache\""), 1);
  EXPECT_EQ(Value(page, "bebop:sleeping", "tag=\"weights\""), 0);
}

TEST(MetricsTest, SamplesFillTheHistograms) {
  Metrics metrics({.model_name = "m"});
  metrics.OnSample(MakeSample(5));
  metrics.OnSample(MakeSample(1, FinishReason::kStop));
  metrics.OnSample(MakeSample(0, FinishReason::kAborted));  // cut short in the queue: it has no first token
  metrics.OnSample(MakeSample(9, FinishReason::kFailed));   // nobody gets it
  metrics.OnSample(MakeSample(9, FinishReason::kNone));
  const Exposition page = Parse(metrics.Exposition(EngineLoads(), {}));
  EXPECT_EQ(page.faults, std::vector<std::string>());
  EXPECT_EQ(Value(page, "bebop:e2e_request_latency_seconds_count"), 3);
  EXPECT_DOUBLE_EQ(Value(page, "bebop:e2e_request_latency_seconds_sum"), 6.3);
  EXPECT_EQ(Value(page, "bebop:request_queue_time_seconds_count"), 3);
  EXPECT_EQ(Value(page, "bebop:time_to_first_token_seconds_count"), 2);
  EXPECT_DOUBLE_EQ(Value(page, "bebop:time_to_first_token_seconds_sum"), 0.2);
  EXPECT_DOUBLE_EQ(Value(page, "bebop:request_prefill_time_seconds_sum"), 0.14);
  EXPECT_DOUBLE_EQ(Value(page, "bebop:request_decode_time_seconds_sum"), 4);
  EXPECT_EQ(Value(page, "bebop:inter_token_latency_seconds_count"), 1);  // one token has nothing between
  EXPECT_DOUBLE_EQ(Value(page, "bebop:inter_token_latency_seconds_sum"), 0.5);
  // Buckets are cumulative and end with all.
  const auto bucket = [&page](const char* le) {
    const auto found = page.series.find(absl::StrCat("bebop:inter_token_latency_seconds_bucket{model_name=\"m\",le=\"", le, "\"}"));
    return found == page.series.end() ? -1.0 : found->second;
  };
  EXPECT_EQ(bucket("0.2"), 0);
  EXPECT_EQ(bucket("0.5"), 1);
  EXPECT_EQ(bucket("10"), 1);
  EXPECT_EQ(bucket("+Inf"), 1);
}

TEST(MetricsTest, UpdatesAreCountedByTheirEnd) {
  Metrics metrics({.model_name = "m"});
  metrics.OnWeightUpdate(UpdateEnd::kCommitted, {.stage = absl::Seconds(3), .check = absl::Seconds(1), .commit = absl::Milliseconds(20)});
  metrics.OnWeightUpdate(UpdateEnd::kCommitted, {.stage = absl::Seconds(3), .check = absl::Seconds(1), .commit = absl::Milliseconds(20)});
  metrics.OnWeightUpdate(UpdateEnd::kExpired, {.stage = absl::Seconds(30)});
  const Exposition page = Parse(metrics.Exposition(EngineLoads(), {}));
  EXPECT_EQ(page.faults, std::vector<std::string>());
  EXPECT_EQ(Value(page, "bebop:weight_update_total", "result=\"committed\""), 2);
  EXPECT_EQ(Value(page, "bebop:weight_update_total", "result=\"expired\""), 1);
  EXPECT_EQ(Value(page, "bebop:weight_update_total", "result=\"failed\""), 0);
  EXPECT_EQ(Value(page, "bebop:weight_update_total", "result=\"aborted\""), 0);
  // What was given up says nothing about how long updates take.
  EXPECT_DOUBLE_EQ(Value(page, "bebop:weight_update_seconds_sum", "phase=\"stage\""), 6);
  for (const char* phase : {"stage", "check", "commit"}) {
    EXPECT_EQ(Value(page, "bebop:weight_update_seconds_count", absl::StrCat("phase=\"", phase, "\"")), 2) << phase;
  }
  EXPECT_DOUBLE_EQ(Value(page, "bebop:weight_update_seconds_sum", "phase=\"commit\""), 0.04);
}

TEST(MetricsTest, OtherServersNames) {
  const Exposition both = Parse(Metrics({.model_name = "m", .vllm = true, .sglang = true}).Exposition(MakeLoads(), {}));
  EXPECT_EQ(both.faults, std::vector<std::string>());
  // What SkyRL, NeMo-RL and prime-rl read.
  EXPECT_EQ(Value(both, "vllm:spec_decode_num_drafts_total"), 10);
  EXPECT_EQ(Value(both, "vllm:spec_decode_num_draft_tokens_total"), 30);
  EXPECT_EQ(Value(both, "vllm:spec_decode_num_accepted_tokens_total"), 15);
  EXPECT_EQ(Value(both, "vllm:spec_decode_num_accepted_tokens_per_pos_total", "position=\"0\""), 8);
  EXPECT_EQ(Value(both, "vllm:num_requests_running"), 2);
  EXPECT_EQ(Value(both, "vllm:num_requests_waiting"), 3);
  EXPECT_EQ(Value(both, "vllm:kv_cache_usage_perc"), 0.25);
  EXPECT_EQ(Value(both, "vllm:time_to_first_token_seconds_count"), 0);
  EXPECT_EQ(Value(both, "sglang:spec_accept_length"), 2.5);
  EXPECT_EQ(Value(both, "sglang:num_running_reqs"), 2);
  EXPECT_EQ(Value(both, "sglang:num_queue_reqs"), 3);
  EXPECT_EQ(Value(both, "sglang:token_usage"), 0.25);
  const Exposition vllm = Parse(Metrics({.model_name = "m", .vllm = true}).Exposition(MakeLoads(), {}));
  EXPECT_EQ(vllm.types.count("vllm:num_requests_running"), 1u);
  EXPECT_EQ(vllm.types.count("sglang:num_running_reqs"), 0u);
}

TEST(MetricsTest, AModelNameWithQuotesStaysOneLabel) {
  const std::string text = Metrics({.model_name = "a\"b\\c\nd"}).Exposition(EngineLoads(), {});
  EXPECT_TRUE(absl::StrContains(text, R"(bebop:weight_version{model_name="a\"b\\c\nd"} 0)")) << text.substr(0, 400);
}

SpecCounts Accepts(int64_t drafts, int64_t accepted) { return {.num_spec_steps = drafts / 3, .num_draft_tokens = drafts, .num_accepted_draft_tokens = accepted}; }

TEST(AcceptanceDroppedTest, ADropMustBeLargeAndSure) {
  EXPECT_TRUE(AcceptanceDropped(Accepts(1000, 400), Accepts(1000, 600)));
  EXPECT_FALSE(AcceptanceDropped(Accepts(999, 400), Accepts(1000, 600)));  // too few under the new
  EXPECT_FALSE(AcceptanceDropped(Accepts(1000, 400), Accepts(999, 600)));  // or the old version
  EXPECT_FALSE(AcceptanceDropped(Accepts(1000, 600), Accepts(1000, 400)));  // a rise
  EXPECT_FALSE(AcceptanceDropped(Accepts(100'000, 55'000), Accepts(100'000, 60'000)));  // sure, but a twelfth
  EXPECT_FALSE(AcceptanceDropped(Accepts(1000, 37), Accepts(1000, 50)));                // a quarter, but by chance
  EXPECT_TRUE(AcceptanceDropped(Accepts(100'000, 3700), Accepts(100'000, 5000)));       // the same, and sure
  EXPECT_FALSE(AcceptanceDropped(Accepts(1000, 0), Accepts(1000, 0)));
  EXPECT_FALSE(AcceptanceDropped({}, {}));
}

TEST(AcceptanceWatchTest, HearsSlowDrift) {
  AcceptanceWatch watch;
  double rate = 0.8;
  int rang_at = -1;
  for (int step = 1; step <= 30; ++step, rate *= 0.98) {  // no step falls by a fifth
    const SpecCounts version = Accepts(5000, static_cast<int64_t>(5000 * rate));
    if (rang_at < 0 && watch.Dropped(version)) rang_at = step;
    watch.OnCommit(version, 1);
  }
  EXPECT_GE(rang_at, 12);  // 0.98^11 is the first below 0.8012
  EXPECT_LE(rang_at, 14);
  EXPECT_TRUE(watch.Dropped({}));  // it goes on while a new version has too few drafts to tell
}

TEST(AcceptanceWatchTest, HearsVersionsThatLiveForAMoment) {
  AcceptanceWatch watch;
  for (int step = 0; step < 10; ++step) watch.OnCommit(Accepts(300, 240), 1);
  EXPECT_FALSE(watch.Dropped(Accepts(300, 240)));
  for (int step = 0; step < 10; ++step) watch.OnCommit(Accepts(300, 120), 1);
  EXPECT_TRUE(watch.Dropped(Accepts(300, 120)));
}

TEST(AcceptanceWatchTest, ANewDraftLayerIsComparedWithTheLastOfTheOld) {
  AcceptanceWatch watch;
  watch.OnCommit(Accepts(2000, 1600), 1);
  watch.OnCommit(Accepts(2000, 1000), 1);
  EXPECT_TRUE(watch.Dropped({}));
  watch.OnCommit(Accepts(2000, 1000), 2);
  EXPECT_FALSE(watch.Dropped({}));
  EXPECT_FALSE(watch.Dropped(Accepts(2000, 1000)));
  EXPECT_TRUE(watch.Dropped(Accepts(2000, 600)));  // it was a bad one
  watch.OnCommit(Accepts(2000, 1600), 2);
  EXPECT_TRUE(watch.Dropped(Accepts(2000, 1000)));  // and from now on with its own best
}

TEST(AcceptanceWatchTest, ASteadyShareNeverRings) {
  AcceptanceWatch watch;
  EXPECT_FALSE(watch.Dropped(Accepts(5000, 100)));  // there is nothing to compare with
  for (int step = 0; step < 100; ++step) {
    const SpecCounts version = Accepts(1000, step % 2 == 0 ? 580 : 620);
    EXPECT_FALSE(watch.Dropped(version)) << step;
    watch.OnCommit(version, 1);
  }
}

TEST(AcceptanceWatchTest, IsWhatAScrapeTells) {
  Metrics metrics({.model_name = "m"});
  EngineLoads loads;
  loads.previous_version_spec = Accepts(2000, 1600);
  metrics.OnCommit(loads);
  loads.version_spec = Accepts(2000, 1600);
  EXPECT_EQ(Value(Parse(metrics.Exposition(loads, {})), "bebop:spec_acceptance_dropped"), 0);
  loads.version_spec = Accepts(2000, 1000);
  EXPECT_EQ(Value(Parse(metrics.Exposition(loads, {})), "bebop:spec_acceptance_dropped"), 1);
}

// ---- over HTTP ----

// Everything a server answers to `bytes`.
std::string Talk(int32_t port, const std::string& bytes) {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  ::inet_pton(AF_INET, "127.0.0.1", &address.sin_addr);
  std::string reply;
  if (::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) {
    (void)::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);  // may be cut short by a refusal
    char buffer[4096];
    for (ssize_t n = 0; (n = ::recv(fd, buffer, sizeof buffer, 0)) > 0;) reply.append(buffer, static_cast<size_t>(n));
  }
  ::close(fd);
  return reply;
}

std::string Get(int32_t port, const std::string& path) { return Talk(port, absl::StrCat("GET ", path, " HTTP/1.1\r\nHost: x\r\n\r\n")); }

class HttpTest : public testing::Test {
 protected:
  HttpTest() {
    ListenOptions options;
    options.http_port = 0;
    options.served_model_name = "m";
    auto server = Server::Start(&engine_, options);
    EXPECT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    const std::vector<std::string> parts = absl::StrSplit(server_->http_address(), ':');
    EXPECT_TRUE(absl::SimpleAtoi(parts.back(), &port_)) << server_->http_address();
  }

  FakeEngine engine_;
  std::unique_ptr<Server> server_;
  int32_t port_ = 0;
};

bool Has(const std::string& reply, int status) { return absl::StartsWith(reply, absl::StrCat("HTTP/1.1 ", status, " ")); }

TEST_F(HttpTest, ScrapesAreWellFormed) {
  const std::string reply = Get(port_, "/metrics");
  EXPECT_TRUE(Has(reply, 200)) << reply;
  EXPECT_TRUE(absl::StrContains(reply, "\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n")) << reply;
  const size_t head = reply.find("\r\n\r\n");
  ASSERT_NE(head, std::string::npos);
  const std::string body = reply.substr(head + 4);
  EXPECT_TRUE(absl::StrContains(reply, absl::StrCat("\r\nContent-Length: ", body.size(), "\r\n")));
  const Exposition page = Parse(body);
  EXPECT_EQ(page.faults, std::vector<std::string>());
  EXPECT_EQ(Value(page, "bebop:requests_submitted_total"), 3);
  EXPECT_EQ(Value(page, "bebop:serving"), 1);
  EXPECT_TRUE(Has(Get(port_, "/metrics?name=x"), 200));
}

TEST_F(HttpTest, ProbesFollowTheEngine) {
  EXPECT_TRUE(Has(Get(port_, "/health"), 200));
  EXPECT_TRUE(Has(Get(port_, "/liveness"), 200));
  EXPECT_TRUE(Has(Get(port_, "/ready"), 200));
  EXPECT_TRUE(absl::StrContains(Get(port_, "/version"), "{\"version\": \""));
  // Neither a pause nor a sleep is a reason to start the process again, or to send its requests elsewhere.
  ASSERT_TRUE(engine_.Pause(PauseMode::kKeep, false, absl::Seconds(1)).ok());
  ASSERT_TRUE(engine_.Sleep({.weights = true, .kv_cache = true}).ok());
  EXPECT_TRUE(Has(Get(port_, "/health"), 200));
  EXPECT_TRUE(Has(Get(port_, "/ready"), 200));
  engine_.SetHealth(absl::InternalError("device error"));
  const std::string failed = Get(port_, "/health");
  EXPECT_TRUE(Has(failed, 503)) << failed;
  EXPECT_TRUE(absl::EndsWith(failed, "device error\n")) << failed;
  EXPECT_TRUE(Has(Get(port_, "/ready"), 503));
}

TEST_F(HttpTest, DrainingIsAliveButNotReady) {
  server_->Drain(absl::Seconds(1));
  EXPECT_TRUE(Has(Get(port_, "/health"), 200));
  EXPECT_TRUE(Has(Get(port_, "/ready"), 503));
  EXPECT_TRUE(absl::StrContains(Get(port_, "/metrics"), "bebop:draining{model_name=\"m\"} 1\n"));
}

// No file, no other method, no bytes that are no HTTP; and it serves on.
TEST_F(HttpTest, EverythingElseIsRefused) {
  for (const char* path : {"/", "/metrics/", "/etc/passwd", "/../../etc/passwd", "/%2e%2e/etc/passwd", "//metrics2", "/health/x"}) {
    EXPECT_TRUE(Has(Get(port_, path), 404)) << path << ": " << Get(port_, path);
  }
  for (const char* method : {"POST", "PUT", "DELETE", "OPTIONS", "PROPFIND"}) {
    const std::string reply = Talk(port_, absl::StrCat(method, " /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"));
    EXPECT_TRUE(Has(reply, 405)) << method << ": " << reply;
  }
  const std::string head = Talk(port_, "HEAD /health HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_TRUE(Has(head, 200)) << head;
  EXPECT_TRUE(absl::EndsWith(head, "\r\n\r\n")) << head;
  for (const std::string& bytes : {std::string("\0\0\0\0\r\n\r\n", 8), std::string("GET\r\n\r\n"), std::string("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
                                   absl::StrCat("GET /", std::string(100'000, 'a'), " HTTP/1.1\r\n\r\n")}) {
    EXPECT_FALSE(Has(Talk(port_, bytes), 200));
  }
  EXPECT_TRUE(Has(Get(port_, "/health"), 200));
}

// Peers that connect and send nothing, or half a request, are not what a probe waits for.
TEST_F(HttpTest, ProbesAreAnsweredBesideHalfOpenConnections) {
  std::vector<int> peers;
  for (int i = 0; i < 8; ++i) {
    const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port_));
    ::inet_pton(AF_INET, "127.0.0.1", &address.sin_addr);
    ASSERT_EQ(::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    if (i % 2 == 0) (void)::send(fd, "GET /met", 8, MSG_NOSIGNAL);
    peers.push_back(fd);
  }
  const absl::Time start = absl::Now();
  EXPECT_TRUE(Has(Get(port_, "/health"), 200));
  EXPECT_LT(absl::Now() - start, absl::Milliseconds(1500));  // none of the eight has been given up by then
  for (const int fd : peers) ::close(fd);
}

TEST(HttpStartTest, APortInUseIsNamed) {
  const auto first = HttpEndpoints::Start("127.0.0.1", 0, [](const std::string&) { return HttpReply(); });
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_GT((*first)->port(), 0);
  const auto second = HttpEndpoints::Start("127.0.0.1", (*first)->port(), [](const std::string&) { return HttpReply(); });
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(absl::StrContains(second.status().message(), absl::StrCat("--http-port: cannot listen on 127.0.0.1:", (*first)->port())));
}

// The library alone would take up to 2 s, until its listening thread looks up.
TEST(HttpStartTest, StopsAtOnce) {
  for (const char* host : {"127.0.0.1", "0.0.0.0"}) {
    auto endpoints = HttpEndpoints::Start(host, 0, [](const std::string&) { return HttpReply{.body = "ok\n"}; });
    ASSERT_TRUE(endpoints.ok()) << endpoints.status();
    EXPECT_TRUE(absl::StrContains(Get((*endpoints)->port(), "/"), "ok"));
    const absl::Time start = absl::Now();
    endpoints->reset();
    EXPECT_LT(absl::Now() - start, absl::Seconds(1)) << host;
  }
}

TEST(HttpStartTest, AServerThatLetsEverybodyInSaysSo) {
  FakeEngine engine;
  ListenOptions options;
  options.http_port = 0;
  options.is_loopback = false;
  options.served_model_name = "m";
  const auto server = Server::Start(&engine, options);
  ASSERT_TRUE(server.ok()) << server.status();
  int32_t port = 0;
  ASSERT_TRUE(absl::SimpleAtoi((*server)->http_address().substr((*server)->http_address().rfind(':') + 1), &port));
  EXPECT_TRUE(absl::StrContains(Get(port, "/metrics"), "bebop:insecure_no_auth{model_name=\"m\"} 1\n"));
}

TEST(HttpStartTest, NoneIsTheDefault) {
  FakeEngine engine;
  const auto server = Server::Start(&engine, ListenOptions());
  ASSERT_TRUE(server.ok());
  EXPECT_EQ((*server)->http_address(), "");
}

}  // namespace
}  // namespace bebop
