// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "engine/schedule/engine_core.h"
#include "gtest/gtest.h"
#include "tests/sim/fake_executor.h"
#include "tests/sim/fake_model.h"

namespace bebop {

using sim::FakeExecutor;
using sim::Reference;
using sim::VirtualClock;

struct Recorder final : GenerateObserver {
  void OnAdmitted() override { admitted = true; }
  void OnTokens(const SampleResult& partial, int32_t) override { streamed = static_cast<int32_t>(partial.token_ids.size()); }
  void OnSample(const std::shared_ptr<const SampleResult>& sample) override { samples.push_back(*sample); }
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

}  // namespace bebop
