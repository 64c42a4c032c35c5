// SPDX-License-Identifier: Apache-2.0
#include "server/translation.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>
#include <utility>

#include "bebop/rpc/status.pb.h"
#include "engine/base/clock.h"
#include "engine/base/status_reason.h"
#include "engine/schedule/engine_core.h"
#include "google/protobuf/unknown_field_set.h"
#include "server/limits.h"
#include "server/status_details.h"
#include "tests/server/test_rules.h"

namespace bebop {
namespace {

TEST(ToEngine, FillsDefaults) {
  const auto request = ToEngine(ValidRequest(), SmallRules(), FixedContext());
  ASSERT_TRUE(request.ok()) << request.status();
  EXPECT_EQ(request->request_id, "fresh");
  EXPECT_EQ(request->prompt, (std::vector<uint32_t>{1, 2, 3, 4}));
  EXPECT_EQ(request->num_samples, 1);
  EXPECT_EQ(request->sampling.temperature, 1.0f);
  EXPECT_EQ(request->sampling.top_k, 0);
  EXPECT_EQ(request->sampling.top_p, 1.0f);
  EXPECT_EQ(request->sampling.min_p, 0.0f);
  EXPECT_EQ(request->sampling.seed, 77u);
  EXPECT_EQ(request->stopping.max_new_tokens, 60);
  EXPECT_EQ(request->stopping.min_new_tokens, 0);
  EXPECT_FALSE(request->stopping.ignore_eos);
  EXPECT_EQ(request->speculation.mode, SpeculationMode::kRejection);
  EXPECT_EQ(request->speculation.num_draft_tokens, 3);
  EXPECT_LT(request->speculation.synthetic_acceptance, 0.0);
  EXPECT_EQ(request->priority, 0);
  EXPECT_FALSE(request->stream_tokens);
  EXPECT_EQ(request->deadline, FixedContext().deadline);
}

TEST(ToEngine, KeepsWhatIsSet) {
  v1::GenerateRequest message = ValidRequest();
  message.set_request_id("me");
  message.set_num_samples(5);
  message.set_priority(-2);
  auto* sampling = message.mutable_sampling();
  sampling->set_temperature(0.0f);  // set to the zero value is not unset
  sampling->set_top_p(0.5f);
  sampling->set_top_k(7);
  sampling->set_min_p(0.25f);
  sampling->set_seed(0);
  auto* stopping = message.mutable_stopping();
  stopping->set_max_new_tokens(9);
  stopping->set_min_new_tokens(2);
  stopping->add_stop_token_ids(8);
  stopping->add_stop("end");
  stopping->set_ignore_eos(true);
  auto* output = message.mutable_output();
  output->set_logprobs(true);
  output->set_entropy(true);
  output->set_stream_tokens(true);
  message.mutable_speculation()->set_mode(v1::SpeculationParams::COUPLED);
  message.mutable_speculation()->set_num_draft_tokens(0);
  message.mutable_speculation()->set_synthetic_acceptance(0.5f);
  const auto request = ToEngine(message, SmallRules(), FixedContext());
  ASSERT_TRUE(request.ok()) << request.status();
  EXPECT_EQ(request->request_id, "me");
  EXPECT_EQ(request->num_samples, 5);
  EXPECT_EQ(request->priority, -2);
  EXPECT_TRUE(request->sampling.greedy());
  EXPECT_EQ(request->sampling.top_p, 0.5f);
  EXPECT_EQ(request->sampling.top_k, 7);
  EXPECT_EQ(request->sampling.min_p, 0.25f);
  EXPECT_EQ(request->sampling.seed, 0u);
  EXPECT_EQ(request->stopping.max_new_tokens, 9);
  EXPECT_EQ(request->stopping.min_new_tokens, 2);
  EXPECT_EQ(request->stopping.stop_token_ids, std::vector<uint32_t>{8});
  EXPECT_EQ(request->stopping.stop_strings, std::vector<std::string>{"end"});
  EXPECT_TRUE(request->stopping.ignore_eos);
  EXPECT_TRUE(request->output.logprobs);
  EXPECT_FALSE(request->output.raw_logprobs);
  EXPECT_TRUE(request->output.entropy);
  EXPECT_FALSE(request->output.token_source);
  EXPECT_FALSE(request->output.draft_logprobs);
  EXPECT_FALSE(request->output.spec_detail);
  EXPECT_TRUE(request->stream_tokens);
  EXPECT_EQ(request->speculation.mode, SpeculationMode::kCoupled);
  EXPECT_EQ(request->speculation.num_draft_tokens, 0);
  EXPECT_EQ(request->speculation.synthetic_acceptance, 0.5);
}

// Each output flag sets its own field and no other.
TEST(ToEngine, OutputFlagsAreNotMixedUp) {
  using Set = void (v1::OutputParams::*)(bool);
  const std::pair<Set, bool OutputParams::*> flags[] = {
      {&v1::OutputParams::set_logprobs, &OutputParams::logprobs},
      {&v1::OutputParams::set_raw_logprobs, &OutputParams::raw_logprobs},
      {&v1::OutputParams::set_entropy, &OutputParams::entropy},
      {&v1::OutputParams::set_token_source, &OutputParams::token_source},
      {&v1::OutputParams::set_draft_logprobs, &OutputParams::draft_logprobs},
      {&v1::OutputParams::set_spec_detail, &OutputParams::spec_detail}};
  for (const auto& [set, field] : flags) {
    v1::GenerateRequest message = ValidRequest();
    (message.mutable_output()->*set)(true);
    const auto request = ToEngine(message, SmallRules(), FixedContext());
    ASSERT_TRUE(request.ok());
    for (const auto& [other_set, other] : flags) EXPECT_EQ(request->output.*other, other == field);
  }
}

TEST(ToEngine, OffDraftsNothingWhateverIsAsked) {
  v1::GenerateRequest message = ValidRequest();
  message.mutable_speculation()->set_mode(v1::SpeculationParams::OFF);
  message.mutable_speculation()->set_num_draft_tokens(4);
  const auto request = ToEngine(message, SmallRules(), FixedContext());
  ASSERT_TRUE(request.ok());
  EXPECT_EQ(request->speculation.mode, SpeculationMode::kOff);
  EXPECT_EQ(request->speculation.num_draft_tokens, 0);
}

TEST(ToEngine, ScoreSequencesShareTheParameters) {
  v1::ScoreRequest message = ValidScore();
  auto* second = message.add_sequences();
  second->add_token_ids(9);
  second->add_token_ids(8);
  message.set_score_start(1);
  message.set_temperature(2.0f);
  message.set_top_logprobs(3);
  message.add_token_ids_logprob(6);
  message.set_entropy(true);
  message.set_draft_depth(2);
  const auto requests = ToEngine(message, SmallRules(), FixedContext());
  ASSERT_TRUE(requests.ok()) << requests.status();
  ASSERT_EQ(requests->size(), 2u);
  EXPECT_EQ((*requests)[0].token_ids, (std::vector<uint32_t>{1, 2, 3, 4}));
  EXPECT_EQ((*requests)[1].token_ids, (std::vector<uint32_t>{9, 8}));
  for (const ScoreRequest& request : *requests) {
    EXPECT_EQ(request.score_start, 1);
    EXPECT_EQ(request.temperature, 2.0f);
    EXPECT_EQ(request.top_logprobs, 3);
    EXPECT_EQ(request.token_ids_logprob, std::vector<uint32_t>{6});
    EXPECT_TRUE(request.entropy);
    EXPECT_EQ(request.draft_depth, 2);
    EXPECT_EQ(request.deadline, FixedContext().deadline);
  }
  const auto defaults = ToEngine(ValidScore(), SmallRules(), FixedContext());
  ASSERT_TRUE(defaults.ok());
  EXPECT_EQ(defaults->front().temperature, 1.0f);
}

TEST(BodyHash, DependsOnEverythingButTheId) {
  v1::GenerateRequest a = ValidRequest();
  v1::GenerateRequest b = ValidRequest();
  a.set_request_id("a");
  b.set_request_id("b");
  EXPECT_EQ(BodyHash(a), BodyHash(b));
  std::set<uint64_t> hashes = {BodyHash(a)};
  const auto expect_new = [&hashes](const v1::GenerateRequest& message) { EXPECT_TRUE(hashes.insert(BodyHash(message)).second); };
  b.add_prompt_token_ids(1);
  expect_new(b);
  b = ValidRequest();
  b.mutable_sampling()->set_seed(0);
  expect_new(b);
  b.mutable_sampling()->set_seed(1);
  expect_new(b);
  b = ValidRequest();
  b.mutable_output()->set_logprobs(true);
  expect_new(b);
  b = ValidRequest();
  b.mutable_stopping()->add_stop("x");
  expect_new(b);
  b = ValidRequest();
  b.set_num_samples(1);
  expect_new(b);
  b = ValidRequest();
  b.mutable_weights()->set_min_step(0);
  expect_new(b);
  b.mutable_weights()->set_wait_for_step(true);
  expect_new(b);
  b = ValidRequest();
  b.mutable_weights()->set_on_update(v1::WeightParams::STOP);
  expect_new(b);
  b = ValidRequest();
  b.set_detach(true);
  expect_new(b);
  b = ValidRequest();
  b.add_resume("x");
  expect_new(b);
}

TEST(ToEngine, WeightPolicy) {
  v1::GenerateRequest message = ValidRequest();
  const auto parse = [&] { return ToEngine(message, SmallRules(), FixedContext()); };
  ASSERT_TRUE(parse().ok());
  EXPECT_EQ(parse()->weights.min_step, INT64_MIN);
  EXPECT_FALSE(parse()->weights.refuse_if_behind);
  EXPECT_EQ(parse()->weights.max_step_spread, INT64_MAX);
  EXPECT_EQ(parse()->weights.on_update, OnUpdate::kAsTheUpdateSays);
  EXPECT_FALSE(parse()->detach);
  message.set_detach(true);
  message.mutable_weights()->set_min_step(7);
  message.mutable_weights()->set_max_step_spread(0);
  ASSERT_TRUE(parse().ok()) << parse().status();
  EXPECT_TRUE(parse()->detach);
  EXPECT_EQ(parse()->weights.min_step, 7);
  EXPECT_EQ(parse()->weights.max_step_spread, 0);
  const std::pair<v1::WeightParams::OnUpdate, OnUpdate> choices[] = {{v1::WeightParams::CONTINUE, OnUpdate::kContinue},
                                                                     {v1::WeightParams::RECOMPUTE, OnUpdate::kRecompute},
                                                                     {v1::WeightParams::STOP, OnUpdate::kStop}};
  for (const auto& [sent, parsed] : choices) {
    message.mutable_weights()->set_on_update(sent);
    EXPECT_EQ(parse()->weights.on_update, parsed);
  }
  EXPECT_TRUE(parse()->weights.refuse_if_behind);
  message.mutable_weights()->set_wait_for_step(true);
  ASSERT_TRUE(parse().ok());
  EXPECT_EQ(parse()->weights.min_step, 7);
  EXPECT_FALSE(parse()->weights.refuse_if_behind);
  message.mutable_weights()->set_max_step_spread(-1);
  EXPECT_EQ(ErrorMetadata(parse().status(), "field"), "weights.max_step_spread");
  message.mutable_weights()->set_max_step_spread(1);
  message.mutable_weights()->set_on_update(static_cast<v1::WeightParams::OnUpdate>(9));
  EXPECT_EQ(ErrorMetadata(parse().status(), "field"), "weights.on_update");
}

TEST(ToProto, LoadsTellWeightsAndControl) {
  EngineLoads loads;
  loads.target_step = 5;
  loads.draft_step = 4;
  loads.weight_commits = 3;
  loads.last_swap_time = absl::Milliseconds(250);
  loads.total_swap_time = absl::Seconds(2);
  loads.recomputed_tokens = 9;
  loads.version_spec.num_spec_steps = 11;
  loads.previous_version_spec.num_spec_steps = 12;
  EngineControl control;
  control.paused = true;
  control.sleeping.kv_cache = true;
  const v1::Loads message = MakeLoads(loads, control);
  EXPECT_EQ(message.target_step(), 5);
  EXPECT_EQ(message.draft_step(), 4);
  EXPECT_EQ(message.weight_commits(), 3);
  EXPECT_EQ(message.last_swap_seconds(), 0.25);
  EXPECT_EQ(message.total_swap_seconds(), 2.0);
  EXPECT_EQ(message.recomputed_tokens(), 9);
  EXPECT_EQ(message.version_spec().num_spec_steps(), 11);
  EXPECT_EQ(message.previous_version_spec().num_spec_steps(), 12);
  EXPECT_TRUE(message.paused());
  ASSERT_EQ(message.sleeping_size(), 1);
  EXPECT_EQ(message.sleeping(0), "kv_cache");
}

SampleResult FullSample() {
  SampleResult sample;
  sample.sample_index = 2;
  sample.seed_used = 123;
  sample.token_ids = {5, 6, 7};
  sample.logprobs = {-1.0f, -2.0f, -3.0f};
  sample.raw_logprobs = {-1.5f, -2.5f, -3.5f};
  sample.entropy = {0.1f, 0.2f, 0.3f};
  sample.token_source = {0, 1, -2};
  sample.draft_logprobs = {std::numeric_limits<float>::quiet_NaN(), -0.5f, -0.25f};
  sample.finish = FinishReason::kStop;
  sample.stop_token_id = 7;
  sample.spec.num_spec_steps = 4;
  sample.spec.num_draft_tokens = 12;
  sample.spec.num_accepted_draft_tokens = 6;
  sample.spec.num_trimmed_tokens = 1;
  sample.spec.drafted_per_pos = {4, 3, 2};
  sample.spec.accepted_per_pos = {3, 2, 1};
  sample.spec.overlap_per_pos = {2.5, 1.5, 0.5};
  sample.weight_spans = {{.target_step = 11, .draft_step = 11, .label = "", .begin = 0, .end = static_cast<int32_t>(sample.token_ids.size())}};
  sample.prompt_tokens = 4;
  sample.cached_tokens = 3;
  sample.preemptions = 1;
  sample.recomputed_tokens = 9;
  sample.queue_time = absl::Seconds(1);
  sample.prefill_time = absl::Seconds(2);
  sample.decode_time = absl::Seconds(3);
  sample.time_to_first_token = absl::Seconds(4);
  sample.total_time = absl::Seconds(6);
  return sample;
}

TEST(ToProto, SampleRoundTrip) {
  v1::GenerateRequest message = ValidRequest();
  message.mutable_output()->set_spec_detail(true);
  message.mutable_stopping()->add_stop("end");
  message.mutable_sampling()->set_top_k(3);
  const auto request = ToEngine(message, SmallRules(), FixedContext());
  ASSERT_TRUE(request.ok());
  SampleResult sample = FullSample();
  sample.speculation = request->speculation;
  const v1::SampleResult result = ToProto(sample, AppliedParams(sample, *request));
  EXPECT_EQ(result.sample_index(), 2);
  EXPECT_EQ(result.seed_used(), 123u);
  ASSERT_EQ(result.token_ids_size(), 3);
  EXPECT_EQ(result.token_ids(2), 7u);
  EXPECT_EQ(result.logprobs(1), -2.0f);
  EXPECT_EQ(result.raw_logprobs(1), -2.5f);
  EXPECT_EQ(result.entropy(2), 0.3f);
  EXPECT_EQ(result.token_source(2), -2);
  EXPECT_TRUE(std::isnan(result.draft_logprobs(0)));
  EXPECT_EQ(result.draft_logprobs(2), -0.25f);
  EXPECT_EQ(result.finish().reason(), v1::Finish::STOP);
  EXPECT_EQ(result.finish().matched_case(), v1::Finish::kStopTokenId);
  EXPECT_EQ(result.finish().stop_token_id(), 7u);
  EXPECT_EQ(result.usage().prompt_tokens(), 4);
  EXPECT_EQ(result.usage().cached_tokens(), 3);
  EXPECT_EQ(result.usage().completion_tokens(), 3);
  EXPECT_EQ(result.usage().preemptions(), 1);
  EXPECT_EQ(result.usage().recomputed_tokens(), 9);
  EXPECT_EQ(result.spec().num_spec_steps(), 4);
  EXPECT_EQ(result.spec().num_draft_tokens(), 12);
  EXPECT_EQ(result.spec().num_accepted_draft_tokens(), 6);
  EXPECT_EQ(result.spec().num_trimmed_tokens(), 1);
  ASSERT_EQ(result.spec().drafted_per_pos_size(), 3);  // the request's number of drafts
  EXPECT_EQ(result.spec().drafted_per_pos(1), 3);
  EXPECT_EQ(result.spec().accepted_per_pos(2), 1);
  EXPECT_EQ(result.spec().overlap_per_pos(0), 2.5);
  ASSERT_EQ(result.weight_spans_size(), 1);
  EXPECT_EQ(result.weight_spans(0).step(), 11);
  EXPECT_EQ(result.weight_spans(0).start(), 0);
  EXPECT_EQ(result.weight_spans(0).end(), 3);
  EXPECT_EQ(result.timing().queue(), 1.0);
  EXPECT_EQ(result.timing().prefill(), 2.0);
  EXPECT_EQ(result.timing().decode(), 3.0);
  EXPECT_EQ(result.timing().ttft(), 4.0);
  EXPECT_EQ(result.timing().e2e(), 6.0);
  EXPECT_EQ(result.applied().sampling().top_k(), 3);
  EXPECT_EQ(result.applied().sampling().seed(), 123u);
  EXPECT_TRUE(result.applied().sampling().has_temperature());
  EXPECT_EQ(result.applied().stopping().max_new_tokens(), 60);
  EXPECT_EQ(result.applied().stopping().stop(0), "end");
  EXPECT_EQ(result.applied().speculation().mode(), v1::SpeculationParams::REJECTION);
  EXPECT_FALSE(result.applied().speculation().has_synthetic_acceptance());

  // What was applied, sent again, resolves to the same request.
  v1::GenerateRequest again = ValidRequest();
  *again.mutable_sampling() = result.applied().sampling();
  *again.mutable_stopping() = result.applied().stopping();
  *again.mutable_speculation() = result.applied().speculation();
  RequestRules other_defaults = SmallRules();
  other_defaults.default_mode = SpeculationMode::kOff;
  other_defaults.default_num_draft_tokens = 1;
  const auto repeated = ToEngine(again, other_defaults, FixedContext());
  ASSERT_TRUE(repeated.ok()) << repeated.status();
  EXPECT_EQ(repeated->sampling.top_k, request->sampling.top_k);
  EXPECT_EQ(repeated->stopping.max_new_tokens, request->stopping.max_new_tokens);
  EXPECT_EQ(repeated->stopping.stop_strings, request->stopping.stop_strings);
  EXPECT_EQ(repeated->speculation.mode, request->speculation.mode);
  EXPECT_EQ(repeated->speculation.num_draft_tokens, request->speculation.num_draft_tokens);
}

TEST(ToProto, SparseSample) {
  const auto request = ToEngine(ValidRequest(), SmallRules(), FixedContext());
  SampleResult sample;
  sample.finish = FinishReason::kAborted;
  v1::SampleResult result = ToProto(sample, AppliedParams(sample, *request));
  EXPECT_EQ(result.weight_spans_size(), 0);  // no tokens: nothing to tile
  EXPECT_EQ(result.finish().matched_case(), v1::Finish::MATCHED_NOT_SET);
  EXPECT_EQ(result.spec().overlap_per_pos_size(), 0);
  sample.finish = FinishReason::kStop;
  sample.stop_string = "x";
  EXPECT_EQ(ToProto(sample, AppliedParams(sample, *request)).finish().stop_string(), "x");
}

TEST(ToProto, FinishReasons) {
  const auto request = ToEngine(ValidRequest(), SmallRules(), FixedContext());
  const std::pair<FinishReason, v1::Finish::Reason> reasons[] = {
      {FinishReason::kStop, v1::Finish::STOP},       {FinishReason::kLength, v1::Finish::LENGTH},
      {FinishReason::kAborted, v1::Finish::ABORTED}, {FinishReason::kDeadline, v1::Finish::TIME_BUDGET},
      {FinishReason::kDrained, v1::Finish::DRAINED}, {FinishReason::kNonFinite, v1::Finish::NON_FINITE}};
  for (const auto& [engine, proto] : reasons) {
    SampleResult sample;
    sample.finish = engine;
    EXPECT_EQ(ToProto(sample, AppliedParams(sample, *request)).finish().reason(), proto);
  }
}

TEST(ToProto, ChunksContinueEachOther) {
  const SampleResult sample = FullSample();
  const v1::TokenChunk first = ToProto(sample, 0);
  EXPECT_EQ(first.start(), 0);
  EXPECT_EQ(first.token_ids_size(), 3);
  const v1::TokenChunk rest = ToProto(sample, 2);
  EXPECT_EQ(rest.sample_index(), 2);
  EXPECT_EQ(rest.start(), 2);
  ASSERT_EQ(rest.token_ids_size(), 1);
  EXPECT_EQ(rest.token_ids(0), 7u);
  EXPECT_EQ(rest.logprobs(0), -3.0f);
  EXPECT_EQ(rest.draft_logprobs(0), -0.25f);
}

TEST(ToProto, Score) {
  ScoreResult score;
  score.logprobs = {-1.0f, -2.0f};
  score.entropy = {0.5f, 0.25f};
  score.positions = {{{4, 5}, {-0.1f, -0.2f}, {-7.0f}}, {{6, 7}, {-0.3f, -0.4f}, {-8.0f}}};
  score.draft = {{1, 2, {-3.0f}, {0.5f}, {0.75f}, {0.125f}}};
  score.weight_step = 3;
  ScoreRequest request;
  request.top_logprobs = 2;
  request.token_ids_logprob = {9};
  v1::SequenceScore result = ToProto(score, request);
  EXPECT_EQ(result.logprobs_size(), 2);
  EXPECT_EQ(result.entropy(1), 0.25f);
  ASSERT_EQ(result.top_logprobs_size(), 2);
  EXPECT_EQ(result.top_logprobs(1).token_ids(0), 6u);
  EXPECT_EQ(result.top_logprobs(1).logprobs(1), -0.4f);
  ASSERT_EQ(result.token_ids_logprobs_size(), 2);
  EXPECT_EQ(result.token_ids_logprobs(1).logprobs(0), -8.0f);
  ASSERT_EQ(result.draft_size(), 1);
  EXPECT_EQ(result.draft(0).depth(), 1);
  EXPECT_EQ(result.draft(0).start(), 2);
  EXPECT_EQ(result.draft(0).logprobs(0), -3.0f);
  EXPECT_EQ(result.draft(0).overlap(0), 0.5f);
  EXPECT_EQ(result.draft(0).argmax_prob(0), 0.75f);
  EXPECT_EQ(result.draft(0).entropy(0), 0.125f);
  EXPECT_EQ(result.weight_step(), 3);
  request.token_ids_logprob.clear();
  EXPECT_EQ(ToProto(score, request).token_ids_logprobs_size(), 0);
}

// ---- unknown fields ----


TEST(UnknownFields, AreFoundAtEveryDepth) {
  v1::GenerateRequest top = ValidRequest();
  top.GetReflection()->MutableUnknownFields(&top)->AddVarint(1234, 1);
  EXPECT_EQ(ErrorReason(CheckKnownFields(top)), "UNKNOWN_FIELD");
  EXPECT_EQ(ErrorMetadata(CheckKnownFields(top), "field"), "#1234");
  v1::GenerateRequest nested = ValidRequest();
  auto* sampling = nested.mutable_sampling();
  sampling->GetReflection()->MutableUnknownFields(sampling)->AddFixed32(99, 1);
  EXPECT_EQ(ErrorMetadata(CheckKnownFields(nested), "field"), "sampling.#99");
  EXPECT_EQ(CheckKnownFields(nested).code(), absl::StatusCode::kInvalidArgument);
  v1::ScoreRequest repeated = ValidScore();
  auto* second = repeated.add_sequences();
  second->add_token_ids(1);
  second->GetReflection()->MutableUnknownFields(second)->AddLengthDelimited(5, "x");
  EXPECT_EQ(ErrorMetadata(CheckKnownFields(repeated), "field"), "sequences[1].#5");
  EXPECT_TRUE(CheckKnownFields(ValidRequest()).ok());
}

TEST(UnknownFields, RefusedUnlessAllowed) {
  v1::GenerateRequest message = ValidRequest();
  auto* stopping = message.mutable_stopping();
  stopping->GetReflection()->MutableUnknownFields(stopping)->AddVarint(77, 1);
  EXPECT_EQ(ErrorReason(ToEngine(message, SmallRules(), FixedContext()).status()), "UNKNOWN_FIELD");
  RequestRules lenient = SmallRules();
  lenient.allow_unknown_fields = true;
  EXPECT_TRUE(ToEngine(message, lenient, FixedContext()).ok());
  EXPECT_NE(BodyHash(message), BodyHash(ValidRequest()));
}

// ---- status details ----

// What an engine with a pool of one page says to a request for two.
absl::Status RefusalThatNoRetryCures() {
  struct IdleExecutor final : Executor {
    absl::Status SetWeights(const ModelWeights*, int64_t) override { return absl::OkStatus(); }
    absl::Status Quiesce() override { return absl::OkStatus(); }
    absl::Status Execute(const StepPlan&, StepResult*) override { return absl::OkStatus(); }
  } executor;
  const MonotonicClock clock;
  EngineCoreOptions options;
  options.scheduler.num_pages = 1;
  options.scheduler.num_state_slots = 2;
  EngineCore core(options, &clock, &executor);
  GenerateRequest request;
  request.request_id = "large";
  request.prompt.assign(static_cast<size_t>(options.scheduler.page_tokens), 1);
  request.stopping.max_new_tokens = options.scheduler.page_tokens;
  return core.Submit(std::move(request), nullptr);
}

TEST(StatusDetails, EngineStatusesGetAReason) {
  const std::pair<absl::Status, std::string> expected[] = {{absl::ResourceExhaustedError("queue full"), "CAPACITY"},
                                                           {absl::UnavailableError("draining"), "NOT_SERVING"},
                                                           {absl::AlreadyExistsError("id"), "REQUEST_ID_REUSED"},
                                                           {absl::InvalidArgumentError("bad"), "INVALID_FIELD"},
                                                           {absl::FailedPreconditionError("no tokenizer"), "PRECONDITION_FAILED"},
                                                           {absl::InternalError("broken"), "ENGINE_FAILED"}};
  for (const auto& [status, reason] : expected) {
    const absl::Status detailed = CompleteDetails(status);
    EXPECT_EQ(detailed.code(), status.code());
    EXPECT_EQ(detailed.message(), status.message());
    EXPECT_EQ(ErrorReason(detailed), reason);
    const bool retry = absl::IsResourceExhausted(status) || absl::IsUnavailable(status);
    EXPECT_EQ(detailed.GetPayload(kRetryInfoUrl).has_value(), retry);
  }
  const absl::Status never = CompleteDetails(RefusalThatNoRetryCures());
  EXPECT_EQ(never.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(never), "CANNOT_FIT");
  EXPECT_FALSE(never.GetPayload(kRetryInfoUrl).has_value());  // trying again would not help
  EXPECT_TRUE(CompleteDetails(absl::OkStatus()).ok());
  // Details that are there stay.
  const absl::Status own = DetailedError(absl::StatusCode::kUnavailable, "DRAINING", "x");
  EXPECT_EQ(ErrorReason(CompleteDetails(own)), "DRAINING");
  EXPECT_FALSE(CompleteDetails(own).GetPayload(kRetryInfoUrl).has_value());
}

// What the engine says for programs reaches them.
TEST(StatusDetails, TheEnginesMetadataGoesAlong) {
  const absl::Status status = StatusWithReason(absl::StatusCode::kFailedPrecondition, "WRONG_BASE_STEP", "base_step: expected 5, got 4",
                                               {{"field", "base_step"}, {"value", "4"}, {"limit", ""}, {"component", "draft"}});
  EXPECT_EQ(StatusReasonMetadata(status).size(), 4u);
  const absl::Status detailed = CompleteDetails(status);
  EXPECT_EQ(ErrorReason(detailed), "WRONG_BASE_STEP");
  EXPECT_EQ(ErrorMetadata(detailed, "field"), "base_step");
  EXPECT_EQ(ErrorMetadata(detailed, "value"), "4");
  EXPECT_EQ(ErrorMetadata(detailed, "limit"), "");
  EXPECT_EQ(ErrorMetadata(detailed, "component"), "draft");
  EXPECT_TRUE(StatusReasonMetadata(StatusWithReason(absl::StatusCode::kInternal, "X", "y")).empty());
}

TEST(StatusDetails, RetryAfter) {
  const absl::Status status = WithRetryAfter(absl::UnavailableError("x"), absl::Milliseconds(2500));
  rpc::RetryInfo info;
  ASSERT_TRUE(info.ParseFromString(std::string(*status.GetPayload(kRetryInfoUrl))));
  EXPECT_EQ(info.retry_delay().seconds(), 2);
  EXPECT_EQ(info.retry_delay().nanos(), 500000000);
}

}  // namespace
}  // namespace bebop
