// SPDX-License-Identifier: Apache-2.0
// EngineCore across new weights and pauses, and samples that go on from elsewhere.
#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/base/status_reason.h"
#include "engine/schedule/engine_core.h"
#include "gtest/gtest.h"
#include "tests/engine/schedule/engine_core_fixture.h"

namespace bebop {
namespace {

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
