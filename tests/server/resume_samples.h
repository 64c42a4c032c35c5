// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <string>

#include "server/resume_handle.h"
#include "server/translation.h"
#include "tests/server/test_rules.h"

namespace bebop::test {

inline RequestRules ResumeRules() {
  RequestRules rules = SmallRules();
  rules.model = {1, 2, 3, 4, 5, 6, 7, 8};
  return rules;
}

// Sets every parameter to something other than its default.
inline v1::GenerateRequest DetailedRequest() {
  v1::GenerateRequest message = ValidRequest();
  message.mutable_sampling()->set_temperature(0.5f);
  message.mutable_sampling()->set_top_p(0.9f);
  message.mutable_sampling()->set_top_k(5);
  message.mutable_sampling()->set_min_p(0.1f);
  message.mutable_stopping()->set_max_new_tokens(40);
  message.mutable_stopping()->set_min_new_tokens(2);
  message.mutable_stopping()->add_stop_token_ids(11);
  message.mutable_stopping()->add_stop("end");
  message.mutable_stopping()->set_ignore_eos(true);
  auto* output = message.mutable_output();
  output->set_logprobs(true);
  output->set_raw_logprobs(true);
  output->set_entropy(true);
  output->set_token_source(true);
  output->set_draft_logprobs(true);
  output->set_spec_detail(true);
  message.mutable_speculation()->set_mode(v1::SpeculationParams::COUPLED);
  message.mutable_speculation()->set_num_draft_tokens(2);
  message.mutable_speculation()->set_synthetic_acceptance(0.5f);
  return message;
}

// A sample of `request` that was cut short after three tokens.
inline SampleResult CutSample(const GenerateRequest& request, int32_t index) {
  SampleResult sample;
  sample.sample_index = index;
  sample.seed_used = request.sampling.seed;
  sample.token_ids = {7, 8, 9};
  if (request.output.logprobs) sample.logprobs = {-1.0f, -2.0f, -3.0f};
  if (request.output.raw_logprobs) sample.raw_logprobs = {-1.5f, -2.5f, -3.5f};
  if (request.output.entropy) sample.entropy = {0.25f, 0.5f, 0.75f};
  if (request.output.token_source) sample.token_source = {0, 1, -1};
  if (request.output.draft_logprobs) sample.draft_logprobs = {std::nanf(""), -0.5f, -0.25f};
  sample.finish = FinishReason::kAborted;
  sample.abort_epoch = 4;
  sample.weight_spans = {{.target_step = 5, .draft_step = 4, .label = "five", .begin = 0, .end = 2},
                         {.target_step = 6, .draft_step = 6, .label = "", .begin = 2, .end = 3}};
  sample.kv_mixed = true;
  sample.prompt_tokens = static_cast<int32_t>(request.prompt.size());
  sample.cached_tokens = 1;
  sample.preemptions = 2;
  sample.recomputed_tokens = 9;
  if (request.speculation.num_draft_tokens >= 2) {
    sample.pending_drafts = 2;
    sample.spec.num_spec_steps = 2;
    sample.spec.num_draft_tokens = 4;
    sample.spec.num_accepted_draft_tokens = 1;
    sample.spec.num_trimmed_tokens = 0;
    sample.spec.drafted_per_pos = {2, 1};
    sample.spec.accepted_per_pos = {1, 0};
    if (request.output.spec_detail) sample.spec.overlap_per_pos = {1.25, 0.5};
  }
  return sample;
}

// The handle that the server sends along with `sample` of the request `message`.
inline std::string HandleOf(const v1::GenerateRequest& message, const SampleResult& sample) {
  const auto request = ToEngine(message, ResumeRules(), FixedContext());
  const v1::GenerateRequest params = ResolvedParams(*request);
  return EncodeResumeHandle(MakeResumeOrigin(ResumeRules().model, request->prompt), params, ToProto(sample, params), sample.pending_drafts);
}

}  // namespace bebop::test
