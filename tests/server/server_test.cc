// SPDX-License-Identifier: Apache-2.0
// The server in process, over real sockets, with an engine that the test plays.
#include "server/server.h"

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <time.h>

#include <future>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "bebop/rpc/status.pb.h"
#include "client/cpp/client.h"
#include "server/limits.h"
#include "tests/server/fake_engine.h"

namespace bebop {
namespace {

SampleResult MakeSample(int32_t index, std::vector<uint32_t> ids, FinishReason finish = FinishReason::kLength) {
  SampleResult sample;
  sample.sample_index = index;
  sample.token_ids = std::move(ids);
  sample.finish = finish;
  return sample;
}

v1::GenerateRequest MakeRequest(const std::string& id, int32_t num_samples = 1) {
  v1::GenerateRequest request;
  request.set_request_id(id);
  request.add_prompt_token_ids(1);
  request.add_prompt_token_ids(2);
  request.set_num_samples(num_samples);
  return request;
}

class ServerTest : public ::testing::Test {
 protected:
  void SetUp() override { Start({}); }
  void Start(const ListenOptions& options) {
    server_.reset();
    auto server = Server::Start(&engine_, options);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }
  std::unique_ptr<Client> Connect(absl::Duration timeout = absl::Seconds(30)) {
    return std::make_unique<Client>(ClientOptions{server_->rollout_address(), timeout});
  }
  std::future<absl::StatusOr<v1::GenerateResult>> GenerateAsync(Client* client, const v1::GenerateRequest& request) {
    return std::async(std::launch::async, [client, request] { return client->Generate(request); });
  }
  // Sends `bytes` to a method and returns the status.
  grpc::Status CallRaw(const std::string& address, const std::string& method, const std::string& bytes, std::string* reply = nullptr) {
    const auto channel = grpc::CreateChannel(address, grpc::InsecureChannelCredentials());
    grpc::GenericStub stub(channel);
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    grpc::CompletionQueue queue;
    const auto call = stub.PrepareCall(&context, method, &queue);
    void* tag = nullptr;
    bool ok = false;
    call->StartCall(nullptr);
    queue.Next(&tag, &ok);
    const grpc::Slice slice(bytes);
    if (ok) {
      call->WriteLast(grpc::ByteBuffer(&slice, 1), grpc::WriteOptions(), nullptr);
      queue.Next(&tag, &ok);
    }
    grpc::ByteBuffer answer;
    call->Read(&answer, nullptr);
    queue.Next(&tag, &ok);
    if (ok && reply != nullptr) {
      grpc::Slice whole;
      if (answer.DumpToSingleSlice(&whole).ok()) reply->assign(reinterpret_cast<const char*>(whole.begin()), whole.size());
    }
    grpc::Status status;
    call->Finish(&status, nullptr);
    queue.Next(&tag, &ok);
    return status;
  }

  FakeEngine engine_;
  std::unique_ptr<Server> server_;
};

TEST_F(ServerTest, GenerateRepliesWithTheWholeGroupInOrder) {
  const auto client = Connect();
  v1::GenerateRequest request = MakeRequest("r", 3);
  request.mutable_output()->set_prompt(true);
  auto reply = GenerateAsync(client.get(), request);
  ASSERT_EQ(engine_.WaitForObservers("r").size(), 1u);
  EXPECT_EQ(engine_.RequestOf("r").num_samples, 3);
  for (const int index : {2, 0, 1}) engine_.Sample("r", MakeSample(index, {static_cast<uint32_t>(index), 9}));
  EXPECT_EQ(reply.wait_for(std::chrono::milliseconds(50)), std::future_status::timeout);
  engine_.Done("r", absl::OkStatus());
  const auto result = reply.get();
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->request_id(), "r");
  ASSERT_EQ(result->prompt_token_ids_size(), 2);
  EXPECT_EQ(result->prompt_token_ids(1), 2u);
  ASSERT_EQ(result->samples_size(), 3);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(result->samples(i).sample_index(), i);
    EXPECT_EQ(result->samples(i).token_ids(0), static_cast<uint32_t>(i));
  }
}

TEST_F(ServerTest, EmptyRequestIdGetsOne) {
  const auto client = Connect();
  engine_.SetSubmitStatus(absl::OkStatus());
  v1::GenerateRequest request = MakeRequest("");
  std::string id;
  std::thread finisher([&] {
    // The id is the server's, so the request is found by waiting for any.
    ASSERT_TRUE(FakeEngine::WaitUntil([&] { return engine_.HasOpenRequests(); }));
    id = engine_.OnlyRequestId();
    engine_.Sample(id, MakeSample(0, {1}));
    engine_.Done(id, absl::OkStatus());
  });
  const auto result = client->Generate(request);
  finisher.join();
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_FALSE(id.empty());
  EXPECT_EQ(result->request_id(), id);
}

TEST_F(ServerTest, StreamSendsEventsAsTheyHappen) {
  const auto client = Connect();
  v1::GenerateRequest request = MakeRequest("r", 2);
  request.mutable_output()->set_stream_tokens(true);
  std::vector<v1::GenerateEvent> events;
  std::promise<void> got_chunk;
  std::thread player([&] {
    const auto observers = engine_.WaitForObservers("r");
    observers[0]->OnAdmitted();
    SampleResult partial = MakeSample(0, {5, 6}, FinishReason::kNone);
    observers[0]->OnTokens(partial, 0);
    got_chunk.get_future().wait();  // the chunk is out before the sample ends
    partial.token_ids.push_back(7);
    observers[0]->OnTokens(partial, 2);
    engine_.Sample("r", MakeSample(0, {5, 6, 7}));
    engine_.Sample("r", MakeSample(1, {8}));
    engine_.Done("r", absl::OkStatus());
  });
  const absl::Status status = client->GenerateStream(request, [&](const v1::GenerateEvent& event) {
    events.push_back(event);
    if (event.has_token_chunk() && event.token_chunk().start() == 0) got_chunk.set_value();
    return true;
  });
  player.join();
  ASSERT_TRUE(status.ok()) << status;
  ASSERT_EQ(events.size(), 6u);
  EXPECT_EQ(events[0].admitted().request_id(), "r");
  EXPECT_EQ(events[1].token_chunk().token_ids_size(), 2);
  EXPECT_EQ(events[2].token_chunk().start(), 2);
  EXPECT_EQ(events[2].token_chunk().token_ids(0), 7u);
  EXPECT_EQ(events[3].sample_result().sample_index(), 0);
  EXPECT_EQ(events[4].sample_result().sample_index(), 1);
  EXPECT_EQ(events[5].group_done().num_samples(), 2);
}

TEST_F(ServerTest, DeadlineDetachesTheRequest) {
  const auto client = Connect(absl::Milliseconds(300));
  auto reply = GenerateAsync(client.get(), MakeRequest("r"));
  ASSERT_EQ(engine_.WaitForObservers("r").size(), 1u);
  const auto result = reply.get();
  EXPECT_EQ(result.status().code(), absl::StatusCode::kDeadlineExceeded) << result.status();
  EXPECT_TRUE(FakeEngine::WaitUntil([&] { return engine_.num_detached() == 1; }));
}

// At its deadline a caller would hear "Deadline Exceeded" alone; if the engine stands still it hears why, a little before.
TEST_F(ServerTest, ACallThatStandsStillHearsWhy) {
  const auto client = Connect(absl::Seconds(1));
  v1::GenerateRequest later = MakeRequest("later");
  later.mutable_weights()->set_min_step(9);
  later.mutable_weights()->set_wait_for_step(true);
  absl::Status status = client->Generate(later).status();
  EXPECT_EQ(status.message(), "not done before the call's deadline: weights.min_step 9 is waited for; the target is at step 7");
  EXPECT_EQ(GetErrorDetails(status).reason, "DEADLINE");
  EXPECT_EQ(GetErrorDetails(status).metadata["waits_for"], "weights.min_step");
  ASSERT_TRUE(engine_.Pause(PauseMode::kKeep, false, absl::ZeroDuration()).ok());
  status = client->Generate(MakeRequest("paused")).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(status.message(), "not done before the call's deadline: generation is paused until ResumeGeneration");
  EXPECT_EQ(GetErrorDetails(status).metadata["waits_for"], "ResumeGeneration");
  status = client->GenerateStream(MakeRequest("stream"), [](const v1::GenerateEvent&) { return true; });
  EXPECT_EQ(status.message(), "not done before the call's deadline: generation is paused until ResumeGeneration");
  EXPECT_EQ(engine_.num_detached(), 3);
  ASSERT_TRUE(engine_.Sleep({.weights = true, .kv_cache = true}).ok());
  v1::ScoreRequest score;
  score.add_sequences()->add_token_ids(1);
  status = client->Score(score).status();
  EXPECT_EQ(status.message(), "not done before the call's deadline: the server sleeps (weights, kv_cache) until WakeUp");
  EXPECT_EQ(GetErrorDetails(status).metadata["waits_for"], "WakeUp");
  EXPECT_EQ(engine_.num_cancelled_scores(), 1);
}

// A result that comes in the last moment is not given away for a message.
TEST_F(ServerTest, ACallThatMovesKeepsItsLastMoment) {
  const auto client = Connect(absl::Seconds(2));
  const absl::Time sent = absl::Now();
  auto reply = GenerateAsync(client.get(), MakeRequest("r"));
  ASSERT_EQ(engine_.WaitForObservers("r").size(), 1u);
  absl::SleepFor(sent + absl::Seconds(1.9) - absl::Now());  // the watch rang at 1.8
  engine_.Sample("r", MakeSample(0, {7}));
  engine_.Done("r", absl::OkStatus());
  const auto result = reply.get();
  if (absl::Now() - sent < absl::Seconds(1.95)) {  // else this machine was too slow to tell
    EXPECT_TRUE(result.ok()) << result.status();
  }
  EXPECT_TRUE(result.ok() || !absl::StrContains(result.status().message(), "not done before"));
}

TEST_F(ServerTest, CancelledStreamDetachesTheRequest) {
  const auto client = Connect();
  std::thread player([&] { engine_.WaitForObservers("r").at(0)->OnAdmitted(); });
  const absl::Status status = client->GenerateStream(MakeRequest("r"), [](const v1::GenerateEvent&) { return false; });
  player.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kCancelled) << status;
  EXPECT_TRUE(FakeEngine::WaitUntil([&] { return engine_.num_detached() == 1; }));
}

// What a cancelled request still produces goes nowhere and harms nothing.
TEST_F(ServerTest, EventsAfterCancelAreIgnored) {
  const auto client = Connect();
  std::shared_ptr<GenerateObserver> observer;
  std::thread player([&] {
    observer = engine_.WaitForObservers("r").at(0);
    observer->OnAdmitted();
  });
  (void)client->GenerateStream(MakeRequest("r"), [](const v1::GenerateEvent&) { return false; });
  player.join();
  ASSERT_TRUE(FakeEngine::WaitUntil([&] { return engine_.num_detached() == 1; }));
  observer->OnSample(std::make_shared<const SampleResult>(MakeSample(0, {1})));
  observer->OnDone(absl::OkStatus());
  EXPECT_TRUE(observer->HasRoom());
}

// A server that ends without a drain may leave observers to the engine, which has not taken the next step; its reply thread is gone.
TEST_F(ServerTest, AStreamThatWasCutShortMayOutliveTheServer) {
  const auto client = Connect();
  std::thread reader([&] {
    (void)client->GenerateStream(MakeRequest("r", 2), [](const v1::GenerateEvent&) { return true; });
  });
  std::vector<std::shared_ptr<GenerateObserver>> observers = engine_.WaitForObservers("r");
  ASSERT_EQ(observers.size(), 1u);
  const std::shared_ptr<GenerateObserver> observer = std::move(observers[0]);
  observers.clear();
  engine_.Sample("r", MakeSample(0, {1}, FinishReason::kAborted));
  server_.reset();
  reader.join();
  observer->OnSample(std::make_shared<const SampleResult>(MakeSample(1, {2}, FinishReason::kAborted)));
  observer->OnDone(absl::OkStatus());
  EXPECT_EQ(observer.use_count(), 1);  // nobody keeps it for what would come
}

// Samples that are cut short are made into replies elsewhere; the stream keeps its order.
TEST_F(ServerTest, StreamsKeepTheirOrderBehindASampleThatIsCutShort) {
  const auto client = Connect();
  v1::GenerateRequest request = MakeRequest("r", 3);
  request.mutable_output()->set_stream_tokens(true);
  std::vector<v1::GenerateEvent> events;
  std::thread player([&] {
    const auto observer = engine_.WaitForObservers("r").at(0);
    observer->OnAdmitted();
    engine_.Sample("r", MakeSample(0, {1}, FinishReason::kSuperseded));
    observer->OnTokens(MakeSample(1, {7}, FinishReason::kNone), 0);
    engine_.Sample("r", MakeSample(1, {7}));
    engine_.Sample("r", MakeSample(2, std::vector<uint32_t>(100'000, 5), FinishReason::kWeightPolicy));
    engine_.Done("r", absl::OkStatus());
  });
  const absl::Status status = client->GenerateStream(request, [&](const v1::GenerateEvent& event) {
    events.push_back(event);
    return true;
  });
  player.join();
  ASSERT_TRUE(status.ok()) << status;
  ASSERT_EQ(events.size(), 6u);
  EXPECT_TRUE(events[0].has_admitted());
  EXPECT_EQ(events[1].sample_result().sample_index(), 0);
  EXPECT_GT(events[1].sample_result().resume_handle().size(), 0u);
  EXPECT_EQ(events[2].token_chunk().token_ids(0), 7u);
  EXPECT_EQ(events[3].sample_result().sample_index(), 1);
  EXPECT_TRUE(events[3].sample_result().resume_handle().empty());
  EXPECT_EQ(events[4].sample_result().sample_index(), 2);
  EXPECT_GT(events[4].sample_result().resume_handle().size(), 100'000u);
  EXPECT_TRUE(events[5].has_group_done());
}

// A pause may cut short thousands of long samples at once; their handles must not be made while everybody waits for the engine's lock. Told by the
// processor's time of the thread that delivers, which is the engine's: a sample that ends by itself is made into a reply there.
TEST_F(ServerTest, HandlesAreNotMadeOnTheEnginesThread) {
  constexpr size_t kTokens = 2'000'000;
  const auto time_of = [&](const std::string& id, FinishReason finish) {
    const auto client = Connect();
    auto reply = GenerateAsync(client.get(), MakeRequest(id));
    EXPECT_EQ(engine_.WaitForObservers(id).size(), 1u);
    SampleResult sample = MakeSample(0, std::vector<uint32_t>(kTokens, 77), finish);
    const auto now = [] {
      timespec time = {};
      clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
      return absl::DurationFromTimespec(time);
    };
    const absl::Duration begin = now();
    engine_.Sample(id, std::move(sample));
    engine_.Done(id, absl::OkStatus());
    const absl::Duration spent = now() - begin;
    const auto result = reply.get();
    EXPECT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->samples(0).token_ids_size(), static_cast<int>(kTokens));
    EXPECT_EQ(result->samples(0).resume_handle().empty(), finish == FinishReason::kLength);
    return spent;
  };
  const absl::Duration whole = time_of("whole", FinishReason::kLength), cut = time_of("cut", FinishReason::kAborted);
  EXPECT_LT(cut, whole / 4);
}

TEST_F(ServerTest, SlowReaderPausesItselfAndBlocksNobody) {
  const auto client = Connect();
  v1::GenerateRequest request = MakeRequest("slow");
  request.mutable_output()->set_stream_tokens(true);
  std::promise<void> release;
  std::shared_future<void> released = release.get_future().share();
  int64_t received_tokens = 0;
  std::thread reader([&] {
    const absl::Status status = client->GenerateStream(request, [&](const v1::GenerateEvent& event) {
      released.wait();
      received_tokens += event.token_chunk().token_ids_size();
      return true;
    });
    EXPECT_TRUE(status.ok()) << status;
  });
  const auto observer = engine_.WaitForObservers("slow").at(0);
  SampleResult partial = MakeSample(0, {}, FinishReason::kNone);
  constexpr int32_t kChunk = 1000;
  int64_t sent_tokens = 0;
  // The sockets' and HTTP/2's own buffers fill first; then the reader's buffer does, well before 64 MB.
  // On a busy machine it is full for a moment before that, until gRPC's threads come round.
  const auto has_room = [&] {
    for (int i = 0; i < 100 && !observer->HasRoom(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    return observer->HasRoom();
  };
  while (has_room() && sent_tokens < 16'000'000) {
    partial.token_ids.assign(kChunk, 99);
    observer->OnTokens(partial, 0);
    sent_tokens += kChunk;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  EXPECT_FALSE(observer->HasRoom());
  EXPECT_LT(sent_tokens, 16'000'000);
  const int wakes_before = engine_.num_wakes();

  // Another client is served meanwhile.
  const auto other = Connect();
  auto reply = GenerateAsync(other.get(), MakeRequest("quick"));
  ASSERT_EQ(engine_.WaitForObservers("quick").size(), 1u);
  engine_.Sample("quick", MakeSample(0, {1}));
  engine_.Done("quick", absl::OkStatus());
  EXPECT_TRUE(reply.get().ok());
  EXPECT_FALSE(observer->HasRoom());

  release.set_value();
  EXPECT_TRUE(FakeEngine::WaitUntil([&] { return observer->HasRoom(); }));
  EXPECT_TRUE(FakeEngine::WaitUntil([&] { return engine_.num_wakes() > wakes_before; }));
  engine_.Sample("slow", MakeSample(0, {1}));
  engine_.Done("slow", absl::OkStatus());
  reader.join();
  EXPECT_EQ(received_tokens, sent_tokens);
}

TEST_F(ServerTest, RepeatAttachesAndAnotherBodyIsRefused) {
  const auto client = Connect();
  auto first = GenerateAsync(client.get(), MakeRequest("r", 2));
  ASSERT_EQ(engine_.WaitForObservers("r", 1).size(), 1u);
  engine_.Sample("r", MakeSample(0, {1}));
  auto second = GenerateAsync(client.get(), MakeRequest("r", 2));
  ASSERT_EQ(engine_.WaitForObservers("r", 2).size(), 2u);
  const auto refused = client->Generate(MakeRequest("r", 1));
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(GetErrorDetails(refused.status()).reason, "REQUEST_ID_REUSED");
  engine_.Sample("r", MakeSample(1, {2}));
  engine_.Done("r", absl::OkStatus());
  const auto a = first.get();
  const auto b = second.get();
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_EQ(a->samples_size(), 2);
  EXPECT_EQ(a->SerializeAsString(), b->SerializeAsString());
  const auto kept = client->Generate(MakeRequest("r", 2));  // after the end: the kept result
  ASSERT_TRUE(kept.ok());
  EXPECT_EQ(kept->samples_size(), 2);
}

TEST_F(ServerTest, FullQueueSaysWhenToRetry) {
  engine_.SetSubmitStatus(absl::ResourceExhaustedError("1024 requests wait already"));
  const auto client = Connect();
  const auto result = client->Generate(MakeRequest("r"));
  EXPECT_EQ(result.status().code(), absl::StatusCode::kResourceExhausted);
  const ErrorDetails details = GetErrorDetails(result.status());
  EXPECT_EQ(details.reason, "CAPACITY");
  ASSERT_TRUE(details.retry_after.has_value());
  EXPECT_GT(*details.retry_after, absl::ZeroDuration());
  EXPECT_EQ(result.status().message(), "1024 requests wait already");
  const absl::Status streamed = client->GenerateStream(MakeRequest("r"), [](const v1::GenerateEvent&) { return true; });
  EXPECT_EQ(streamed.code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(ServerTest, BadFieldsAreNamed) {
  const auto client = Connect();
  v1::GenerateRequest request = MakeRequest("r");
  request.mutable_sampling()->set_top_p(1.5f);
  const auto result = client->Generate(request);
  EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument);
  const ErrorDetails details = GetErrorDetails(result.status());
  EXPECT_EQ(details.reason, "INVALID_FIELD");
  EXPECT_EQ(details.metadata.at("field"), "sampling.top_p");
  EXPECT_EQ(details.metadata.at("value"), "1.5");
  EXPECT_EQ(details.metadata.at("limit"), "in (0, 1]");
  v1::GenerateRequest streaming = MakeRequest("s");
  streaming.mutable_output()->set_stream_tokens(true);
  EXPECT_EQ(GetErrorDetails(client->Generate(streaming).status()).metadata.at("field"), "output.stream_tokens");
}

TEST_F(ServerTest, UnknownFieldsAndMalformedBytes) {
  const auto client = Connect();
  v1::GenerateRequest request = MakeRequest("r");
  request.GetReflection()->MutableUnknownFields(&request)->AddVarint(1000, 1);
  EXPECT_EQ(GetErrorDetails(client->Generate(request).status()).reason, "UNKNOWN_FIELD");
  for (const char* method : {"Rollout/Generate", "Rollout/GenerateStream", "Rollout/Score", "Rollout/Abort", "Info/GetServerInfo", "Info/Tokenize"}) {
    const grpc::Status status = CallRaw(server_->rollout_address(), absl::StrCat("/bebop.v1.", method), "\xFF\xFF\xFF");
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << method << ": " << status.error_message();
    rpc::Status details;
    EXPECT_TRUE(details.ParseFromString(status.error_details()));
    EXPECT_EQ(details.code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_EQ(details.details_size(), 1);
  }
  // Text that is not UTF-8: request_id is field 1.
  EXPECT_EQ(CallRaw(server_->rollout_address(), "/bebop.v1.Rollout/Generate", std::string("\x0A\x01\xFF", 3)).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(ServerTest, EngineFailureFailsWhatRunsAndFlipsHealth) {
  const auto client = Connect();
  for (const char* service : {"", "bebop.v1.Rollout", "bebop.v1.Info"}) EXPECT_EQ(*client->Health(service), "SERVING") << service;
  EXPECT_EQ(client->Health("no.such.Service").status().code(), absl::StatusCode::kNotFound);
  auto reply = GenerateAsync(client.get(), MakeRequest("r", 2));
  ASSERT_EQ(engine_.WaitForObservers("r").size(), 1u);
  engine_.Sample("r", MakeSample(0, {1}));
  engine_.Sample("r", MakeSample(1, {1}, FinishReason::kFailed));
  engine_.SetHealth(absl::InternalError("device lost"));
  engine_.Done("r", absl::InternalError("device lost"));
  const auto result = reply.get();
  EXPECT_EQ(result.status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(result.status().message(), "device lost");
  EXPECT_EQ(GetErrorDetails(result.status()).reason, "ENGINE_FAILED");
  const auto refused = client->Generate(MakeRequest("next"));
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(absl::StrContains(std::string(refused.status().message()), "device lost"));
  for (const char* service : {"", "bebop.v1.Rollout", "bebop.v1.Info"}) {
    EXPECT_TRUE(FakeEngine::WaitUntil([&] { return *client->Health(service) == "NOT_SERVING"; })) << service;
  }
  EXPECT_FALSE(client->GetLoads()->serving());
}

TEST_F(ServerTest, TimeBudgetIsDataWhenAllSamplesHaveIt) {
  const auto client = Connect();
  auto reply = GenerateAsync(client.get(), MakeRequest("r", 1));
  ASSERT_EQ(engine_.WaitForObservers("r").size(), 1u);
  engine_.Sample("r", MakeSample(0, {1}, FinishReason::kDeadline));
  engine_.Done("r", absl::DeadlineExceededError("an hour"));
  const auto result = reply.get();
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->samples(0).finish().reason(), v1::Finish::TIME_BUDGET);
  auto second = GenerateAsync(client.get(), MakeRequest("s", 2));
  ASSERT_EQ(engine_.WaitForObservers("s").size(), 1u);
  engine_.Sample("s", MakeSample(0, {1}, FinishReason::kDeadline));
  engine_.Done("s", absl::DeadlineExceededError("an hour"));
  EXPECT_EQ(second.get().status().code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(ServerTest, DrainRefusesNewWorkAndDeliversTheOld) {
  const auto client = Connect();
  auto reply = GenerateAsync(client.get(), MakeRequest("r"));
  ASSERT_EQ(engine_.WaitForObservers("r").size(), 1u);
  std::thread drain([&] { server_->Drain(absl::Seconds(30)); });
  ASSERT_TRUE(FakeEngine::WaitUntil([&] { return engine_.draining(); }));
  EXPECT_EQ(*client->Health("bebop.v1.Rollout"), "NOT_SERVING");
  const auto refused = client->Generate(MakeRequest("new"));
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(GetErrorDetails(refused.status()).reason, "DRAINING");
  EXPECT_TRUE(GetErrorDetails(refused.status()).retry_after.has_value());
  EXPECT_FALSE(IsConnectionError(refused.status()));
  EXPECT_TRUE(client->GetLoads()->draining());
  engine_.Sample("r", MakeSample(0, {1, 2}, FinishReason::kDrained));
  engine_.Done("r", absl::OkStatus());
  const auto result = reply.get();
  drain.join();
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->samples(0).finish().reason(), v1::Finish::DRAINED);
  EXPECT_TRUE(IsConnectionError(Connect()->GetLoads().status()));  // the listeners are closed
}

TEST_F(ServerTest, ScoreCollectsSequencesInOrder) {
  const auto client = Connect();
  v1::ScoreRequest request;
  for (uint32_t i = 0; i < 3; ++i) {
    request.add_sequences()->add_token_ids(i);
    request.mutable_sequences(static_cast<int>(i))->add_token_ids(1);
  }
  auto reply = std::async(std::launch::async, [&] { return client->Score(request); });
  ASSERT_TRUE(engine_.AnswerScores(3, [](const ScoreRequest& score) {
    ScoreResult result;
    result.logprobs = {-static_cast<float>(score.token_ids[0])};
    return std::make_pair(absl::OkStatus(), result);
  }));
  const auto result = reply.get();
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_EQ(result->scores_size(), 3);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(result->scores(i).logprobs(0), -static_cast<float>(i));
}

TEST_F(ServerTest, ScoreIsAllOrNothing) {
  const auto client = Connect();
  v1::ScoreRequest request;
  for (int i = 0; i < 3; ++i) request.add_sequences()->add_token_ids(1);
  engine_.SetScoresLeft(2);
  const auto refused = client->Score(request);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(engine_.num_cancelled_scores(), 2);
  engine_.SetScoresLeft(100);
  auto reply = std::async(std::launch::async, [&] { return client->Score(request); });
  int count = 0;
  ASSERT_TRUE(engine_.AnswerScores(3, [&count](const ScoreRequest&) {
    return std::make_pair(++count == 2 ? absl::InternalError("broken") : absl::OkStatus(), ScoreResult());
  }));
  EXPECT_EQ(reply.get().status().message(), "broken");
}

TEST_F(ServerTest, ScoreDeadlineCancelsItsSequences) {
  const auto client = Connect(absl::Milliseconds(300));
  v1::ScoreRequest request;
  for (int i = 0; i < 2; ++i) request.add_sequences()->add_token_ids(1);
  EXPECT_EQ(client->Score(request).status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(FakeEngine::WaitUntil([&] { return engine_.num_cancelled_scores() == 2; }));
}

TEST_F(ServerTest, AbortTellsWhichEnded) {
  const auto client = Connect();
  auto reply = GenerateAsync(client.get(), MakeRequest("running"));
  ASSERT_EQ(engine_.WaitForObservers("running").size(), 1u);
  v1::AbortRequest abort;
  abort.add_request_ids("running");
  abort.add_request_ids("unknown");
  const auto result = client->Abort(abort);
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_EQ(result->aborted_request_ids_size(), 1);
  EXPECT_EQ(result->aborted_request_ids(0), "running");
  engine_.Sample("running", MakeSample(0, {1}, FinishReason::kAborted));
  engine_.Done("running", absl::OkStatus());
  EXPECT_EQ(reply.get()->samples(0).finish().reason(), v1::Finish::ABORTED);
}

TEST_F(ServerTest, InfoOnBothPortsRolloutOnOne) {
  ListenOptions options;
  options.served_model_name = "name";
  options.default_mode = SpeculationMode::kCoupled;
  options.default_num_draft_tokens = 9;
  Start(options);
  const auto client = Connect();
  const auto info = client->GetServerInfo();
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->api_version(), "bebop.v1");
  EXPECT_EQ(info->served_model_name(), "name");
  EXPECT_EQ(info->default_speculation().mode(), v1::SpeculationParams::COUPLED);
  EXPECT_EQ(info->default_speculation().num_draft_tokens(), 5);  // what the engine can do
  EXPECT_EQ(info->weight_step(), 7);
  EXPECT_FALSE(info->synthetic_acceptance_allowed());
  const auto model = client->GetModelInfo();
  ASSERT_TRUE(model.ok());
  EXPECT_EQ(model->vocab_size(), 100);
  EXPECT_EQ(model->num_layers(), 2);
  EXPECT_EQ(model->num_full_attention_layers(), 1);
  EXPECT_FALSE(model->has_tokenizer());
  const auto loads = client->GetLoads();
  ASSERT_TRUE(loads.ok());
  EXPECT_EQ(loads->submitted(), 3);
  EXPECT_TRUE(loads->serving());
  EXPECT_EQ(loads->seconds_since_heartbeat(), 0.25);
  v1::TokenizeRequest tokenize;
  EXPECT_EQ(GetErrorDetails(client->Tokenize(tokenize).status()).reason, "NO_TOKENIZER");
  EXPECT_EQ(client->Tokenize(tokenize).status().code(), absl::StatusCode::kFailedPrecondition);

  Client admin({.server = server_->admin_address(), .timeout = absl::Seconds(10)});
  EXPECT_TRUE(admin.GetServerInfo().ok());
  EXPECT_EQ(*admin.Health(""), "SERVING");
  EXPECT_EQ(admin.Generate(MakeRequest("r")).status().code(), absl::StatusCode::kUnimplemented);
}

TEST_F(ServerTest, ReflectionOnLoopbackOnly) {
  const std::string method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";
  const std::string list_services("\x3A\x01*", 3);  // field 7
  std::string reply;
  EXPECT_TRUE(CallRaw(server_->rollout_address(), method, list_services, &reply).ok());
  EXPECT_TRUE(absl::StrContains(reply, "bebop.v1.Rollout"));
  EXPECT_TRUE(absl::StrContains(reply, "grpc.health.v1.Health"));
  ListenOptions elsewhere;
  elsewhere.is_loopback = false;
  Start(elsewhere);
  reply.clear();
  EXPECT_FALSE(CallRaw(server_->rollout_address(), method, list_services, &reply).ok());
  EXPECT_TRUE(reply.empty());
  EXPECT_TRUE(Connect()->GetServerInfo().ok());
}

TEST_F(ServerTest, SyntheticAcceptanceFollowsTheWeights) {
  v1::GenerateRequest request = MakeRequest("r");
  request.mutable_speculation()->set_mode(v1::SpeculationParams::REJECTION);
  request.mutable_speculation()->set_synthetic_acceptance(0.5f);
  EXPECT_EQ(GetErrorDetails(Connect()->Generate(request).status()).reason, "SYNTHETIC_ACCEPTANCE_DISABLED");
  engine_.mutable_info().dummy_weights = true;
  Start({});
  EXPECT_TRUE(Connect()->GetServerInfo()->synthetic_acceptance_allowed());
  const auto client = Connect(absl::Milliseconds(300));
  EXPECT_EQ(client->Generate(request).status().code(), absl::StatusCode::kDeadlineExceeded);  // accepted
}

TEST_F(ServerTest, TooLargeMessagesAreRefusedByTheTransport) {
  Client admin({.server = server_->admin_address(), .timeout = absl::Seconds(20)});
  v1::TokenizeRequest request;
  request.set_text(std::string(limits::kAdminReceiveBytes + 1024, 'x'));
  EXPECT_EQ(admin.Tokenize(request).status().code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(ServerTest, DraftsAreTheServersWhenARequestSetsAModeOnly) {
  ListenOptions options;
  options.default_mode = SpeculationMode::kOff;
  options.default_num_draft_tokens = 3;
  Start(options);
  const auto client = Connect();
  v1::GenerateRequest request = MakeRequest("drafts");
  request.mutable_speculation()->set_mode(v1::SpeculationParams::REJECTION);
  auto drafts = GenerateAsync(client.get(), request);
  auto plain = GenerateAsync(client.get(), MakeRequest("plain"));
  for (const char* id : {"drafts", "plain"}) ASSERT_EQ(engine_.WaitForObservers(id).size(), 1u);
  EXPECT_EQ(engine_.RequestOf("drafts").speculation.mode, SpeculationMode::kRejection);
  EXPECT_EQ(engine_.RequestOf("drafts").speculation.num_draft_tokens, 3);
  EXPECT_EQ(engine_.RequestOf("plain").speculation.mode, SpeculationMode::kOff);
  EXPECT_EQ(engine_.RequestOf("plain").speculation.num_draft_tokens, 0);
  for (const char* id : {"drafts", "plain"}) engine_.Done(id, absl::OkStatus());
  EXPECT_TRUE(drafts.get().ok());
  EXPECT_TRUE(plain.get().ok());
}

TEST_F(ServerTest, UnknownHostIsAnError) {
  ListenOptions options;
  options.host = "nonsense.invalid";
  const auto server = Server::Start(&engine_, options);
  EXPECT_EQ(server.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(absl::StrContains(std::string(server.status().message()), "--host/--port: cannot listen on nonsense.invalid")) << server.status();
}

TEST_F(ServerTest, TakenPortIsAnError) {
  const std::string address = server_->rollout_address();
  const int port = std::stoi(address.substr(address.rfind(':') + 1));
  ListenOptions options;
  options.port = port;
  const auto second = Server::Start(&engine_, options);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(second.status().message(), absl::StrCat("--host/--port: cannot listen on ", address, ": Address already in use"));
}

}  // namespace
}  // namespace bebop
