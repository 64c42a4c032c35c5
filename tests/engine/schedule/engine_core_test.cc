// SPDX-License-Identifier: Apache-2.0
#include "engine/schedule/engine_core.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/engine/schedule/engine_core_fixture.h"
#include "tests/support/allocation_counter.h"

namespace bebop {
namespace {

TEST_F(EngineCoreTest, GroupComputesItsPromptOnceAndForksWithoutCopyingState) {
  Start();
  const GenerateRequest request = Request("a", 11, 6, 4, 2);
  const auto recorder = Submit(request);
  RunToRest();
  ExpectReference(request, *recorder);
  EXPECT_EQ(executor_->prompt_rows, 10 + 4) << "the prompt but its last token once, and that one for each sample";
  EXPECT_EQ(executor_->forked, 4);
  EXPECT_EQ(executor_->num_copies, 4);
  std::vector<int32_t> cached;
  for (const SampleResult& sample : recorder->samples) cached.push_back(sample.cached_tokens);
  std::sort(cached.begin(), cached.end());
  EXPECT_EQ(cached, (std::vector<int32_t>{0, 10, 10, 10}));
  EXPECT_EQ(core_->Loads().used_pages, 0);
  EXPECT_EQ(core_->Loads().prompt_tokens, 11);
}

TEST_F(EngineCoreTest, SingleSampleAndOneTokenPromptDoNotFork) {
  Start();
  const GenerateRequest one = Request("a", 9, 3), tiny = Request("b", 1, 3, 3);
  const auto a = Submit(one), b = Submit(tiny);
  EXPECT_TRUE(Step());
  EXPECT_EQ(executor_->rows.back(), 9 + 3) << "the first pass samples";
  RunToRest();
  ExpectReference(one, *a);
  ExpectReference(tiny, *b);
  EXPECT_EQ(executor_->forked, 0);
  EXPECT_EQ(executor_->num_copies, 0);
}

TEST_F(EngineCoreTest, GroupWithOneStateSlotTakesThePrefixOver) {
  options_.scheduler.num_state_slots = 1;
  Start();
  const GenerateRequest request = Request("a", 11, 5, 3, 2);
  const auto recorder = Submit(request);
  RunToRest();
  ExpectReference(request, *recorder);
  EXPECT_EQ(executor_->num_copies, 0);
}

TEST_F(EngineCoreTest, PrefillIsChunkedWithinTheBudgetBehindDecodes) {
  options_.scheduler.max_step_tokens = 16;
  Start();
  const GenerateRequest first = Request("a", 4, 30, 1, 3), second = Request("b", 50, 2);
  const auto a = Submit(first);
  Step();
  Step();
  const auto b = Submit(second);
  for (int i = 0; i < 3; ++i) Step();
  for (size_t i = 2; i < executor_->rows.size(); ++i) EXPECT_EQ(executor_->rows[i], 16) << "decode and chunk together fill the step";
  RunToRest();
  for (const int32_t rows : executor_->rows) EXPECT_LE(rows, 16);
  ExpectReference(first, *a);
  ExpectReference(second, *b);
}

TEST_F(EngineCoreTest, PromptsAreCutWhereADeviceMayCutThem) {
  options_.scheduler.prefill_cut_tokens = 8;
  options_.scheduler.max_step_tokens = 21;
  Start();
  const auto first = Submit(Request("a", 5, 30));  // decodes beside the other: 20 rows are left, or 21
  Step();
  executor_->chunk_ends.clear();
  const auto second = Submit(Request("b", 50, 3, 2));
  RunToRest();
  // [0, 49) is shared; the last prompt token is each sample's own.
  EXPECT_EQ(executor_->chunk_ends, (std::vector<int32_t>{16, 32, 49, 50, 50}));
  ExpectReference(Request("b", 50, 3, 2), *second);
}

TEST_F(EngineCoreTest, WithoutRoomForAWholePieceAPromptWaits) {
  options_.scheduler.prefill_cut_tokens = 8;
  options_.scheduler.max_step_tokens = 20;
  Start();
  const auto first = Submit(Request("a", 30, 2)), second = Submit(Request("b", 25, 2));
  const auto third = Submit(Request("c", 5, 2));
  RunToRest();
  // Beside the end of a's prompt 6 rows are left, of which b takes none.
  EXPECT_EQ(executor_->chunk_ends, (std::vector<int32_t>{16, 30, 16, 25, 5}));
  ExpectReference(Request("a", 30, 2), *first);
  ExpectReference(Request("b", 25, 2), *second);
  ExpectReference(Request("c", 5, 2), *third);
}

// The same cuts whether the score has the steps to itself or the rows that decodes leave, which are fewer than a piece for many steps.
TEST_F(EngineCoreTest, ScoresAreCutWhereADeviceMayCutThem) {
  options_.scheduler.prefill_cut_tokens = 8;
  options_.scheduler.max_step_tokens = 4 * 4 + 8;
  ScoreRequest request;
  request.token_ids.assign(45, 3);
  for (const bool beside_others : {false, true}) {
    Start();
    if (beside_others) {
      for (const char* id : {"a", "b", "c", "d"}) Submit(Request(id, 41, 150, 1, 3));
    }
    Step();
    auto score = std::make_shared<ScoreRecorder>();
    uint64_t handle = 0;
    ASSERT_EQ(core_->SubmitScore(request, score, &handle), absl::OkStatus());
    for (int32_t steps = 0; score->calls == 0 && steps < 100; ++steps) Step();
    ASSERT_EQ(score->calls, 1);
    EXPECT_EQ(score->status, absl::OkStatus());
    EXPECT_EQ(executor_->score_ends.back(), 45);
    executor_->score_ends.pop_back();
    for (const int32_t end : executor_->score_ends) EXPECT_EQ(end % 8, 0);
  }
}

TEST_F(EngineCoreTest, ScoresTakeNoMoreRowsOfAStepThanTheyMay) {
  options_.scheduler.max_score_step_tokens = 10;
  Start();
  for (int i = 0; i < 2; ++i) {
    ScoreRequest request;
    request.token_ids.assign(14, 3);
    uint64_t handle = 0;
    ASSERT_EQ(core_->SubmitScore(request, std::make_shared<ScoreRecorder>(), &handle), absl::OkStatus());
  }
  EXPECT_EQ(RunToRest(), 3);
  EXPECT_EQ(executor_->score_ends, (std::vector<int32_t>{10, 14, 6, 14}));
}

TEST_F(EngineCoreTest, LowerPriorityValueRunsFirstAndFifoWithin) {
  options_.scheduler.max_num_seqs = 1;
  Start();
  std::vector<std::pair<std::string, int32_t>> order = {{"a", 1}, {"b", 1}, {"c", 0}, {"d", 0}};
  std::vector<std::shared_ptr<Recorder>> recorders;
  for (const auto& [id, priority] : order) {
    GenerateRequest request = Request(id, 3, 2);
    request.priority = priority;
    recorders.push_back(Submit(request));
  }
  std::string ended;
  while (!core_->Idle()) {
    Step();
    for (size_t i = 0; i < order.size(); ++i) {
      if (recorders[i]->done && ended.find(order[i].first) == std::string::npos) ended += order[i].first;
    }
  }
  EXPECT_EQ(ended, "cdab");
}

TEST_F(EngineCoreTest, HigherPriorityTakesTheSlotOfALowerOne) {
  options_.scheduler.max_num_seqs = 1;
  Start();
  GenerateRequest slow = Request("a", 3, 40, 1, 2), urgent = Request("b", 3, 3);
  slow.priority = 5;
  const auto a = Submit(slow);
  for (int i = 0; i < 5; ++i) Step();
  const auto b = Submit(urgent);
  for (int i = 0; i < 4 && !b->done; ++i) Step();
  EXPECT_TRUE(b->done);
  EXPECT_FALSE(a->done);
  RunToRest();
  ExpectReference(slow, *a);
  EXPECT_EQ(a->samples[0].preemptions, 1);
  EXPECT_GT(a->samples[0].recomputed_tokens, 0);
  EXPECT_EQ(core_->Loads().preemptions, 1);
}

TEST_F(EngineCoreTest, TheYoungestIsPreemptedAndNoTokenChanges) {
  options_.scheduler.num_pages = 16;  // 64 tokens: two of 20 + 30 + 3 do not fit together
  Start();
  const GenerateRequest first = Request("a", 20, 30, 1, 3), second = Request("b", 20, 30, 1, 3);
  const auto a = Submit(first), b = Submit(second);
  RunToRest();
  ExpectReference(first, *a);
  ExpectReference(second, *b);
  EXPECT_EQ(a->samples[0].preemptions, 0);
  EXPECT_GE(b->samples[0].preemptions, 1);
}

TEST_F(EngineCoreTest, TheLastInOrderGivesWayToTheFirst) {
  // Prompts of different length, so that the first one also runs out of pages when the others have room to grow.
  int32_t preempted = 0;
  for (int32_t prompt = 5; prompt <= 8; ++prompt) {
    for (int32_t pages = 9; pages <= 20; ++pages) {
      options_.scheduler.num_pages = pages;
      Start();
      std::vector<GenerateRequest> requests = {Request("a", prompt, 24), Request("b", 6, 24), Request("c", 7, 24)};
      std::vector<std::shared_ptr<Recorder>> recorders;
      for (const GenerateRequest& request : requests) recorders.push_back(Submit(request));
      RunToRest();
      for (size_t i = 0; i < requests.size(); ++i) ExpectReference(requests[i], *recorders[i]);
      EXPECT_EQ(recorders[0]->samples[0].preemptions, 0);
      EXPECT_LE(recorders[1]->samples[0].preemptions, recorders[2]->samples[0].preemptions) << prompt << " " << pages;
      preempted += recorders[2]->samples[0].preemptions;
    }
  }
  EXPECT_GT(preempted, 0);
}

TEST_F(EngineCoreTest, RefusesWhatCanNeverFitAndSaysWhy) {
  options_.scheduler.num_pages = 4;
  Start();
  auto recorder = std::make_shared<Recorder>();
  EXPECT_EQ(core_->Submit(Request("a", 8, 5, 1, 3), recorder), absl::OkStatus()) << "8 + 5 + 3 = 4 pages";
  const absl::Status never = core_->Submit(Request("b", 8, 6, 1, 3), recorder);
  EXPECT_TRUE(absl::IsResourceExhausted(never));
  EXPECT_TRUE(EngineCore::CanNeverFit(never));
  EXPECT_NE(never.message().find("5 KV pages"), absl::string_view::npos) << never;
  EXPECT_NE(never.message().find("has 4"), absl::string_view::npos) << never;
  const absl::Status longer = core_->Submit(Request("c", 100, 101), recorder);
  EXPECT_TRUE(absl::IsInvalidArgument(longer));
  EXPECT_NE(longer.message().find("max_model_len is 200"), absl::string_view::npos) << longer;
  EXPECT_EQ(core_->Loads().refused, 2);
  EXPECT_FALSE(recorder->done);
}

TEST_F(EngineCoreTest, RefusesBadFieldsByName) {
  Start();
  const auto refused = [&](absl::StatusCode code, const char* word, const auto& change) {
    GenerateRequest request = Request("a", 4, 4);
    change(&request);
    const absl::Status status = core_->Submit(request, std::make_shared<Recorder>());
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_NE(status.message().find(word), absl::string_view::npos) << status;
  };
  const auto bad = absl::StatusCode::kInvalidArgument;
  refused(bad, "request_id", [](auto* r) { r->request_id.clear(); });
  refused(bad, "prompt is empty", [](auto* r) { r->prompt.clear(); });
  refused(bad, "prompt[2] is 48", [](auto* r) { r->prompt[2] = 48; });
  refused(bad, "stop_token_ids[0]", [](auto* r) { r->stopping.stop_token_ids = {99}; });
  refused(bad, "stop_token_ids has 1025", [](auto* r) { r->stopping.stop_token_ids.assign(1025, 3); });
  refused(bad, "num_samples is 0", [](auto* r) { r->num_samples = 0; });
  refused(bad, "max_new_tokens is 0", [](auto* r) { r->stopping.max_new_tokens = 0; });
  refused(bad, "num_draft_tokens is 9", [](auto* r) { r->speculation.num_draft_tokens = 9; });
  refused(bad, "stop string", [](auto* r) { r->stopping.stop_strings = {""}; });
  options_.token_bytes = nullptr;
  Start();
  refused(absl::StatusCode::kFailedPrecondition, "tokenizer", [](auto* r) { r->stopping.stop_strings = {"x"}; });
}

TEST_F(EngineCoreTest, FullQueueIsRefusedButNotForEver) {
  options_.scheduler.max_queued_requests = 2;
  options_.scheduler.max_num_seqs = 1;
  Start();
  Submit(Request("a", 4, 8));
  Step();  // admitted: no longer waiting
  Submit(Request("b", 4, 4));
  Submit(Request("c", 4, 4));
  const absl::Status full = core_->Submit(Request("d", 4, 4), std::make_shared<Recorder>());
  EXPECT_TRUE(absl::IsResourceExhausted(full));
  EXPECT_FALSE(EngineCore::CanNeverFit(full));
  RunToRest();
  Submit(Request("d", 4, 4));
}

TEST_F(EngineCoreTest, DeadlineEndsWithPartialTokensWithinOneStep) {
  Start();
  GenerateRequest request = Request("a", 4, 100, 2);
  request.deadline = clock_.Now() + absl::Seconds(1);
  const auto recorder = Submit(request);
  for (int i = 0; i < 6; ++i) Step();
  EXPECT_EQ(core_->NextDeadline(), request.deadline);
  clock_.Advance(absl::Seconds(1));
  Step();
  EXPECT_TRUE(recorder->done);
  EXPECT_TRUE(absl::IsDeadlineExceeded(recorder->status));
  ASSERT_EQ(recorder->samples.size(), 2u);
  for (const SampleResult& sample : recorder->samples) {
    EXPECT_EQ(sample.finish, FinishReason::kDeadline);
    EXPECT_FALSE(sample.token_ids.empty());
    EXPECT_EQ(sample.total_time, absl::Seconds(1));
  }
  EXPECT_EQ(core_->Loads().used_pages, 0);
  EXPECT_EQ(core_->Loads().failed, 1);
  // Nothing is kept of it: the id runs anew.
  request.deadline = absl::InfiniteFuture();
  const auto again = Submit(request);
  RunToRest();
  ExpectReference(request, *again);
}

TEST_F(EngineCoreTest, DetachingTheLastObserverFreesEverythingAtOnce) {
  Start();
  const GenerateRequest request = Request("a", 20, 50, 3, 2);
  const auto first = Submit(request), second = Submit(request);
  for (int i = 0; i < 4; ++i) Step();
  EXPECT_GT(core_->Loads().used_pages, 0);
  core_->Detach("a", first.get());
  EXPECT_GT(core_->Loads().used_pages, 0);
  core_->Detach("a", second.get());
  EXPECT_EQ(core_->Loads().used_pages, 0);
  EXPECT_EQ(core_->Loads().used_state_slots, 0);
  EXPECT_EQ(core_->Loads().cancelled, 1);
  EXPECT_EQ(core_->Audit(), absl::OkStatus());
  EXPECT_FALSE(Step());
  EXPECT_FALSE(first->done || second->done);
}

TEST_F(EngineCoreTest, AbortGivesTheTokensSoFarToAllAndKeepsThem) {
  Start();
  const GenerateRequest request = Request("a", 5, 50);
  const auto first = Submit(request);
  for (int i = 0; i < 3; ++i) Step();
  const auto second = Submit(request);
  EXPECT_TRUE(core_->Abort("a"));
  EXPECT_FALSE(core_->Abort("a"));
  EXPECT_FALSE(core_->Abort("unknown"));
  const auto third = Submit(request);
  for (const auto& recorder : {first, second, third}) {
    ASSERT_EQ(recorder->samples.size(), 1u);
    EXPECT_EQ(recorder->samples[0].finish, FinishReason::kAborted);
    EXPECT_EQ(recorder->samples[0].token_ids.size(), 3u);
    EXPECT_EQ(recorder->status, absl::OkStatus());
  }
  EXPECT_EQ(core_->Loads().submitted, 1);
}

// Whoever counts hears of each sample once, however many callers there are, and of those that nobody waits for any more.
TEST_F(EngineCoreTest, EverySampleEndIsHeardOnce) {
  std::vector<std::pair<size_t, FinishReason>> heard;
  options_.on_sample_end = [&heard](const SampleResult& sample) { heard.emplace_back(sample.token_ids.size(), sample.finish); };
  Start();
  const GenerateRequest twice = Request("a", 5, 4, 2);
  const auto first = Submit(twice), second = Submit(twice);
  GenerateRequest left = Request("b", 5, 3);
  left.detach = true;
  const auto leaves = Submit(left);
  Step();
  core_->Detach("b", leaves.get());
  RunToRest();
  EXPECT_EQ(Submit(twice)->samples.size(), 2u);  // what was kept
  EXPECT_EQ(first->samples.size() + second->samples.size() + leaves->samples.size(), 4u);
  ASSERT_EQ(heard.size(), 3u);
  std::sort(heard.begin(), heard.end());
  EXPECT_EQ(heard[0], std::pair(size_t{3}, FinishReason::kLength));
  EXPECT_EQ(heard[2], std::pair(size_t{4}, FinishReason::kLength));
  const auto aborted = Submit(Request("c", 5, 50));
  for (int i = 0; i < 3; ++i) Step();
  core_->Abort("c");
  EXPECT_EQ(heard.back(), std::pair(size_t{3}, FinishReason::kAborted));
  EXPECT_EQ(heard.size(), 4u);
}

TEST_F(EngineCoreTest, AttachCatchesUpWithStreamedTokens) {
  Start();
  GenerateRequest request = Request("a", 5, 20);
  request.stream_tokens = true;
  const auto first = Submit(request);
  for (int i = 0; i < 4; ++i) Step();
  const auto second = Submit(request);
  EXPECT_TRUE(second->admitted);
  EXPECT_EQ(second->streamed, 4);
  request.body_hash = 2;
  EXPECT_TRUE(absl::IsAlreadyExists(core_->Submit(request, second)));
  RunToRest();
  ExpectReference(request, *first);
  ExpectReference(request, *second);
  EXPECT_EQ(second->streamed, 20);
}

TEST_F(EngineCoreTest, AFullReaderPausesAloneAndIsTakenFromFirst) {
  options_.scheduler.num_pages = 16;
  Start();
  const GenerateRequest first = Request("a", 20, 20), second = Request("b", 20, 40);
  const auto a = Submit(first);
  Step();
  a->room = false;
  const auto b = Submit(second);
  RunToRestOf(b.get());
  ExpectReference(second, *b);
  EXPECT_FALSE(a->done);
  EXPECT_EQ(b->samples[0].preemptions, 0) << "the paused one gave way though it came first";
  EXPECT_FALSE(Step()) << "nothing can be done while the reader is full";
  a->room = true;
  RunToRest();
  ExpectReference(first, *a);
  EXPECT_EQ(a->samples[0].preemptions, 1);
}

TEST_F(EngineCoreTest, DrainRefusesNewWorkThenEndsTheRest) {
  Start();
  const GenerateRequest brief = Request("a", 4, 3), endless = Request("b", 4, 150);
  const auto a = Submit(brief), b = Submit(endless);
  auto score = std::make_shared<ScoreRecorder>();
  Step();
  core_->StartDrain(clock_.Now() + absl::Seconds(2));
  EXPECT_TRUE(absl::IsUnavailable(core_->Submit(Request("c", 4, 4), a)));
  uint64_t handle = 0;
  EXPECT_TRUE(absl::IsUnavailable(core_->SubmitScore(Score({1}), score, &handle)));
  for (int i = 0; i < 5; ++i) Step();
  ExpectReference(brief, *a);
  EXPECT_EQ(core_->NextDeadline(), clock_.Now() + absl::Seconds(2));
  clock_.Advance(absl::Seconds(2));
  Step();
  EXPECT_TRUE(core_->Idle());
  ASSERT_EQ(b->samples.size(), 1u);
  EXPECT_EQ(b->samples[0].finish, FinishReason::kDrained);
  EXPECT_FALSE(b->samples[0].token_ids.empty());
  EXPECT_EQ(b->status, absl::OkStatus());
}

TEST_F(EngineCoreTest, ExecutorFailureEndsEverythingWithItsStatus) {
  Start();
  const auto a = Submit(Request("a", 4, 30)), b = Submit(Request("b", 4, 30, 3));
  auto score = std::make_shared<ScoreRecorder>();
  uint64_t handle = 0;
  EXPECT_EQ(core_->SubmitScore(Score({1, 2, 3}), score, &handle), absl::OkStatus());
  Step();
  const auto c = Submit(Request("c", 4, 30));
  executor_->fake.FailNext(absl::DataLossError("device gone"));
  EXPECT_EQ(core_->Step().status(), absl::DataLossError("device gone"));
  for (const auto& recorder : {a, b, c}) {
    EXPECT_TRUE(recorder->done);
    EXPECT_EQ(recorder->status, absl::DataLossError("device gone"));
    for (const SampleResult& sample : recorder->samples) EXPECT_EQ(sample.finish, FinishReason::kFailed);
  }
  EXPECT_EQ(b->samples.size(), 3u);
  EXPECT_EQ(core_->health(), absl::DataLossError("device gone"));
  EXPECT_TRUE(absl::IsInternal(core_->Submit(Request("d", 4, 4), a)));
  EXPECT_EQ(core_->Loads().used_pages, 0);
  EXPECT_EQ(core_->Audit(), absl::OkStatus());
}

TEST_F(EngineCoreTest, ScoresRunInChunksThenDrafts) {
  options_.scheduler.max_step_tokens = 16;
  Start();
  ScoreRequest request;
  for (uint32_t i = 0; i < 40; ++i) request.token_ids.push_back(i % 30);
  request.draft_depth = 3;
  auto score = std::make_shared<ScoreRecorder>();
  uint64_t handle = 0;
  ASSERT_EQ(core_->SubmitScore(request, score, &handle), absl::OkStatus());
  ASSERT_TRUE(core_->Commit(nullptr, {12, 12, ""}, InFlight::kKeep).ok());
  const int32_t steps = RunToRest();
  EXPECT_EQ(steps, 3 + 8) << "40 rows of 16 a step, then 39 bases of 16 / 3";
  EXPECT_EQ(score->calls, 1);
  EXPECT_EQ(score->status, absl::OkStatus());
  EXPECT_EQ(score->result.logprobs, FakeExecutor::ScoreReference(request));
  EXPECT_EQ(score->result.weight_step, 12);
}

TEST_F(EngineCoreTest, ScoresAreNotStarvedByDecodes) {
  options_.scheduler.max_step_tokens = 16;
  Start();
  for (const char* id : {"a", "b", "c", "d"}) Submit(Request(id, 4, 150, 1, 3));  // 4 x 4 rows fill every step
  for (int i = 0; i < 4; ++i) Step();
  ScoreRequest request;
  request.token_ids.assign(12, 3);
  auto score = std::make_shared<ScoreRecorder>();
  uint64_t handle = 0;
  ASSERT_EQ(core_->SubmitScore(request, score, &handle), absl::OkStatus());
  int32_t steps = 0;
  while (score->calls == 0 && steps < 60) {
    Step();
    ++steps;
  }
  EXPECT_EQ(score->calls, 1);
  EXPECT_LT(steps, 30);
}

TEST_F(EngineCoreTest, CancelledScoreIsForgottenByTheExecutorInTheNextStep) {
  options_.scheduler.max_step_tokens = 16;
  Start();
  ScoreRequest request;
  request.token_ids.assign(50, 3);
  auto score = std::make_shared<ScoreRecorder>();
  uint64_t handle = 0;
  ASSERT_EQ(core_->SubmitScore(request, score, &handle), absl::OkStatus());
  Step();
  EXPECT_EQ(executor_->fake.score_rows().count(handle), 1u);
  core_->CancelScore(handle);
  EXPECT_EQ(core_->Loads().used_pages, 0);
  EXPECT_TRUE(Step());
  EXPECT_TRUE(executor_->fake.score_rows().empty());
  EXPECT_EQ(score->calls, 0);
  EXPECT_FALSE(Step());
}

TEST_F(EngineCoreTest, ScoreThatCanNeverFitIsRefused) {
  options_.scheduler.max_score_bytes = 100;
  Start();
  uint64_t handle = 0;
  ScoreRequest request;
  request.token_ids.assign(26, 1);
  const absl::Status status = core_->SubmitScore(request, std::make_shared<ScoreRecorder>(), &handle);
  EXPECT_TRUE(EngineCore::CanNeverFit(status)) << status;
  EXPECT_NE(status.message().find("104 bytes"), absl::string_view::npos) << status;
  request.token_ids.resize(25);
  EXPECT_EQ(core_->SubmitScore(request, std::make_shared<ScoreRecorder>(), &handle), absl::OkStatus());
}

TEST_F(EngineCoreTest, NonFiniteRowEndsItsSampleAlone) {
  Start();
  GenerateRequest bad = Request("a", 4, 100, 1, 2);
  bad.sampling.seed = 7 * 13;
  const GenerateRequest good = Request("b", 4, 30, 1, 2);
  const auto a = Submit(bad), b = Submit(good);
  RunToRest();
  ExpectReference(bad, *a);
  ExpectReference(good, *b);
  EXPECT_EQ(a->samples[0].finish, FinishReason::kNonFinite);
}

TEST_F(EngineCoreTest, TimesComeFromTheClock) {
  options_.scheduler.max_num_seqs = 1;
  Start();
  const auto a = Submit(Request("a", 4, 2)), b = Submit(Request("b", 4, 3));
  while (!core_->Idle()) {
    clock_.Advance(absl::Seconds(1));
    Step();
  }
  const SampleResult& sample = b->samples[0];
  EXPECT_EQ(a->samples[0].total_time, absl::Seconds(2));
  EXPECT_EQ(sample.queue_time, absl::Seconds(3));
  EXPECT_EQ(sample.prefill_time, absl::ZeroDuration());
  EXPECT_EQ(sample.time_to_first_token, absl::Seconds(3));
  EXPECT_EQ(sample.decode_time, absl::Seconds(2));
  EXPECT_EQ(sample.total_time, absl::Seconds(5));
}

TEST_F(EngineCoreTest, ResultsAreKeptForTheirTimeToLive) {
  options_.scheduler.result_ttl = absl::Seconds(10);
  Start();
  const GenerateRequest request = Request("a", 4, 3);
  Submit(request);
  RunToRest();
  clock_.Advance(absl::Seconds(10) - absl::Nanoseconds(1));
  Step();
  EXPECT_TRUE(Submit(request)->done);
  clock_.Advance(absl::Nanoseconds(1));
  Step();
  EXPECT_FALSE(Submit(request)->done);
  EXPECT_EQ(core_->Loads().submitted, 2);
}

// Emits one token a sequence and nothing else, without allocating.
struct PlainExecutor final : Executor {
  absl::Status SetWeights(const ModelWeights*, int64_t) override { return absl::OkStatus(); }
  absl::Status Quiesce() override { return absl::OkStatus(); }
  absl::Status Execute(const StepPlan& plan, StepResult* result) override {
    result->sequences.resize(plan.sequences.size());
    for (size_t i = 0; i < plan.sequences.size(); ++i) {
      const SequencePlan& sequence = plan.sequences[i];
      SequenceOutcome& out = result->sequences[i];
      out = SequenceOutcome();
      out.num_drafts_made = sequence.num_drafts_next;
      if (!sequence.sample) continue;
      out.num_accepted = out.num_reached = sequence.num_drafts;
      out.num_emitted = sequence.num_drafts + 1;
    }
    return absl::OkStatus();
  }
};

TEST_F(EngineCoreTest, SteadyStepAllocatesNothing) {
  options_.scheduler.num_pages = 400;
  options_.scheduler.max_model_len = 2000;
  PlainExecutor executor;
  EngineCore core(options_, &clock_, &executor);
  auto recorder = std::make_shared<Recorder>();
  GenerateRequest request = Request("a", 9, 330, 4, 3);
  request.stream_tokens = true;
  request.output.logprobs = request.output.entropy = request.output.spec_detail = true;
  request.stopping.stop_strings = {"abcabc"};
  ASSERT_EQ(core.Submit(request, recorder), absl::OkStatus());
  for (int i = 0; i < 6; ++i) ASSERT_TRUE(core.Step().ok());
  const int64_t before = test::NumAllocations();
  for (int i = 0; i < 60; ++i) ASSERT_TRUE(core.Step().ok());
  EXPECT_EQ(test::NumAllocations(), before);
  EXPECT_EQ(core.Loads().running_sequences, 4);
}

}  // namespace
}  // namespace bebop
