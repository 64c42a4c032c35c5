// SPDX-License-Identifier: Apache-2.0
#include "server/resume_handle.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/limits.h"
#include "server/status_details.h"
#include "server/translation.h"
#include "tests/server/resume_samples.h"

namespace bebop {
namespace {

using test::CutSample;
using test::DetailedRequest;
using test::HandleOf;
using test::ResumeRules;

v1::GenerateRequest ResumeOf(const v1::GenerateRequest& message, const std::vector<std::string>& handles) {
  v1::GenerateRequest resume = message;
  for (const std::string& handle : handles) resume.add_resume(handle);
  return resume;
}

GenerateRequest Parse(const v1::GenerateRequest& message, const RequestRules& rules = ResumeRules()) {
  const auto request = ToEngine(message, rules, FixedContext());
  EXPECT_TRUE(request.ok()) << request.status();
  return request.ok() ? *request : GenerateRequest();
}

// The reason and the field of a refusal.
std::pair<std::string, std::string> Refusal(const v1::GenerateRequest& message, const RequestRules& rules = ResumeRules()) {
  const absl::Status status = ToEngine(message, rules, FixedContext()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_LT(status.message().size(), 512u) << status;
  return {ErrorReason(status), ErrorMetadata(status, "field")};
}
using Pair = std::pair<std::string, std::string>;

TEST(ResumeHandle, BringsBackTheSample) {
  const v1::GenerateRequest message = DetailedRequest();
  const SampleResult cut = CutSample(Parse(message), 3);
  const GenerateRequest resumed = Parse(ResumeOf(message, {HandleOf(message, cut)}));
  ASSERT_EQ(resumed.resume.size(), 1u);
  const SampleResult& sample = resumed.resume[0];
  EXPECT_EQ(resumed.num_samples, 1);
  EXPECT_EQ(resumed.sampling.seed, 77u);
  EXPECT_EQ(sample.sample_index, 3);
  EXPECT_EQ(sample.seed_used, 77u);
  EXPECT_EQ(sample.token_ids, cut.token_ids);
  EXPECT_EQ(sample.logprobs, cut.logprobs);
  EXPECT_EQ(sample.raw_logprobs, cut.raw_logprobs);
  EXPECT_EQ(sample.entropy, cut.entropy);
  EXPECT_EQ(sample.token_source, cut.token_source);
  ASSERT_EQ(sample.draft_logprobs.size(), cut.draft_logprobs.size());
  EXPECT_TRUE(std::isnan(sample.draft_logprobs[0]));
  EXPECT_EQ(sample.draft_logprobs[1], cut.draft_logprobs[1]);
  EXPECT_EQ(sample.weight_spans, cut.weight_spans);
  EXPECT_TRUE(sample.kv_mixed);
  EXPECT_EQ(sample.pending_drafts, 2);
  EXPECT_EQ(sample.prompt_tokens, 4);
  EXPECT_EQ(sample.cached_tokens, 1);
  EXPECT_EQ(sample.preemptions, 2);
  EXPECT_EQ(sample.recomputed_tokens, 9);
  EXPECT_EQ(sample.spec.num_spec_steps, cut.spec.num_spec_steps);
  EXPECT_EQ(sample.spec.num_draft_tokens, cut.spec.num_draft_tokens);
  EXPECT_EQ(sample.spec.num_accepted_draft_tokens, cut.spec.num_accepted_draft_tokens);
  EXPECT_EQ(sample.spec.num_trimmed_tokens, cut.spec.num_trimmed_tokens);
  EXPECT_EQ(sample.spec.drafted_per_pos, cut.spec.drafted_per_pos);
  EXPECT_EQ(sample.spec.accepted_per_pos, cut.spec.accepted_per_pos);
  EXPECT_EQ(sample.spec.overlap_per_pos, cut.spec.overlap_per_pos);
  // Reason and times are of the part that comes now.
  EXPECT_EQ(sample.finish, FinishReason::kNone);
  EXPECT_EQ(sample.abort_epoch, 0);
}

TEST(ResumeHandle, SamplesComeInTheOrderOfTheirIndexes) {
  const v1::GenerateRequest message = DetailedRequest();
  const GenerateRequest request = Parse(message);
  SampleResult empty = CutSample(request, 1);
  for (auto* floats : {&empty.logprobs, &empty.raw_logprobs, &empty.entropy, &empty.draft_logprobs}) floats->clear();
  empty.token_ids.clear();
  empty.token_source.clear();
  empty.weight_spans.clear();
  empty.pending_drafts = 0;
  const GenerateRequest resumed =
      Parse(ResumeOf(message, {HandleOf(message, CutSample(request, 5)), HandleOf(message, empty), HandleOf(message, CutSample(request, 3))}));
  ASSERT_EQ(resumed.resume.size(), 3u);
  EXPECT_EQ(resumed.num_samples, 3);
  EXPECT_EQ(resumed.resume[0].sample_index, 1);
  EXPECT_TRUE(resumed.resume[0].token_ids.empty());
  EXPECT_EQ(resumed.resume[1].sample_index, 3);
  EXPECT_EQ(resumed.resume[2].sample_index, 5);
}

// Whatever the defaults have become, here or on another replica, the sample goes on as it began.
TEST(ResumeHandle, UnsetParametersAreTheHandles) {
  v1::GenerateRequest message = ValidRequest();
  const std::string handle = HandleOf(message, CutSample(Parse(message), 0));
  RequestRules other = ResumeRules();
  other.default_mode = SpeculationMode::kOff;
  other.default_num_draft_tokens = 5;
  other.max_model_len = 1000;
  const GenerateRequest resumed = Parse(ResumeOf(message, {handle}), other);
  EXPECT_EQ(resumed.speculation.mode, SpeculationMode::kRejection);
  EXPECT_EQ(resumed.speculation.num_draft_tokens, 3);
  EXPECT_EQ(resumed.stopping.max_new_tokens, 60);
  EXPECT_EQ(resumed.sampling.seed, 77u);

  // The prompt alone is enough; what is set again must be the same.
  const v1::GenerateRequest detailed = DetailedRequest();
  const GenerateRequest before = Parse(detailed);
  const GenerateRequest after = Parse(ResumeOf(ValidRequest(), {HandleOf(detailed, CutSample(before, 0))}), other);
  EXPECT_TRUE(CheckSameParams(ResolvedParams(after), ResolvedParams(before)).ok());
  EXPECT_EQ(after.stopping.stop_token_ids, before.stopping.stop_token_ids);
  EXPECT_EQ(after.stopping.stop_strings, before.stopping.stop_strings);
  EXPECT_TRUE(after.output.spec_detail);
}

// A number of drafts beside mode OFF counts for nothing, then as now.
TEST(ResumeHandle, ParametersThatCountForNothingDoNotMatter) {
  v1::GenerateRequest message = ValidRequest();
  message.mutable_speculation()->set_mode(v1::SpeculationParams::OFF);
  message.mutable_speculation()->set_num_draft_tokens(4);
  const std::string handle = HandleOf(message, CutSample(Parse(message), 0));
  EXPECT_EQ(Parse(ResumeOf(message, {handle})).speculation.num_draft_tokens, 0);
}

TEST(ResumeHandle, EveryParameterMustBeAsItWas) {
  const v1::GenerateRequest message = DetailedRequest();
  const std::string handle = HandleOf(message, CutSample(Parse(message), 0));
  const std::vector<std::pair<const char*, std::function<void(v1::GenerateRequest*)>>> changes = {
      {"prompt_token_ids", [](auto* m) { m->set_prompt_token_ids(2, 9); }},
      {"prompt_token_ids", [](auto* m) { m->add_prompt_token_ids(9); }},
      {"sampling.temperature", [](auto* m) { m->mutable_sampling()->set_temperature(0.75f); }},
      {"sampling.top_p", [](auto* m) { m->mutable_sampling()->set_top_p(1.0f); }},
      {"sampling.top_k", [](auto* m) { m->mutable_sampling()->set_top_k(0); }},
      {"sampling.min_p", [](auto* m) { m->mutable_sampling()->set_min_p(0.0f); }},
      {"sampling.seed", [](auto* m) { m->mutable_sampling()->set_seed(78); }},
      {"stopping.max_new_tokens", [](auto* m) { m->mutable_stopping()->set_max_new_tokens(41); }},
      {"stopping.min_new_tokens", [](auto* m) { m->mutable_stopping()->set_min_new_tokens(0); }},
      {"stopping.stop_token_ids", [](auto* m) { m->mutable_stopping()->set_stop_token_ids(0, 12); }},
      {"stopping.stop", [](auto* m) { m->mutable_stopping()->set_stop(0, std::string(256, 'x')); }},
      {"stopping.stop", [](auto* m) { m->mutable_stopping()->add_stop("more"); }},
      {"stopping.ignore_eos", [](auto* m) { m->mutable_stopping()->set_ignore_eos(false); }},
      {"speculation.mode", [](auto* m) { m->mutable_speculation()->set_mode(v1::SpeculationParams::REJECTION); }},
      {"speculation.num_draft_tokens", [](auto* m) { m->mutable_speculation()->set_num_draft_tokens(1); }},
      {"speculation.synthetic_acceptance", [](auto* m) { m->mutable_speculation()->set_synthetic_acceptance(0.25f); }},
  };
  for (const auto& [field, change] : changes) {
    v1::GenerateRequest changed = message;
    change(&changed);
    EXPECT_EQ(Refusal(ResumeOf(changed, {handle})), Pair("RESUME_MISMATCH", field));
  }
  // An array that was not made from the start cannot be had from here on.
  v1::GenerateRequest bare = ValidRequest();
  const std::string bare_handle = HandleOf(bare, CutSample(Parse(bare), 0));
  for (const char* field : {"logprobs", "raw_logprobs", "entropy", "token_source", "draft_logprobs", "spec_detail"}) {
    v1::GenerateRequest more = bare;
    more.mutable_output()->GetReflection()->SetBool(more.mutable_output(), v1::OutputParams::descriptor()->FindFieldByName(field), true);
    EXPECT_EQ(Refusal(ResumeOf(more, {bare_handle})), Pair("RESUME_MISMATCH", absl::StrCat("output.", field)));
  }
  RequestRules other_model = ResumeRules();
  other_model.model[0] ^= 1;
  EXPECT_EQ(Refusal(ResumeOf(message, {handle}), other_model), Pair("RESUME_MISMATCH", "model"));
  const absl::Status both_values = ToEngine(ResumeOf([&] {
                                              v1::GenerateRequest changed = message;
                                              changed.mutable_sampling()->set_top_k(6);
                                              return changed;
                                            }(), {handle}), ResumeRules(), FixedContext()).status();
  EXPECT_EQ(both_values.message(), "sampling.top_k: 6 is not 5, as resume has it");
}

TEST(ResumeHandle, HandlesAreOfOneGroupAndOfDistinctSamples) {
  const v1::GenerateRequest message = DetailedRequest();
  const GenerateRequest request = Parse(message);
  const std::string first = HandleOf(message, CutSample(request, 0));
  EXPECT_EQ(Refusal(ResumeOf(message, {first, first})), Pair("RESUME_MISMATCH", "resume[1]"));
  v1::GenerateRequest other = message;
  other.mutable_sampling()->set_seed(78);
  EXPECT_EQ(Refusal(ResumeOf(message, {first, HandleOf(other, CutSample(Parse(other), 1))})), Pair("RESUME_MISMATCH", "resume[1]"));
  other = message;
  other.add_prompt_token_ids(5);
  EXPECT_EQ(Refusal(ResumeOf(message, {first, HandleOf(other, CutSample(Parse(other), 1))})), Pair("RESUME_MISMATCH", "resume[1]"));
  v1::GenerateRequest wrong_number = ResumeOf(message, {first});
  wrong_number.set_num_samples(2);
  EXPECT_EQ(Refusal(wrong_number), Pair("INVALID_FIELD", "num_samples"));
  wrong_number.set_num_samples(1);
  EXPECT_EQ(Parse(wrong_number).num_samples, 1);
}

TEST(ResumeHandle, NumberAndBytesAreLimited) {
  v1::GenerateRequest message = ValidRequest();
  for (int i = 0; i <= limits::kNumSamples; ++i) message.add_resume("x");
  EXPECT_EQ(Refusal(message), Pair("INVALID_FIELD", "resume"));
  message.clear_resume();
  message.add_resume(std::string(limits::kResumeBytes + 1, 'x'));
  EXPECT_EQ(Refusal(message), Pair("INVALID_FIELD", "resume"));
}

TEST(ResumeHandle, DamageIsFound) {
  const v1::GenerateRequest message = DetailedRequest();
  const std::string handle = HandleOf(message, CutSample(Parse(message), 0));
  for (size_t i = 0; i < handle.size(); ++i) {
    std::string damaged = handle;
    damaged[i] = static_cast<char>(damaged[i] ^ 0x20);
    EXPECT_EQ(Refusal(ResumeOf(message, {damaged})), Pair("BAD_RESUME_HANDLE", "resume[0]")) << "byte " << i;
    EXPECT_EQ(Refusal(ResumeOf(message, {handle.substr(0, i)})), Pair("BAD_RESUME_HANDLE", "resume[0]")) << "cut at " << i;
  }
  EXPECT_EQ(Refusal(ResumeOf(message, {handle + "x"})), Pair("BAD_RESUME_HANDLE", "resume[0]"));
}

TEST(ResumeHandle, ChecksumsTellEveryByteAndTheLength) {
  for (size_t size = 0; size < 20; ++size) {
    const std::string bytes(size, '\0');
    EXPECT_NE(HandleChecksum(bytes), HandleChecksum(std::string(size + 1, '\0'))) << size;
    for (size_t bit = 0; bit < 8 * size; ++bit) {
      std::string changed = bytes;
      changed[bit / 8] = static_cast<char>(1 << (bit % 8));
      EXPECT_NE(HandleChecksum(bytes), HandleChecksum(changed)) << size << " bytes, bit " << bit;
    }
  }
  EXPECT_NE(HandleChecksum("eight bseven b."), HandleChecksum("seven b.eight b"));  // order counts
}

// The checksum is no secret: what a forged handle says is checked, too.
TEST(ResumeHandle, ForgedSamplesAreChecked) {
  const v1::GenerateRequest message = DetailedRequest();
  const GenerateRequest request = Parse(message);
  const std::vector<std::pair<const char*, std::function<void(v1::SampleResult*)>>> forgeries = {
      {"vocabulary", [](auto* s) { s->set_token_ids(0, 100); }},
      {"max_new_tokens", [](auto* s) { while (s->token_ids_size() < 40) s->add_token_ids(1); }},
      {"logprobs has", [](auto* s) { s->add_logprobs(0); }},
      {"raw_logprobs has", [](auto* s) { s->clear_raw_logprobs(); }},
      {"entropy has", [](auto* s) { s->mutable_entropy()->RemoveLast(); }},
      {"token_source has", [](auto* s) { s->add_token_source(1); }},
      {"draft_logprobs has", [](auto* s) { s->clear_draft_logprobs(); }},
      {"token_source -3", [](auto* s) { s->set_token_source(0, -3); }},
      {"token_source 9", [](auto* s) { s->set_token_source(1, 9); }},
      {"tile", [](auto* s) { s->mutable_weight_spans(1)->set_start(1); }},
      {"tile", [](auto* s) { s->mutable_weight_spans(1)->set_end(9); }},
      {"tile", [](auto* s) { s->mutable_weight_spans()->RemoveLast(); }},
      {"tile", [](auto* s) { s->mutable_weight_spans(0)->set_end(0); }},
      {"step", [](auto* s) { s->mutable_weight_spans(0)->set_step(std::numeric_limits<int64_t>::min()); }},
      {"step", [](auto* s) { s->mutable_weight_spans(1)->set_draft_step(std::numeric_limits<int64_t>::max()); }},
      {"label", [](auto* s) { s->mutable_weight_spans(1)->set_label(std::string(limits::kWeightLabelBytes + 1, 'x')); }},
      {"sample_index", [](auto* s) { s->set_sample_index(-1); }},
      {"sample_index", [](auto* s) { s->set_sample_index(1024); }},
      {"seed", [](auto* s) { s->set_seed_used(1); }},
      {"position", [](auto* s) { s->mutable_spec()->add_drafted_per_pos(1); }},
      {"position", [](auto* s) { s->mutable_spec()->clear_accepted_per_pos(); }},
      {"position", [](auto* s) { s->mutable_spec()->clear_overlap_per_pos(); }},
      {"spec", [](auto* s) { s->mutable_spec()->set_num_spec_steps(-1); }},
      {"spec", [](auto* s) { s->mutable_spec()->set_num_trimmed_tokens(std::numeric_limits<int32_t>::max()); }},
      {"spec", [](auto* s) { s->mutable_spec()->set_drafted_per_pos(1, -1); }},
      {"spec", [](auto* s) { s->mutable_spec()->set_accepted_per_pos(0, -1); }},
      {"overlap", [](auto* s) { s->mutable_spec()->set_overlap_per_pos(0, std::nan("")); }},
      {"overlap", [](auto* s) { s->mutable_spec()->set_overlap_per_pos(0, -0.5); }},
      {"usage", [](auto* s) { s->mutable_usage()->set_prompt_tokens(5); }},
      {"usage", [](auto* s) { s->mutable_usage()->set_completion_tokens(9); }},
      {"cached_tokens", [](auto* s) { s->mutable_usage()->set_cached_tokens(5); }},
      {"preemptions", [](auto* s) { s->mutable_usage()->set_preemptions(-1); }},
      {"recomputed_tokens", [](auto* s) { s->mutable_usage()->set_recomputed_tokens(-1); }},
  };
  const ResumeOrigin origin = MakeResumeOrigin(ResumeRules().model, request.prompt);
  const v1::SampleResult honest = ToProto(CutSample(request, 0), ResolvedParams(request));
  for (const auto& [fault, forge] : forgeries) {
    v1::SampleResult sample = honest;
    forge(&sample);
    const std::string handle = EncodeResumeHandle(origin, ResolvedParams(request), sample, 0);
    const absl::Status status = ToEngine(ResumeOf(message, {handle}), ResumeRules(), FixedContext()).status();
    EXPECT_EQ(ErrorReason(status), "BAD_RESUME_HANDLE") << fault << ": " << status;
    EXPECT_TRUE(absl::StrContains(status.message(), fault)) << fault << ": " << status;
  }
  for (const int32_t pending : {3, 9, -1}) {
    const std::string handle = EncodeResumeHandle(origin, ResolvedParams(request), honest, pending);
    EXPECT_EQ(Refusal(ResumeOf(message, {handle})), Pair("BAD_RESUME_HANDLE", "resume[0]")) << pending;
  }
  // Parameters out of range are refused as they would be in the request.
  v1::GenerateRequest params = ResolvedParams(request);
  params.mutable_sampling()->set_top_p(7.0f);
  v1::GenerateRequest bare = ValidRequest();
  EXPECT_EQ(Refusal(ResumeOf(bare, {EncodeResumeHandle(origin, params, honest, 0)})), Pair("INVALID_FIELD", "sampling.top_p"));
  params = ResolvedParams(request);
  params.mutable_stopping()->clear_max_new_tokens();
  EXPECT_EQ(Refusal(ResumeOf(bare, {EncodeResumeHandle(origin, params, honest, 0)})), Pair("RESUME_MISMATCH", "stopping.max_new_tokens"));
}

TEST(ResumeHandle, OnlySamplesThatWereCutShortCanGoOn) {
  for (int reason = 0; reason < kNumFinishReasons; ++reason) {
    const auto finish = static_cast<FinishReason>(reason);
    const bool expected = finish == FinishReason::kAborted || finish == FinishReason::kDrained || finish == FinishReason::kDeadline ||
                          finish == FinishReason::kSuperseded || finish == FinishReason::kWeightPolicy;
    EXPECT_EQ(IsCutShort(finish), expected) << reason;
  }
}

TEST(ResumeHandle, ModelsOfOtherDimensionsHaveAnotherHash) {
  ModelConfig config;
  config.vocab_size = 100;
  config.hidden_size = 8;
  const auto hash = ModelHash(config);
  EXPECT_EQ(hash, ModelHash(config));
  config.hidden_size = 9;
  EXPECT_NE(hash, ModelHash(config));
}

}  // namespace
}  // namespace bebop
