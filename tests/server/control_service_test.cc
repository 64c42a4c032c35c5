// SPDX-License-Identifier: Apache-2.0
// The Control service over a real socket: with an engine that the test plays, and with the real one, whose samples go on elsewhere.
#include <gtest/gtest.h>

#include <future>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "client/cpp/client.h"
#include "client/cpp/control_client.h"
#include "engine/runtime/engine.h"
#include "server/server.h"
#include "tests/server/fake_engine.h"

namespace bebop {
namespace {

class ControlTest : public ::testing::Test {
 protected:
  void SetUp() override { Start({}); }
  void Start(const ListenOptions& options) {
    server_.reset();
    auto server = Server::Start(&engine_, options);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    control_ = std::make_unique<ControlClient>(ClientOptions{.server = server_->admin_address(), .timeout = absl::Seconds(30)});
    client_ = std::make_unique<Client>(ClientOptions{.server = server_->rollout_address(), .timeout = absl::Seconds(30)});
  }
  std::string Field(const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    const auto details = GetErrorDetails(status);
    EXPECT_EQ(details.reason, "INVALID_FIELD") << status;
    return details.metadata.count("field") > 0 ? details.metadata.at("field") : "";
  }

  FakeEngine engine_;
  std::unique_ptr<Server> server_;
  std::unique_ptr<ControlClient> control_;
  std::unique_ptr<Client> client_;
};

TEST_F(ControlTest, PauseTellsTheEngineAndTheCaller) {
  v1::PauseGenerationRequest request;
  auto state = control_->PauseGeneration(request);
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_TRUE(state->paused());
  EXPECT_EQ(state->aborted_samples(), 0);
  EXPECT_EQ(state->running_requests(), 1);  // as the fake engine's loads have it
  EXPECT_TRUE(client_->GetLoads()->paused());
  EXPECT_TRUE(client_->GetServerInfo()->paused());
  // A pause is no illness.
  for (const char* service : {"", "bebop.v1.Rollout"}) EXPECT_EQ(*client_->Health(service), "SERVING") << service;
  request.set_mode(v1::PauseGenerationRequest::ABORT);
  request.set_clear_cache(true);
  state = control_->PauseGeneration(request);
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->aborted_samples(), 3);
  EXPECT_EQ(state->abort_epoch(), 1);
  state = control_->ResumeGeneration();
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_FALSE(state->paused());
  EXPECT_EQ(state->aborted_samples(), 0);
  const auto calls = engine_.calls();
  ASSERT_EQ(calls.size(), 3u);
  EXPECT_EQ(calls[0].substr(0, 8), "pause 0 ");
  EXPECT_EQ(calls[1].substr(0, 14), "pause 1 clear ");
  EXPECT_EQ(calls[2], "resume");
}

// A pause waits no longer than its caller does.
TEST_F(ControlTest, WaitingPausesHaveTheCallsDeadline) {
  v1::PauseGenerationRequest request;
  request.set_mode(v1::PauseGenerationRequest::WAIT);
  ASSERT_TRUE(control_->PauseGeneration(request).ok());
  const auto calls = engine_.calls();
  ASSERT_EQ(calls.size(), 1u);
  ASSERT_EQ(calls[0].substr(0, 8), "pause 2 ");
  const int64_t milliseconds = std::stoll(calls[0].substr(8));
  EXPECT_GT(milliseconds, 10'000);
  EXPECT_LE(milliseconds, 30'300);  // 30 s, which gRPC rounds up to what its header can say
}

// Pauses that stand in the engine until Release, or the end.
class StandingPauses {
 public:
  StandingPauses(FakeEngine* engine, ControlClient* control) : engine_(*engine), control_(*control) {
    engine_.OnPause([this] {
      ++num_inside_;
      released_.wait();
    });
  }
  ~StandingPauses() { Release(); }
  // Returns when `count` more stand there.
  bool Add(v1::PauseGenerationRequest::Mode mode, int count) {
    v1::PauseGenerationRequest request;
    request.set_mode(mode);
    const int before = num_inside_;
    for (int i = 0; i < count; ++i) replies_.push_back(std::async(std::launch::async, [this, request] { return control_.PauseGeneration(request).status(); }));
    return FakeEngine::WaitUntil([&] { return num_inside_ == before + count; });
  }
  int num_inside() const { return num_inside_; }
  // What the callers hear.
  std::vector<absl::Status> Release() {
    if (!std::exchange(is_released_, true)) release_.set_value();
    std::vector<absl::Status> statuses;
    for (auto& reply : replies_) statuses.push_back(reply.get());
    replies_.clear();
    return statuses;
  }

 private:
  FakeEngine& engine_;
  ControlClient& control_;
  std::promise<void> release_;
  const std::shared_future<void> released_ = release_.get_future().share();
  bool is_released_ = false;
  std::atomic<int> num_inside_ = 0;
  std::vector<std::future<absl::Status>> replies_;
};

TEST_F(ControlTest, FewPausesWaitAtATime) {
  StandingPauses pauses(&engine_, control_.get());
  ASSERT_TRUE(pauses.Add(v1::PauseGenerationRequest::WAIT, 2));
  v1::PauseGenerationRequest wait;
  wait.set_mode(v1::PauseGenerationRequest::WAIT);
  const absl::Status third = control_->PauseGeneration(wait).status();
  EXPECT_EQ(third.code(), absl::StatusCode::kResourceExhausted) << third;
  EXPECT_EQ(third.message(), "too many pauses wait already");
  EXPECT_EQ(GetErrorDetails(third).reason, "CAPACITY");
  EXPECT_TRUE(GetErrorDetails(third).retry_after.has_value());
  EXPECT_EQ(pauses.num_inside(), 2);
  EXPECT_TRUE(pauses.Add(v1::PauseGenerationRequest::KEEP, 1)) << "those that do not wait are not counted";
  for (const absl::Status& status : pauses.Release()) EXPECT_TRUE(status.ok()) << status;
  EXPECT_TRUE(control_->PauseGeneration(wait).ok()) << "others have room again";
}

// However many calls wait, a resume, which may be what they wait for, does not wait behind them.
TEST_F(ControlTest, AResumeNeverWaitsBehindOtherCalls) {
  StandingPauses pauses(&engine_, control_.get());
  ASSERT_TRUE(pauses.Add(v1::PauseGenerationRequest::KEEP, 8)) << "all threads for calls that may wait";
  const auto resumed = control_->ResumeGeneration();
  EXPECT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_EQ(engine_.calls(), std::vector<std::string>{"resume"});
  for (const absl::Status& status : pauses.Release()) EXPECT_TRUE(status.ok()) << status;
}

TEST_F(ControlTest, SleepAndWakeUpByTag) {
  v1::SleepRequest sleep;
  sleep.add_tags("kv_cache");
  auto state = control_->Sleep(sleep);
  ASSERT_TRUE(state.ok()) << state.status();
  ASSERT_EQ(state->sleeping_size(), 1);
  EXPECT_EQ(state->sleeping(0), "kv_cache");
  state = control_->Sleep({});  // both
  ASSERT_EQ(state->sleeping_size(), 2);
  EXPECT_EQ(client_->GetLoads()->sleeping_size(), 2);
  EXPECT_EQ(client_->GetServerInfo()->sleeping(0), "weights");
  EXPECT_EQ(*client_->Health(""), "SERVING");
  v1::WakeUpRequest wake_up;
  wake_up.add_tags("weights");
  state = control_->WakeUp(wake_up);
  ASSERT_EQ(state->sleeping_size(), 1);
  EXPECT_EQ(state->sleeping(0), "kv_cache");
  EXPECT_EQ(control_->WakeUp({})->sleeping_size(), 0);
  EXPECT_TRUE(control_->FlushCache().ok());
  EXPECT_EQ(engine_.calls().back(), "flush");
}

TEST_F(ControlTest, BadValuesAreNamed) {
  v1::PauseGenerationRequest pause;
  pause.set_mode(static_cast<v1::PauseGenerationRequest::Mode>(9));
  EXPECT_EQ(Field(control_->PauseGeneration(pause).status()), "mode");
  v1::SleepRequest sleep;
  sleep.add_tags("weights");
  sleep.add_tags("everything");
  EXPECT_EQ(Field(control_->Sleep(sleep).status()), "tags[1]");
  v1::WakeUpRequest wake_up;
  for (int i = 0; i < 3; ++i) wake_up.add_tags("weights");
  EXPECT_EQ(Field(control_->WakeUp(wake_up).status()), "tags");
  v1::DrainRequest drain;
  for (const double seconds : {-1.0, 86400.5, std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    drain.set_deadline_seconds(seconds);
    EXPECT_EQ(Field(control_->Drain(drain).status()), "deadline_seconds") << seconds;
  }
  v1::SleepRequest unknown;
  unknown.GetReflection()->MutableUnknownFields(&unknown)->AddVarint(1000, 1);
  EXPECT_EQ(GetErrorDetails(control_->Sleep(unknown).status()).reason, "UNKNOWN_FIELD");
  EXPECT_TRUE(engine_.calls().empty());
  EXPECT_FALSE(client_->GetLoads()->draining());
  EXPECT_EQ(*client_->Health(""), "SERVING");
}

TEST_F(ControlTest, SpeculationIsWhatRequestsGetFromNowOn) {
  ListenOptions options;
  options.default_mode = SpeculationMode::kRejection;
  options.default_num_draft_tokens = 3;
  Start(options);
  const auto set = [this](v1::SpeculationParams::Mode mode, std::optional<int32_t> drafts) {
    v1::SetSpeculationRequest request;
    request.mutable_speculation()->set_mode(mode);
    if (drafts.has_value()) request.mutable_speculation()->set_num_draft_tokens(*drafts);
    return control_->SetSpeculation(request);
  };
  const auto expect = [this](const absl::StatusOr<v1::ControlState>& state, v1::SpeculationParams::Mode mode, int32_t drafts) {
    ASSERT_TRUE(state.ok()) << state.status();
    EXPECT_EQ(state->speculation().mode(), mode);
    EXPECT_EQ(state->speculation().num_draft_tokens(), drafts);
    EXPECT_EQ(client_->GetServerInfo()->default_speculation().SerializeAsString(), state->speculation().SerializeAsString());
  };
  expect(control_->SetSpeculation({}), v1::SpeculationParams::REJECTION, 3);
  expect(set(v1::SpeculationParams::COUPLED, std::nullopt), v1::SpeculationParams::COUPLED, 3);
  expect(set(v1::SpeculationParams::UNSPECIFIED, 5), v1::SpeculationParams::COUPLED, 5);
  v1::GenerateRequest request;
  request.set_request_id("r");
  request.add_prompt_token_ids(1);
  auto reply = std::async(std::launch::async, [&] { return client_->Generate(request); });
  ASSERT_EQ(engine_.WaitForObservers("r").size(), 1u);
  EXPECT_EQ(engine_.RequestOf("r").speculation.mode, SpeculationMode::kCoupled);
  EXPECT_EQ(engine_.RequestOf("r").speculation.num_draft_tokens, 5);
  engine_.Done("r", absl::OkStatus());
  EXPECT_TRUE(reply.get().ok());
  // The number stays for requests that choose a mode.
  expect(set(v1::SpeculationParams::OFF, std::nullopt), v1::SpeculationParams::OFF, 5);
  EXPECT_EQ(Field(set(v1::SpeculationParams::REJECTION, 6).status()), "speculation.num_draft_tokens");
  EXPECT_EQ(Field(set(v1::SpeculationParams::REJECTION, -1).status()), "speculation.num_draft_tokens");
  EXPECT_EQ(Field(set(static_cast<v1::SpeculationParams::Mode>(9), 1).status()), "speculation.mode");
  v1::SetSpeculationRequest synthetic;
  synthetic.mutable_speculation()->set_synthetic_acceptance(0.5f);
  EXPECT_EQ(Field(control_->SetSpeculation(synthetic).status()), "speculation.synthetic_acceptance");
  expect(control_->SetSpeculation({}), v1::SpeculationParams::OFF, 5);  // what was refused changed nothing
}

// A repeat is told what its group runs with, whatever the defaults are by now, and its handle goes on with that.
TEST_F(ControlTest, RepeatsReportTheSpeculationThatRan) {
  ListenOptions options;
  options.default_mode = SpeculationMode::kCoupled;
  options.default_num_draft_tokens = 4;
  Start(options);
  v1::GenerateRequest request;
  request.set_request_id("r");
  request.add_prompt_token_ids(1);
  auto first = std::async(std::launch::async, [&] { return client_->Generate(request); });
  ASSERT_EQ(engine_.WaitForObservers("r").size(), 1u);
  v1::SetSpeculationRequest off;
  off.mutable_speculation()->set_mode(v1::SpeculationParams::OFF);
  ASSERT_TRUE(control_->SetSpeculation(off).ok());
  auto repeat = std::async(std::launch::async, [&] { return client_->Generate(request); });
  ASSERT_EQ(engine_.WaitForObservers("r", 2).size(), 2u);
  SampleResult sample;
  sample.seed_used = 12;
  sample.token_ids = {1, 2};
  sample.finish = FinishReason::kAborted;
  engine_.Sample("r", sample);
  engine_.Done("r", absl::OkStatus());
  const auto result = first.get(), again = repeat.get();
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_TRUE(again.ok()) << again.status();
  for (const auto& reply : {*result, *again}) {
    ASSERT_EQ(reply.samples_size(), 1);
    EXPECT_EQ(reply.samples(0).applied().speculation().mode(), v1::SpeculationParams::COUPLED);
    EXPECT_EQ(reply.samples(0).applied().speculation().num_draft_tokens(), 4);
    EXPECT_EQ(reply.samples(0).applied().sampling().seed(), 12u);
    EXPECT_EQ(reply.samples(0).spec().drafted_per_pos_size(), 4);
  }
  EXPECT_EQ(result->samples(0).resume_handle(), again->samples(0).resume_handle());
}

TEST_F(ControlTest, StepsThatAreNotReachedAreNamed) {
  v1::GenerateRequest request;
  request.add_prompt_token_ids(1);
  request.mutable_weights()->set_min_step(8);  // the fake engine is at 7
  const auto details = GetErrorDetails(client_->Generate(request).status());
  EXPECT_EQ(details.reason, "STEP_NOT_REACHED");
  EXPECT_EQ(details.metadata.at("field"), "weights.min_step");
  EXPECT_EQ(details.metadata.at("value"), "8");
}

TEST_F(ControlTest, SpeculationNeedsADraftLayer) {
  engine_.mutable_info().has_mtp = false;
  Start({});
  v1::SetSpeculationRequest request;
  request.mutable_speculation()->set_mode(v1::SpeculationParams::REJECTION);
  EXPECT_EQ(GetErrorDetails(control_->SetSpeculation(request).status()).reason, "NO_DRAFT_LAYER");
}

TEST_F(ControlTest, DrainIsFinalAndTheProcessGoesOn) {
  v1::GenerateRequest request;
  request.set_request_id("r");
  request.add_prompt_token_ids(1);
  auto reply = std::async(std::launch::async, [&] { return client_->Generate(request); });
  ASSERT_EQ(engine_.WaitForObservers("r").size(), 1u);
  v1::DrainRequest drain;
  drain.set_deadline_seconds(30);
  auto drained = std::async(std::launch::async, [&] { return control_->Drain(drain); });
  ASSERT_TRUE(FakeEngine::WaitUntil([&] { return engine_.draining(); }));
  for (const char* service : {"", "bebop.v1.Rollout", "bebop.v1.Info"}) EXPECT_EQ(*client_->Health(service), "NOT_SERVING") << service;
  EXPECT_TRUE(client_->GetServerInfo()->draining());
  v1::GenerateRequest late = request;
  late.set_request_id("late");
  EXPECT_EQ(GetErrorDetails(client_->Generate(late).status()).reason, "DRAINING");
  EXPECT_TRUE(control_->ResumeGeneration()->draining());  // other calls are answered meanwhile
  // Two drains may wait; a third is told at once that the server drains.
  std::vector<std::future<absl::StatusOr<v1::ControlState>>> more;
  for (int i = 0; i < 2; ++i) more.push_back(std::async(std::launch::async, [&] { return control_->Drain(drain); }));
  const auto answered = [](const std::future<absl::StatusOr<v1::ControlState>>& call) {
    return call.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
  };
  EXPECT_TRUE(FakeEngine::WaitUntil([&] { return answered(more[0]) || answered(more[1]) || answered(drained); }));
  EXPECT_TRUE(engine_.HasOpenRequests());
  SampleResult sample;
  sample.token_ids = {1, 2};
  sample.finish = FinishReason::kDrained;
  engine_.Sample("r", sample);
  engine_.Done("r", absl::OkStatus());
  const auto result = reply.get();
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->samples(0).finish().reason(), v1::Finish::DRAINED);
  EXPECT_FALSE(result->samples(0).resume_handle().empty());
  for (auto& call : more) {
    const auto state = call.get();
    ASSERT_TRUE(state.ok()) << state.status();
    EXPECT_TRUE(state->draining());
  }
  const auto state = drained.get();
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_TRUE(state->draining());
  EXPECT_TRUE(control_->Drain({})->draining());
  EXPECT_TRUE(client_->GetLoads()->draining());  // the listeners stay
}

TEST_F(ControlTest, OnTheAdminPortOnly) {
  Client admin({.server = server_->admin_address(), .timeout = absl::Seconds(30)});
  for (const char* service : {"bebop.v1.Control", "bebop.v1.Weights", "bebop.v1.Info", ""}) EXPECT_EQ(*admin.Health(service), "SERVING") << service;
  EXPECT_EQ(client_->Health("bebop.v1.Control").status().code(), absl::StatusCode::kNotFound);
  ControlClient wrong({.server = server_->rollout_address(), .timeout = absl::Seconds(30)});
  EXPECT_EQ(wrong.ResumeGeneration().status().code(), absl::StatusCode::kUnimplemented);
}

// ---- with the real engine ----

struct Replica {
  std::unique_ptr<Engine> engine;
  std::unique_ptr<Server> server;
  std::unique_ptr<Client> client;
  std::unique_ptr<ControlClient> control;
};

Replica StartReplica(SpeculationMode default_mode, int32_t max_model_len) {
  EngineOptions options;
  options.model_path = "tests/models/bebop-tiny";
  options.num_threads = 1;
  options.max_model_len = max_model_len;
  options.max_num_seqs = 4;
  options.max_draft_tokens = 3;
  Replica replica;
  auto engine = Engine::Create(options);
  EXPECT_TRUE(engine.ok()) << engine.status();
  replica.engine = *std::move(engine);
  ListenOptions listen;
  listen.default_mode = default_mode;
  listen.default_num_draft_tokens = 3;
  auto server = Server::Start(replica.engine.get(), listen);
  EXPECT_TRUE(server.ok()) << server.status();
  replica.server = *std::move(server);
  replica.client = std::make_unique<Client>(ClientOptions{.server = replica.server->rollout_address(), .timeout = absl::Seconds(60)});
  replica.control = std::make_unique<ControlClient>(ClientOptions{.server = replica.server->admin_address(), .timeout = absl::Seconds(60)});
  return replica;
}

// Samples that a pause cut short go on on another replica, whose defaults differ, and are what they would have been undisturbed.
TEST(ResumeElsewhere, GivesTheTokensOfAnUndisturbedRun) {
  Replica first = StartReplica(SpeculationMode::kRejection, 192);
  Replica second = StartReplica(SpeculationMode::kOff, 256);
  struct Case {
    const char* name;
    float temperature;
    v1::SpeculationParams::Mode mode;
  };
  for (const Case& one : {Case{"greedy", 0.0f, v1::SpeculationParams::REJECTION}, Case{"rejection", 1.0f, v1::SpeculationParams::UNSPECIFIED},
                          Case{"coupled", 1.0f, v1::SpeculationParams::COUPLED}, Case{"plain", 1.0f, v1::SpeculationParams::OFF}}) {
    SCOPED_TRACE(one.name);
    v1::GenerateRequest request;
    for (uint32_t id = 5; id < 13; ++id) request.add_prompt_token_ids(id);
    request.set_num_samples(3);
    request.mutable_sampling()->set_temperature(one.temperature);
    request.mutable_sampling()->set_seed(99);
    request.mutable_stopping()->set_ignore_eos(true);
    request.mutable_output()->set_logprobs(true);
    request.mutable_output()->set_token_source(true);
    request.mutable_speculation()->set_mode(one.mode);
    const auto undisturbed = first.client->Generate(request);
    ASSERT_TRUE(undisturbed.ok()) << undisturbed.status();

    v1::GenerateRequest streamed = request;
    streamed.mutable_output()->set_stream_tokens(true);
    std::vector<v1::SampleResult> partial;
    int tokens = 0;
    std::future<absl::StatusOr<v1::ControlState>> paused;
    const absl::Status status = first.client->GenerateStream(streamed, [&](const v1::GenerateEvent& event) {
      tokens += event.token_chunk().token_ids_size();
      if (tokens >= 40 && !paused.valid()) {
        paused = std::async(std::launch::async, [&first] {
          v1::PauseGenerationRequest pause;
          pause.set_mode(v1::PauseGenerationRequest::ABORT);
          return first.control->PauseGeneration(pause);
        });
      }
      if (event.has_sample_result()) partial.push_back(event.sample_result());
      return true;
    });
    ASSERT_TRUE(status.ok()) << status;
    ASSERT_TRUE(paused.valid());
    const auto state = paused.get();
    ASSERT_TRUE(state.ok()) << state.status();
    ASSERT_TRUE(first.control->ResumeGeneration().ok());
    ASSERT_EQ(partial.size(), 3u);

    v1::GenerateRequest resume = request;
    resume.clear_num_samples();
    resume.mutable_sampling()->clear_seed();
    int32_t cut = 0;
    for (const v1::SampleResult& sample : partial) {
      if (sample.finish().reason() != v1::Finish::ABORTED) continue;
      ++cut;
      EXPECT_EQ(sample.abort_epoch(), state->abort_epoch());
      EXPECT_LT(sample.token_ids_size(), undisturbed->samples(0).token_ids_size());
      ASSERT_FALSE(sample.resume_handle().empty());
      resume.add_resume(sample.resume_handle());
    }
    EXPECT_EQ(cut, state->aborted_samples());
    ASSERT_GT(cut, 0);
    const auto resumed = second.client->Generate(resume);
    ASSERT_TRUE(resumed.ok()) << resumed.status();
    ASSERT_EQ(resumed->samples_size(), cut);
    for (const v1::SampleResult& sample : resumed->samples()) {
      const v1::SampleResult& expected = undisturbed->samples(sample.sample_index());
      EXPECT_EQ(std::vector<uint32_t>(sample.token_ids().begin(), sample.token_ids().end()),
                std::vector<uint32_t>(expected.token_ids().begin(), expected.token_ids().end()));
      EXPECT_EQ(sample.token_source().size(), sample.token_ids().size());
      ASSERT_EQ(sample.logprobs_size(), expected.logprobs_size());
      for (int i = 0; i < sample.logprobs_size(); ++i) EXPECT_NEAR(sample.logprobs(i), expected.logprobs(i), 1e-3) << i;
      EXPECT_EQ(sample.finish().reason(), v1::Finish::LENGTH);
      EXPECT_EQ(sample.seed_used(), 99u);
      EXPECT_TRUE(sample.resume_handle().empty());
      EXPECT_EQ(sample.applied().speculation().SerializeAsString(), expected.applied().speculation().SerializeAsString());
      EXPECT_EQ(sample.applied().stopping().max_new_tokens(), 184);
    }
  }
}

}  // namespace
}  // namespace bebop
