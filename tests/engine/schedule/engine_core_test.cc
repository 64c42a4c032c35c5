// SPDX-License-Identifier: Apache-2.0
#include "engine/schedule/engine_core.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/base/status_reason.h"
#include "gtest/gtest.h"
#include "tests/sim/fake_executor.h"
#include "tests/sim/fake_model.h"
#include "tests/support/allocation_counter.h"

namespace bebop {
namespace {

using sim::FakeExecutor;
using sim::Reference;
using sim::VirtualClock;

struct Recorder final : GenerateObserver {
  void OnAdmitted() override { admitted = true; }
  void OnTokens(const SampleResult& partial, int32_t) override { streamed = static_cast<int32_t>(partial.token_ids.size()); }
  void OnSample(const SampleResult& sample) override { samples.push_back(sample); }
  void OnDone(const absl::Status& end) override {
    done = true;
    status = end;
  }
  bool HasRoom() const override { return room; }
  bool admitted = false, done = false, room = true;
  int32_t streamed = 0;
  absl::Status status;
  std::vector<SampleResult> samples;
};

struct ScoreRecorder final : ScoreObserver {
  void OnScore(const absl::Status& end, ScoreResult score) override {
    ++calls;
    status = end;
    result = std::move(score);
  }
  int32_t calls = 0;
  absl::Status status;
  ScoreResult result;
};

// Keeps what each plan said.
struct Watcher final : Executor {
  explicit Watcher(const SchedulerOptions& options) : fake(options) {}
  absl::Status SetWeights(const ModelWeights* weights, int64_t epoch) override { return fake.SetWeights(weights, epoch); }
  absl::Status Quiesce() override { return fake.Quiesce(); }
  absl::Status Execute(const StepPlan& plan, StepResult* result) override {
    num_copies += static_cast<int32_t>(plan.page_copies.size());
    rows.push_back(0);
    for (const SequencePlan& sequence : plan.sequences) {
      rows.back() += static_cast<int32_t>(sequence.known_tokens.size()) + sequence.num_drafts;
      prompt_rows += sequence.num_output == 0 ? static_cast<int32_t>(sequence.known_tokens.size()) : 0;
      forked += sequence.state_src >= 0 && sequence.state_src != sequence.state_dst ? 1 : 0;
      seeds.push_back(sequence.seed);
      if (sequence.num_output == 0) chunk_ends.push_back(sequence.num_computed + static_cast<int32_t>(sequence.known_tokens.size()));
    }
    for (const ScorePlan& score : plan.scores) {
      score_rows += score.end - score.begin;
      score_ends.push_back(score.end);
    }
    return fake.Execute(plan, result);
  }
  FakeExecutor fake;
  int32_t num_copies = 0, prompt_rows = 0, forked = 0, score_rows = 0;
  std::vector<int32_t> rows;
  std::vector<uint64_t> seeds;  // of planned sequences, in order
  std::vector<int32_t> chunk_ends;  // positions where passes over prompts ended
  std::vector<int32_t> score_ends;
};

class EngineCoreTest : public testing::Test {
 protected:
  EngineCoreTest() {
    options_.scheduler.max_num_seqs = 4;
    options_.scheduler.max_step_tokens = 64;
    options_.scheduler.num_pages = 64;
    options_.scheduler.page_tokens = 4;
    options_.scheduler.num_state_slots = 8;
    options_.scheduler.max_model_len = 200;
    options_.scheduler.score_bytes_per_token = 4;
    options_.vocab_size = static_cast<int32_t>(sim::kVocab);
    options_.eos_token_ids = sim::EosIds();
    options_.token_bytes = [](uint32_t token) { return sim::TokenText(token); };
  }
  void Start() {
    executor_ = std::make_unique<Watcher>(options_.scheduler);
    core_ = std::make_unique<EngineCore>(options_, &clock_, executor_.get());
  }
  static ScoreRequest Score(std::vector<uint32_t> tokens) {
    ScoreRequest request;
    request.token_ids = std::move(tokens);
    return request;
  }
  GenerateRequest Request(const std::string& id, int32_t prompt, int32_t max_new, int32_t samples = 1, int32_t drafts = 0) {
    GenerateRequest request;
    request.request_id = id;
    request.body_hash = 1;
    for (int32_t i = 0; i < prompt; ++i) request.prompt.push_back(static_cast<uint32_t>((i * 7 + prompt) % 40));
    request.num_samples = samples;
    request.stopping.max_new_tokens = max_new;
    request.stopping.ignore_eos = true;
    request.sampling.seed = 1001 + 7 * static_cast<uint64_t>(id[0]);  // not divisible by 7: all rows are finite
    if (request.sampling.seed % 7 == 0) ++request.sampling.seed;
    request.speculation.mode = drafts > 0 ? SpeculationMode::kRejection : SpeculationMode::kOff;
    request.speculation.num_draft_tokens = drafts;
    request.output.token_source = true;
    return request;
  }
  std::shared_ptr<Recorder> Submit(const GenerateRequest& request) {
    auto recorder = std::make_shared<Recorder>();
    EXPECT_EQ(core_->Submit(request, recorder), absl::OkStatus());
    return recorder;
  }
  bool Step() {
    const absl::StatusOr<bool> worked = core_->Step();
    EXPECT_EQ(worked.status(), absl::OkStatus()) << executor_->fake.violation();
    EXPECT_EQ(core_->Audit(), absl::OkStatus());
    return worked.ok() && *worked;
  }
  int32_t RunToRest(int32_t limit = 500) {
    int32_t steps = 0;
    while (!core_->Idle() && steps < limit) {
      Step();
      ++steps;
    }
    EXPECT_TRUE(core_->Idle());
    return steps;
  }
  void RunToRestOf(const Recorder* recorder) {
    for (int i = 0; i < 500 && !recorder->done; ++i) Step();
  }
  void ExpectReference(const GenerateRequest& request, const Recorder& recorder) {
    EXPECT_TRUE(recorder.done);
    EXPECT_EQ(recorder.status, absl::OkStatus());
    ASSERT_EQ(static_cast<int32_t>(recorder.samples.size()), request.num_samples);
    for (const SampleResult& sample : recorder.samples) {
      const SampleResult expected = Reference(request, sample.sample_index);
      EXPECT_EQ(sample.token_ids, expected.token_ids);
      EXPECT_EQ(sample.token_source, expected.token_source);
      EXPECT_EQ(sample.finish, expected.finish);
    }
  }

  EngineCoreOptions options_;
  VirtualClock clock_;
  std::unique_ptr<Watcher> executor_;
  std::unique_ptr<EngineCore> core_;
};

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

// ---- Weights ----

// Each request's own choice goes before the update's, except over kAbort; samples that wait for their turn go on waiting.
TEST_F(EngineCoreTest, RequestsChooseWhatAnUpdateDoesToThem) {
  for (const InFlight mode : {InFlight::kKeep, InFlight::kRecompute, InFlight::kAbort}) {
    options_.scheduler.max_num_seqs = 5;
    Start();
    std::map<OnUpdate, std::shared_ptr<Recorder>> recorders;
    for (const OnUpdate choice : {OnUpdate::kAsTheUpdateSays, OnUpdate::kContinue, OnUpdate::kRecompute, OnUpdate::kStop}) {
      GenerateRequest request = Request(std::string(1, static_cast<char>('a' + static_cast<int>(choice))), 5, 30);
      request.weights.on_update = choice;
      recorders[choice] = Submit(request);
    }
    for (int i = 0; i < 3; ++i) Step();
    auto waiting = Submit(Request("w", 5, 4, 2));  // one sample gets the fifth slot, later
    const absl::StatusOr<CommitResult> commit = core_->Commit(nullptr, {3, 2, "three"}, mode);
    ASSERT_TRUE(commit.ok());
    EXPECT_EQ(core_->Audit(), absl::OkStatus());
    const bool abort = mode == InFlight::kAbort;
    EXPECT_EQ(commit->ended, abort ? 4 : 1);
    EXPECT_EQ(commit->recomputed, abort ? 0 : mode == InFlight::kRecompute ? 2 : 1);
    EXPECT_EQ(commit->kept, abort ? 0 : mode == InFlight::kRecompute ? 1 : 2);
    RunToRest();
    for (const auto& [choice, recorder] : recorders) {
      ASSERT_EQ(recorder->samples.size(), 1u);
      const SampleResult& sample = recorder->samples[0];
      if (abort || choice == OnUpdate::kStop) {
        EXPECT_EQ(sample.finish, FinishReason::kSuperseded);
        EXPECT_EQ(sample.weight_spans.size(), 1u);
        continue;
      }
      EXPECT_EQ(sample.finish, FinishReason::kLength);
      ASSERT_EQ(sample.weight_spans.size(), 2u);
      EXPECT_EQ(sample.weight_spans[1], (WeightSpan{3, 2, "three", 3, 30}));
      const bool recomputed = choice == OnUpdate::kRecompute || (choice == OnUpdate::kAsTheUpdateSays && mode == InFlight::kRecompute);
      EXPECT_EQ(sample.kv_mixed, !recomputed);
      EXPECT_EQ(sample.preemptions, recomputed ? 1 : 0);
    }
    ASSERT_EQ(waiting->samples.size(), 2u);
    for (const SampleResult& sample : waiting->samples) EXPECT_EQ(sample.weight_spans.size(), 1u);
    const EngineLoads loads = core_->Loads();
    EXPECT_EQ(loads.samples_by_finish[static_cast<size_t>(FinishReason::kSuperseded)], abort ? 4 : 1);
    EXPECT_EQ(loads.cancelled, abort ? 4 : 1);
    EXPECT_EQ(loads.samples_by_spread[3], abort ? 0 : 3);
    EXPECT_EQ(loads.draft_step, 2);
  }
}

TEST_F(EngineCoreTest, StepsBeforeAndBeyondAPolicyAreNotSampled) {
  options_.weights = {10, 10, ""};
  Start();
  GenerateRequest early = Request("early", 5, 8), far = Request("far", 5, 30);
  early.weights.min_step = 12;
  far.weights.max_step_spread = 2;
  auto waits = Submit(early), ends = Submit(far);
  for (int i = 0; i < 3; ++i) Step();
  ASSERT_TRUE(core_->Commit(nullptr, {11, 11, ""}, InFlight::kKeep).ok());
  Step();
  EXPECT_FALSE(waits->admitted);
  ASSERT_TRUE(core_->Commit(nullptr, {12, 12, ""}, InFlight::kKeep).ok());
  Step();
  EXPECT_TRUE(waits->admitted);
  EXPECT_FALSE(ends->done);
  const absl::StatusOr<CommitResult> commit = core_->Commit(nullptr, {13, 13, ""}, InFlight::kRecompute);
  ASSERT_TRUE(commit.ok());
  EXPECT_EQ(commit->ended, 1);
  ASSERT_TRUE(ends->done);
  EXPECT_EQ(ends->samples[0].finish, FinishReason::kWeightPolicy);
  EXPECT_EQ(ends->samples[0].weight_spans.size(), 3u);
  RunToRest();
  EXPECT_EQ(waits->samples[0].weight_spans[0].target_step, 12);
  // What is resumed beyond its policy ends, too, with what it came with.
  far.request_id = "again";
  far.resume = {ends->samples[0]};
  auto again = Submit(far);
  Step();
  ASSERT_TRUE(again->done);
  EXPECT_EQ(again->samples[0].finish, FinishReason::kWeightPolicy);
  EXPECT_EQ(again->samples[0].token_ids, ends->samples[0].token_ids);
}

// I1: a repeat hears of its request, whatever the step is meanwhile and whatever the defaults are that the repeat was given.
TEST_F(EngineCoreTest, OnlyNewRequestsAreRefusedForTheirStep) {
  options_.weights = {10, 10, ""};
  Start();
  GenerateRequest request = Request("a", 5, 8, 1, 3);
  request.weights.min_step = 10;
  request.weights.refuse_if_behind = true;
  auto first = Submit(request);
  Step();
  ASSERT_TRUE(core_->Commit(nullptr, {9, 9, ""}, InFlight::kKeep).ok());
  request.speculation = {SpeculationMode::kCoupled, 2, -1.0};
  auto again = Submit(request);
  GenerateRequest other = request;
  other.request_id = "b";
  const absl::Status refused = core_->Submit(other, std::make_shared<Recorder>());
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(StatusReason(refused), "STEP_NOT_REACHED");
  EXPECT_NE(refused.message().find("weights.min_step: 10"), absl::string_view::npos) << refused;
  EXPECT_NE(refused.message().find("at step 9"), absl::string_view::npos) << refused;
  other.weights.refuse_if_behind = false;
  auto waits = Submit(other);
  ASSERT_TRUE(core_->Commit(nullptr, {10, 10, ""}, InFlight::kKeep).ok());
  RunToRest();
  ASSERT_TRUE(core_->Commit(nullptr, {9, 9, ""}, InFlight::kKeep).ok());
  auto kept = Submit(request);
  for (const auto& recorder : {first, again, kept}) {
    ASSERT_EQ(recorder->samples.size(), 1u);
    EXPECT_EQ(recorder->samples[0].speculation.mode, SpeculationMode::kRejection);
    EXPECT_EQ(recorder->samples[0].speculation.num_draft_tokens, 3);
  }
  EXPECT_EQ(waits->samples[0].speculation.mode, SpeculationMode::kCoupled);
  EXPECT_EQ(core_->Loads().refused, 1);
}

// ADR 5: what had run ahead of the swap says so.
TEST_F(EngineCoreTest, AnIterationThatRanAheadKeepsItsEpoch) {
  Start();
  executor_->fake.set_runs_ahead(true);
  std::map<std::string, std::shared_ptr<Recorder>> recorders;
  for (const char* id : {"a", "b", "c", "d"}) recorders[id] = Submit(Request(id, 5, 30, 1, 3));
  for (int i = 0; i < 3; ++i) Step();
  ASSERT_TRUE(core_->Commit(nullptr, {1, 1, ""}, InFlight::kKeep).ok());
  const SpecCounts old = core_->Loads().previous_version_spec;
  EXPECT_EQ(old.num_spec_steps, core_->Loads().spec.num_spec_steps);
  Step();
  const EngineLoads loads = core_->Loads();
  EXPECT_GT(loads.previous_version_spec.num_spec_steps, old.num_spec_steps) << "somebody had run ahead";
  EXPECT_EQ(loads.version_spec.num_spec_steps + loads.previous_version_spec.num_spec_steps, loads.spec.num_spec_steps);
  RunToRest();
  for (const auto& [id, recorder] : recorders) {
    const SampleResult& sample = recorder->samples[0];
    ASSERT_EQ(sample.weight_spans.size(), 2u);
    const std::vector<FakeExecutor::Drawn>& drawn = executor_->fake.DrawnBy(id, 0);
    for (const WeightSpan& span : sample.weight_spans) {
      for (int32_t t = span.begin; t < span.end; ++t) EXPECT_EQ(drawn[t].epoch, span.target_step) << id << " token " << t;
    }
  }
}

TEST_F(EngineCoreTest, ScoresStartOverAtACommitAndStandStillInAPause) {
  options_.scheduler.max_step_tokens = 16;
  Start();
  std::vector<uint32_t> tokens(40, 7);
  auto score = std::make_shared<ScoreRecorder>();
  uint64_t handle = 0;
  ASSERT_EQ(core_->SubmitScore(Score(tokens), score, &handle), absl::OkStatus());
  Step();
  Step();
  ASSERT_TRUE(core_->Commit(nullptr, {4, 4, ""}, InFlight::kKeep).ok());
  EXPECT_TRUE(executor_->fake.score_rows().empty()) << "forgotten before the weights changed";
  core_->Pause();
  EXPECT_FALSE(Step());
  core_->Resume();
  Step();
  Step();
  EXPECT_EQ(score->calls, 0);
  Step();
  ASSERT_EQ(score->calls, 1);
  EXPECT_EQ(score->result.weight_step, 4);
  EXPECT_EQ(executor_->score_rows, 32 + 40);
}

// Pushes in quick succession: what has started over once is let to its end, before anything newer.
TEST_F(EngineCoreTest, AScoreStartsOverOnceAtMostWhereCommitsWaitForIt) {
  options_.scheduler.max_step_tokens = 16;
  options_.scheduler.max_score_bytes = 4 * 48;  // one at a time
  Start();
  auto score = std::make_shared<ScoreRecorder>(), newer = std::make_shared<ScoreRecorder>();
  uint64_t handle = 0;
  ASSERT_EQ(core_->SubmitScore(Score(std::vector<uint32_t>(48, 7)), score, &handle), absl::OkStatus());
  ASSERT_EQ(core_->SubmitScore(Score(std::vector<uint32_t>(48, 8)), newer, &handle), absl::OkStatus());
  int64_t commits = 0;
  for (int32_t step = 1; step <= 40 && newer->calls == 0; ++step) {
    Step();
    EXPECT_LE(newer->calls, score->calls);
    if (step % 2 != 0) continue;  // a third of what a score takes
    if (core_->RestartedScoreRuns()) {
      core_->HoldScores();
    } else {
      ASSERT_TRUE(core_->Commit(nullptr, {++commits, 0, ""}, InFlight::kKeep).ok());
    }
  }
  EXPECT_EQ(score->calls, 1);
  EXPECT_EQ(newer->calls, 1);
  EXPECT_GE(commits, 2);
  // Held, no other begins.
  ASSERT_EQ(core_->SubmitScore(Score(std::vector<uint32_t>(48, 9)), newer, &handle), absl::OkStatus());
  core_->HoldScores();
  EXPECT_FALSE(Step());
  core_->HoldForCommit(false);
  RunToRest();
  EXPECT_EQ(newer->calls, 2);
}

// Its usage is of the whole sample.
TEST_F(EngineCoreTest, ResumedSamplesCountOn) {
  Start();
  GenerateRequest request = Request("a", 9, 30, 2);
  auto first = Submit(request);
  for (int i = 0; i < 6; ++i) Step();
  ASSERT_TRUE(core_->Commit(nullptr, {1, 1, ""}, InFlight::kRecompute).ok());
  for (int i = 0; i < 3; ++i) Step();
  core_->PauseAborting();
  core_->Resume();
  ASSERT_EQ(first->samples.size(), 2u);
  request.request_id = "b";
  request.resume = first->samples;
  std::sort(request.resume.begin(), request.resume.end(), [](const auto& x, const auto& y) { return x.sample_index < y.sample_index; });
  auto rest = Submit(request);
  RunToRest();
  ASSERT_EQ(rest->samples.size(), 2u);
  for (const SampleResult& sample : rest->samples) {
    const SampleResult& cut = request.resume[static_cast<size_t>(sample.sample_index)];
    EXPECT_EQ(cut.preemptions, 1);
    EXPECT_GT(cut.recomputed_tokens, 0);
    EXPECT_EQ(sample.preemptions, 1);
    EXPECT_EQ(sample.cached_tokens, cut.cached_tokens);
    EXPECT_GT(sample.recomputed_tokens, cut.recomputed_tokens) << "prompt or output were fed before";
  }
}

// What stands still would only be cut at the deadline.
TEST_F(EngineCoreTest, APausedEngineDrainsAtOnce) {
  Start();
  auto stands = Submit(Request("a", 5, 30));
  Step();
  core_->Pause();
  core_->StartDrain(clock_.Now() + absl::Seconds(30));
  EXPECT_TRUE(Step());
  ASSERT_TRUE(stands->done);
  EXPECT_EQ(stands->samples[0].finish, FinishReason::kDrained);
  EXPECT_TRUE(core_->Idle());
}

TEST_F(EngineCoreTest, AGroupEndsBehindItsPrefix) {
  // Samples whose prefix is half computed at an aborting commit have not begun: they run under the new weights, from a prefix of their own.
  options_.scheduler.max_step_tokens = 8;
  Start();
  auto recorder = Submit(Request("a", 20, 6, 3));
  Step();
  const absl::StatusOr<CommitResult> commit = core_->Commit(nullptr, {1, 1, ""}, InFlight::kAbort);
  ASSERT_TRUE(commit.ok());
  EXPECT_EQ(commit->ended + commit->kept + commit->recomputed, 0);
  EXPECT_EQ(core_->Loads().used_pages, 0);
  RunToRest();
  ASSERT_EQ(recorder->samples.size(), 3u);
  for (const SampleResult& sample : recorder->samples) {
    EXPECT_EQ(sample.finish, FinishReason::kLength);
    EXPECT_EQ(sample.weight_spans, (std::vector<WeightSpan>{{1, 1, "", 0, 6}}));
    EXPECT_FALSE(sample.kv_mixed);
  }
}

TEST_F(EngineCoreTest, ResumedSamplesThatCannotBeAreRefused) {
  Start();
  GenerateRequest request = Request("a", 5, 30, 2, 3);
  request.output.logprobs = true;
  auto first = Submit(request);
  for (int i = 0; i < 4; ++i) Step();
  EXPECT_EQ(core_->PauseAborting(), 2);
  core_->Resume();
  ASSERT_EQ(first->samples.size(), 2u);
  request.resume = first->samples;
  std::sort(request.resume.begin(), request.resume.end(), [](const auto& a, const auto& b) { return a.sample_index < b.sample_index; });
  ASSERT_GE(request.resume[0].token_ids.size(), 3u);
  int32_t number = 0;
  const auto refused = [&](const char* what, const std::function<void(GenerateRequest&)>& change) {
    GenerateRequest bad = request;
    bad.request_id = "bad" + std::to_string(number++);
    change(bad);
    const absl::Status status = core_->Submit(bad, std::make_shared<Recorder>());
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << what;
    EXPECT_NE(status.message().find(what), absl::string_view::npos) << status;
  };
  refused("num_samples is 3", [](GenerateRequest& r) { r.num_samples = 3; });
  refused("resume[1].sample_index is 0", [](GenerateRequest& r) { r.resume[1].sample_index = 0; });
  refused("resume[0].sample_index is -1", [](GenerateRequest& r) { r.resume[0].sample_index = -1; });
  refused("resume[1].sample_index is 2147483647", [](GenerateRequest& r) { r.resume[1].sample_index = INT32_MAX; });
  refused("resume[0].seed_used", [](GenerateRequest& r) { r.resume[0].seed_used ^= 1; });
  refused("resume[0].token_ids[2] is 4294967295", [](GenerateRequest& r) { r.resume[0].token_ids[2] = UINT32_MAX; });
  refused("resume[1].logprobs has 0 values", [](GenerateRequest& r) { r.resume[1].logprobs.clear(); });
  refused("resume[1].token_source", [](GenerateRequest& r) { r.resume[1].token_source.push_back(1); });
  refused("nothing is left to sample", [](GenerateRequest& r) { r.stopping.max_new_tokens = static_cast<int32_t>(r.resume[0].token_ids.size()); });
  refused("resume[0].weight_spans end at 0", [](GenerateRequest& r) { r.resume[0].weight_spans.clear(); });
  refused("resume[0].weight_spans has [1,", [](GenerateRequest& r) { r.resume[0].weight_spans[0].begin = 1; });
  refused("resume[0].weight_spans end at", [](GenerateRequest& r) { r.resume[0].weight_spans[0].end = INT32_MAX; });
  refused("resume[0].pending_drafts is -1", [](GenerateRequest& r) { r.resume[0].pending_drafts = -1; });
  refused("resume[0].preemptions is -1", [](GenerateRequest& r) { r.resume[0].preemptions = -1; });
  refused("resume[0].recomputed_tokens is 2147483647", [](GenerateRequest& r) { r.resume[0].recomputed_tokens = INT32_MAX; });
  refused("resume[1].cached_tokens is 6, the prompt has 5", [](GenerateRequest& r) { r.resume[1].cached_tokens = 6; });
  refused("resume[0].spec", [](GenerateRequest& r) { r.resume[0].spec.num_draft_tokens = INT64_MAX; });
  refused("resume[0].spec", [](GenerateRequest& r) { r.resume[0].spec.overlap_per_pos[0] = std::numeric_limits<double>::quiet_NaN(); });
  refused("resume[0].token_ids[1] completes a stop", [](GenerateRequest& r) { r.stopping.stop_token_ids = {r.resume[0].token_ids[1]}; });
  EXPECT_EQ(core_->Loads().submitted, 1);

  request.request_id = "good";
  request.resume[0].pending_drafts = INT32_MAX;  // no more than could stand there are made
  auto rest = Submit(request);
  RunToRest();
  ASSERT_EQ(rest->samples.size(), 2u);
  EXPECT_EQ(rest->samples[0].token_ids.size(), 30u);
}

TEST_F(EngineCoreTest, APausedEngineStillEndsWhatIsOver) {
  Start();
  GenerateRequest timed = Request("timed", 5, 30);
  timed.deadline = clock_.Now() + absl::Seconds(1);
  auto late = Submit(timed), aborted = Submit(Request("b", 5, 30));
  Step();
  core_->Pause();
  EXPECT_FALSE(Step());
  auto waits = Submit(Request("c", 5, 30));
  EXPECT_FALSE(Step());
  EXPECT_FALSE(waits->admitted);
  EXPECT_TRUE(core_->Abort("b"));
  EXPECT_TRUE(aborted->done);
  EXPECT_EQ(aborted->samples[0].abort_epoch, 0) << "no pause ended it";
  EXPECT_EQ(core_->NextDeadline(), timed.deadline);
  clock_.Advance(absl::Seconds(2));
  EXPECT_TRUE(Step());
  EXPECT_TRUE(absl::IsDeadlineExceeded(late->status));
  core_->StartDrain(clock_.Now());
  Step();
  EXPECT_TRUE(core_->Idle());
  EXPECT_EQ(waits->samples[0].finish, FinishReason::kDrained);
}

}  // namespace
}  // namespace bebop
