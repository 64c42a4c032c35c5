// SPDX-License-Identifier: Apache-2.0
// Bytes -> resume handle -> request: whatever comes in, a status comes out, and what passes is a sample that the engine can go on with.
// The first byte says whether the rest is the handle as it came (0), is given magic and checksum (1), or is given origin, too (2): otherwise
// nothing random would get past the checksum.
#include <algorithm>
#include <cstdint>
#include <string>

#include "kernels/common/check.h"
#include "server/limits.h"
#include "server/resume_handle.h"
#include "server/status_details.h"
#include "tests/server/resume_samples.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace bebop;        // NOLINT: a single function
  using namespace bebop::test;  // NOLINT
  if (size < 1) return 0;
  std::string handle(reinterpret_cast<const char*>(data) + 1, size - 1);
  const RequestRules rules = ResumeRules();
  v1::GenerateRequest message = ValidRequest();
  if (data[0] % 3 == 2) {
    const ResumeOrigin origin = MakeResumeOrigin(rules.model, {message.prompt_token_ids().begin(), message.prompt_token_ids().end()});
    handle.resize(std::max(handle.size(), origin.model.size() + origin.prompt.size()));
    std::copy(origin.model.begin(), origin.model.end(), handle.begin());
    std::copy(origin.prompt.begin(), origin.prompt.end(), handle.begin() + static_cast<int>(origin.model.size()));
  }
  if (data[0] % 3 > 0) {
    std::string head = "BBR1";
    const uint64_t checksum = HandleChecksum(handle);
    for (int shift = 0; shift < 64; shift += 8) head.push_back(static_cast<char>(checksum >> shift));
    handle = head + handle;
  }
  message.add_resume(handle);
  const auto request = ToEngine(message, rules, FixedContext());
  if (!request.ok()) {
    BEBOP_CHECK(!ErrorReason(request.status()).empty());
    BEBOP_CHECK(request.status().message().size() < 1024);
    return 0;
  }
  BEBOP_CHECK(request->num_samples == 1 && request->resume.size() == 1);
  const SampleResult& sample = request->resume[0];
  const size_t num_tokens = sample.token_ids.size();
  BEBOP_CHECK(num_tokens < static_cast<size_t>(request->stopping.max_new_tokens));
  for (const uint32_t id : sample.token_ids) BEBOP_CHECK(id < 100);
  BEBOP_CHECK(sample.logprobs.size() == (request->output.logprobs ? num_tokens : 0));
  BEBOP_CHECK(sample.draft_logprobs.size() == (request->output.draft_logprobs ? num_tokens : 0));
  BEBOP_CHECK(sample.token_source.size() == (request->output.token_source ? num_tokens : 0));
  BEBOP_CHECK(sample.sample_index >= 0 && sample.sample_index < limits::kNumSamples);
  BEBOP_CHECK(sample.seed_used == request->sampling.seed);
  BEBOP_CHECK(sample.pending_drafts >= 0 && sample.pending_drafts <= request->speculation.num_draft_tokens);
  int32_t end = 0;
  for (const WeightSpan& span : sample.weight_spans) {
    BEBOP_CHECK(span.begin == end && span.end > span.begin);
    end = span.end;
  }
  BEBOP_CHECK(static_cast<size_t>(end) == num_tokens);
  // What passed can be made into a handle again, which passes again.
  SampleResult cut = sample;
  cut.finish = FinishReason::kAborted;
  v1::GenerateRequest again = ValidRequest();
  const v1::GenerateRequest params = ResolvedParams(*request);
  again.add_resume(EncodeResumeHandle(MakeResumeOrigin(rules.model, request->prompt), params, ToProto(cut, params), cut.pending_drafts));
  BEBOP_CHECK(ToEngine(again, rules, FixedContext()).ok());
  return 0;
}
