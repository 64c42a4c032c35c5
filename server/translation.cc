// SPDX-License-Identifier: Apache-2.0
#include "server/translation.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <optional>
#include <utility>

#include "absl/hash/hash.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/io/zero_copy_stream_impl_lite.h"
#include "google/protobuf/unknown_field_set.h"
#include "kernels/common/check.h"
#include "server/limits.h"
#include "server/resume_handle.h"
#include "server/status_details.h"

namespace bebop {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

// Path of the first unknown field in `message` or below it, e.g. "sampling.#99"; empty when there is none.
std::string FindUnknownField(const Message& message) {
  const auto* reflection = message.GetReflection();
  const auto& unknown = reflection->GetUnknownFields(message);
  if (!unknown.empty()) return absl::StrCat("#", unknown.field(0).number());
  std::vector<const FieldDescriptor*> fields;
  reflection->ListFields(message, &fields);
  for (const FieldDescriptor* field : fields) {
    if (field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) continue;
    const int count = field->is_repeated() ? reflection->FieldSize(message, field) : 1;
    for (int i = 0; i < count; ++i) {
      const Message& child =
          field->is_repeated() ? reflection->GetRepeatedMessage(message, field, i) : reflection->GetMessage(message, field);
      const std::string path = FindUnknownField(child);
      if (path.empty()) continue;
      return field->is_repeated() ? absl::StrCat(field->name(), "[", i, "].", path) : absl::StrCat(field->name(), ".", path);
    }
  }
  return "";
}

absl::Status CheckUnknown(const Message& message, const RequestRules& rules) {
  return rules.allow_unknown_fields ? absl::OkStatus() : CheckKnownFields(message);
}

// The comparison is written so that NaN is out of every range.
template <typename T>
absl::Status CheckRange(absl::string_view field, T value, T low, T high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return InvalidField(field, absl::StrCat(value), absl::StrCat("in [", low, ", ", high, "]"));
}

absl::Status CheckCount(absl::string_view field, int64_t count, int64_t low, int64_t high, absl::string_view unit) {
  if (count >= low && count <= high) return absl::OkStatus();
  return InvalidField(field, absl::StrCat(count, " ", unit), absl::StrCat("in [", low, ", ", high, "] ", unit));
}

template <typename Ids>
absl::Status CheckTokenIds(absl::string_view field, const Ids& ids, int32_t vocab_size) {
  for (int i = 0; i < ids.size(); ++i) {
    if (ids[i] >= static_cast<uint32_t>(vocab_size)) {
      return InvalidField(absl::StrCat(field, "[", i, "]"), absl::StrCat(ids[i]), absl::StrCat("below the vocabulary size ", vocab_size));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckTemperature(absl::string_view field, float value, bool zero_is_greedy) {
  if (value >= limits::kMinTemperature && value <= limits::kMaxTemperature) return absl::OkStatus();
  if (zero_is_greedy && value == 0.0f) return absl::OkStatus();
  return InvalidField(field, absl::StrCat(value),
                      absl::StrCat(zero_is_greedy ? "0 or in [" : "in [", limits::kMinTemperature, ", ", limits::kMaxTemperature, "]"));
}

absl::Status CheckRequestId(absl::string_view field, absl::string_view id) {
  if (IsValidRequestId(id)) return absl::OkStatus();
  return InvalidField(field, absl::StrCat(id.size(), " bytes"), "1..64 bytes of [A-Za-z0-9._:-]");
}

absl::Status NeedsTokenizer(absl::string_view field) {
  return DetailedError(absl::StatusCode::kFailedPrecondition, "NO_TOKENIZER",
                       absl::StrCat(field, " needs a tokenizer, and the served checkpoint has no tokenizer.json"),
                       {{"field", std::string(field)}});
}

absl::Status NeedsDraftLayer(absl::string_view field) {
  return DetailedError(absl::StatusCode::kUnimplemented, "NO_DRAFT_LAYER",
                       absl::StrCat(field, " needs MTP weights, and the served model has no mtp.* tensors"),
                       {{"field", std::string(field)}});
}

absl::StatusOr<SamplingParams> ParseSampling(const v1::SamplingParams& message, uint64_t fresh_seed) {
  SamplingParams sampling;
  if (message.has_temperature()) {
    BEBOP_RETURN_IF_ERROR(CheckTemperature("sampling.temperature", message.temperature(), /*zero_is_greedy=*/true));
    sampling.temperature = message.temperature();
  }
  if (message.has_top_p()) {
    if (!(message.top_p() > 0.0f && message.top_p() <= 1.0f)) {
      return InvalidField("sampling.top_p", absl::StrCat(message.top_p()), "in (0, 1]");
    }
    sampling.top_p = message.top_p();
  }
  if (message.has_top_k()) {
    if (message.top_k() < 0) return InvalidField("sampling.top_k", absl::StrCat(message.top_k()), ">= 0");
    sampling.top_k = message.top_k();
  }
  if (message.has_min_p()) {
    BEBOP_RETURN_IF_ERROR(CheckRange("sampling.min_p", message.min_p(), 0.0f, 1.0f));
    sampling.min_p = message.min_p();
  }
  sampling.seed = message.has_seed() ? message.seed() : fresh_seed;
  return sampling;
}

absl::StatusOr<StoppingParams> ParseStopping(const v1::StoppingParams& message, int32_t prompt_tokens, const RequestRules& rules) {
  StoppingParams stopping;
  const int32_t room = rules.max_model_len - prompt_tokens;  // >= 1: the prompt has been checked
  stopping.max_new_tokens = room;
  if (message.has_max_new_tokens()) {
    if (message.max_new_tokens() < 1 || message.max_new_tokens() > room) {
      return InvalidField("stopping.max_new_tokens", absl::StrCat(message.max_new_tokens()),
                          absl::StrCat("in [1, ", room, "] (model length ", rules.max_model_len, " - ", prompt_tokens, " prompt tokens)"));
    }
    stopping.max_new_tokens = message.max_new_tokens();
  }
  if (message.has_min_new_tokens()) {
    BEBOP_RETURN_IF_ERROR(CheckRange("stopping.min_new_tokens", message.min_new_tokens(), 0, stopping.max_new_tokens));
    stopping.min_new_tokens = message.min_new_tokens();
  }
  BEBOP_RETURN_IF_ERROR(CheckCount("stopping.stop_token_ids", message.stop_token_ids_size(), 0, limits::kStopTokenIds, "ids"));
  BEBOP_RETURN_IF_ERROR(CheckTokenIds("stopping.stop_token_ids", message.stop_token_ids(), rules.vocab_size));
  stopping.stop_token_ids.assign(message.stop_token_ids().begin(), message.stop_token_ids().end());
  BEBOP_RETURN_IF_ERROR(CheckCount("stopping.stop", message.stop_size(), 0, limits::kStopStrings, "strings"));
  for (int i = 0; i < message.stop_size(); ++i) {
    BEBOP_RETURN_IF_ERROR(CheckCount(absl::StrCat("stopping.stop[", i, "]"), static_cast<int64_t>(message.stop(i).size()), 1,
                                     limits::kStopStringBytes, "bytes"));
  }
  if (message.stop_size() > 0 && !rules.has_tokenizer) return NeedsTokenizer("stopping.stop");
  stopping.stop_strings.assign(message.stop().begin(), message.stop().end());
  stopping.ignore_eos = message.ignore_eos();
  return stopping;
}

absl::StatusOr<SpeculationParams> ParseSpeculation(const v1::SpeculationParams& message, const RequestRules& rules) {
  SpeculationParams speculation;
  switch (message.mode()) {
    case v1::SpeculationParams::UNSPECIFIED: speculation.mode = rules.default_mode; break;
    case v1::SpeculationParams::OFF: speculation.mode = SpeculationMode::kOff; break;
    case v1::SpeculationParams::TARGET_ONLY: speculation.mode = SpeculationMode::kTargetOnly; break;
    case v1::SpeculationParams::REJECTION: speculation.mode = SpeculationMode::kRejection; break;
    case v1::SpeculationParams::COUPLED: speculation.mode = SpeculationMode::kCoupled; break;
    default:
      return InvalidField("speculation.mode", absl::StrCat(static_cast<int>(message.mode())), "OFF, TARGET_ONLY, REJECTION or COUPLED");
  }
  if (speculation.mode != SpeculationMode::kOff && !rules.has_mtp) return NeedsDraftLayer("speculation.mode");
  // Out of range is refused in OFF, too, so that a bad value does not depend on the mode.
  const int32_t most_drafts = std::min(rules.max_draft_tokens, kMaxDraftTokens);
  if (message.has_num_draft_tokens()) {
    BEBOP_RETURN_IF_ERROR(CheckRange("speculation.num_draft_tokens", message.num_draft_tokens(), 0, rules.has_mtp ? most_drafts : kMaxDraftTokens));
  }
  if (speculation.mode != SpeculationMode::kOff) {
    speculation.num_draft_tokens =
        message.has_num_draft_tokens() ? message.num_draft_tokens() : std::min(rules.default_num_draft_tokens, most_drafts);
  }
  if (message.has_synthetic_acceptance()) {
    BEBOP_RETURN_IF_ERROR(CheckRange("speculation.synthetic_acceptance", message.synthetic_acceptance(), 0.0f, 1.0f));
    if (speculation.mode == SpeculationMode::kOff) {
      return InvalidField("speculation.synthetic_acceptance", absl::StrCat(message.synthetic_acceptance()), "possible with mode OFF");
    }
    if (!rules.allow_synthetic_acceptance) {
      return DetailedError(absl::StatusCode::kFailedPrecondition, "SYNTHETIC_ACCEPTANCE_DISABLED",
                           "speculation.synthetic_acceptance is not lossless; this server allows it only with --load-format dummy or "
                           "--allow-synthetic-acceptance",
                           {{"field", "speculation.synthetic_acceptance"}});
    }
    speculation.synthetic_acceptance = message.synthetic_acceptance();
  }
  return speculation;
}

absl::StatusOr<WeightPolicy> ParseWeights(const v1::WeightParams& message) {
  WeightPolicy policy;
  if (message.has_min_step()) {
    policy.min_step = message.min_step();
    policy.refuse_if_behind = !message.wait_for_step();
  }
  if (message.has_max_step_spread()) {
    if (message.max_step_spread() < 0) return InvalidField("weights.max_step_spread", absl::StrCat(message.max_step_spread()), ">= 0");
    policy.max_step_spread = message.max_step_spread();
  }
  switch (message.on_update()) {
    case v1::WeightParams::UNSPECIFIED: policy.on_update = OnUpdate::kAsTheUpdateSays; break;
    case v1::WeightParams::CONTINUE: policy.on_update = OnUpdate::kContinue; break;
    case v1::WeightParams::RECOMPUTE: policy.on_update = OnUpdate::kRecompute; break;
    case v1::WeightParams::STOP: policy.on_update = OnUpdate::kStop; break;
    default: return InvalidField("weights.on_update", absl::StrCat(static_cast<int>(message.on_update())), "CONTINUE, RECOMPUTE or STOP");
  }
  return policy;
}

OutputParams ParseOutput(const v1::OutputParams& message) {
  return {.logprobs = message.logprobs(),
          .raw_logprobs = message.raw_logprobs(),
          .entropy = message.entropy(),
          .token_source = message.token_source(),
          .draft_logprobs = message.draft_logprobs(),
          .spec_detail = message.spec_detail()};
}

// The parameters of `message`, and for what it leaves unset those of `before`.
v1::GenerateRequest FillUnset(const v1::GenerateRequest& message, const v1::GenerateRequest& before) {
  v1::GenerateRequest params;
  *params.mutable_sampling() = before.sampling();
  *params.mutable_stopping() = before.stopping();
  *params.mutable_output() = before.output();
  *params.mutable_speculation() = before.speculation();
  if (message.stopping().stop_token_ids_size() > 0) params.mutable_stopping()->clear_stop_token_ids();
  if (message.stopping().stop_size() > 0) params.mutable_stopping()->clear_stop();
  params.mutable_sampling()->MergeFrom(message.sampling());
  params.mutable_stopping()->MergeFrom(message.stopping());
  params.mutable_output()->MergeFrom(message.output());
  params.mutable_speculation()->MergeFrom(message.speculation());
  return params;
}

// Sampling, stopping, output and speculation of `params`.
absl::Status ParseParams(const v1::GenerateRequest& params, const RequestRules& rules, uint64_t fresh_seed, GenerateRequest* request) {
  const auto prompt_tokens = static_cast<int32_t>(request->prompt.size());
  BEBOP_ASSIGN_OR_RETURN(request->sampling, ParseSampling(params.sampling(), fresh_seed));
  BEBOP_ASSIGN_OR_RETURN(request->stopping, ParseStopping(params.stopping(), prompt_tokens, rules));
  BEBOP_ASSIGN_OR_RETURN(request->speculation, ParseSpeculation(params.speculation(), rules));
  request->output = ParseOutput(params.output());
  return absl::OkStatus();
}

// Everything of `request` that follows from the resume handles. Its prompt is there already.
absl::Status ParseResume(const v1::GenerateRequest& message, const RequestRules& rules, GenerateRequest* request) {
  BEBOP_ASSIGN_OR_RETURN(const std::vector<ResumeHandle> handles, DecodeResumeHandles(message));
  const auto num_handles = static_cast<int32_t>(handles.size());
  if (message.has_num_samples() && message.num_samples() != num_handles) {
    return InvalidField("num_samples", absl::StrCat(message.num_samples()), absl::StrCat("the number of resume handles, ", num_handles));
  }
  request->num_samples = num_handles;
  const ResumeHandle& first = handles.front();
  const ResumeOrigin origin = MakeResumeOrigin(rules.model, request->prompt);
  if (first.origin.model != origin.model) return ResumeMismatch("model", "the dimensions of the served one", "those of the model of the handles");
  if (first.origin.prompt != origin.prompt) {
    return ResumeMismatch("prompt_token_ids", absl::StrCat(request->prompt.size(), " ids"),
                          absl::StrCat("the prompt of ", first.sample.usage().prompt_tokens(), " ids"));
  }
  BEBOP_RETURN_IF_ERROR(ParseParams(FillUnset(message, first.params), rules, first.params.sampling().seed(), request));
  BEBOP_RETURN_IF_ERROR(CheckSameParams(ResolvedParams(*request), first.params));
  for (size_t i = 0; i < handles.size(); ++i) {
    BEBOP_ASSIGN_OR_RETURN(SampleResult sample, ToEngine(absl::StrCat("resume[", i, "]"), handles[i], *request, rules.vocab_size));
    request->resume.push_back(std::move(sample));
  }
  std::sort(request->resume.begin(), request->resume.end(),
            [](const SampleResult& a, const SampleResult& b) { return a.sample_index < b.sample_index; });
  return absl::OkStatus();
}

template <typename Tags>
absl::StatusOr<SleepTags> ParseTags(const Tags& names) {
  BEBOP_RETURN_IF_ERROR(CheckCount("tags", names.size(), 0, limits::kSleepTags, "tags"));
  if (names.empty()) return SleepTags{.weights = true, .kv_cache = true};
  SleepTags tags;
  for (int i = 0; i < names.size(); ++i) {
    if (names[i] == "weights") {
      tags.weights = true;
    } else if (names[i] == "kv_cache") {
      tags.kv_cache = true;
    } else {
      return InvalidField(absl::StrCat("tags[", i, "]"), names[i].size() <= 16 ? names[i] : absl::StrCat(names[i].size(), " bytes"),
                          "weights or kv_cache");
    }
  }
  return tags;
}

v1::Finish::Reason ToProto(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop: return v1::Finish::STOP;
    case FinishReason::kLength: return v1::Finish::LENGTH;
    case FinishReason::kAborted: return v1::Finish::ABORTED;
    case FinishReason::kDrained: return v1::Finish::DRAINED;
    case FinishReason::kNonFinite: return v1::Finish::NON_FINITE;
    case FinishReason::kDeadline: return v1::Finish::TIME_BUDGET;
    case FinishReason::kSuperseded: return v1::Finish::SUPERSEDED;
    case FinishReason::kWeightPolicy: return v1::Finish::WEIGHT_POLICY;
    case FinishReason::kNone:
    case FinishReason::kFailed: break;
  }
  BEBOP_CHECK(false);  // samples without data are not translated
}

// Appends values [begin, ...) of an engine array; an array that was not asked for is empty and stays so.
template <typename T, typename Field>
void AppendFrom(const std::vector<T>& values, size_t begin, Field* field) {
  if (begin < values.size()) field->Add(values.begin() + static_cast<std::ptrdiff_t>(begin), values.end());
}

template <typename Target>
void SetTokenArrays(const SampleResult& sample, size_t begin, Target* target) {
  AppendFrom(sample.token_ids, begin, target->mutable_token_ids());
  AppendFrom(sample.logprobs, begin, target->mutable_logprobs());
  AppendFrom(sample.raw_logprobs, begin, target->mutable_raw_logprobs());
  AppendFrom(sample.entropy, begin, target->mutable_entropy());
  AppendFrom(sample.token_source, begin, target->mutable_token_source());
  AppendFrom(sample.draft_logprobs, begin, target->mutable_draft_logprobs());
}

}  // namespace

bool IsValidRequestId(absl::string_view id) {
  return !id.empty() && id.size() <= static_cast<size_t>(limits::kRequestIdBytes) && std::all_of(id.begin(), id.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == ':' || c == '-';
  });
}

absl::Status CheckKnownFields(const Message& message) {
  const std::string path = FindUnknownField(message);
  if (path.empty()) return absl::OkStatus();
  return DetailedError(absl::StatusCode::kInvalidArgument, "UNKNOWN_FIELD",
                       absl::StrCat(message.GetDescriptor()->name(), ": this server does not know field ", path,
                                    " (number after #); --allow-unknown-fields ignores such fields"),
                       {{"field", path}});
}

uint64_t BodyHash(const v1::GenerateRequest& message) {
  v1::GenerateRequest body = message;
  body.clear_request_id();
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    google::protobuf::io::CodedOutputStream coded(&stream);
    coded.SetSerializationDeterministic(true);
    body.SerializeToCodedStream(&coded);
  }
  return absl::HashOf(bytes);
}

absl::StatusOr<GenerateRequest> ToEngine(const v1::GenerateRequest& message, const RequestRules& rules, const RequestContext& context) {
  BEBOP_RETURN_IF_ERROR(CheckUnknown(message, rules));
  GenerateRequest request;
  if (message.request_id().empty()) {
    request.request_id = context.fresh_request_id;
  } else {
    BEBOP_RETURN_IF_ERROR(CheckRequestId("request_id", message.request_id()));
    request.request_id = message.request_id();
  }
  request.body_hash = BodyHash(message);

  const int32_t prompt_tokens = message.prompt_token_ids_size();
  if (prompt_tokens < 1 || prompt_tokens >= rules.max_model_len) {
    return InvalidField("prompt_token_ids", absl::StrCat(prompt_tokens, " ids"),
                        absl::StrCat("in [1, ", rules.max_model_len - 1, "] ids (model length ", rules.max_model_len, ")"));
  }
  BEBOP_RETURN_IF_ERROR(CheckTokenIds("prompt_token_ids", message.prompt_token_ids(), rules.vocab_size));
  request.prompt.assign(message.prompt_token_ids().begin(), message.prompt_token_ids().end());

  if (message.has_num_samples()) {
    BEBOP_RETURN_IF_ERROR(CheckRange("num_samples", message.num_samples(), 1, limits::kNumSamples));
    request.num_samples = message.num_samples();
  }
  if (message.resume_size() > 0) {
    BEBOP_RETURN_IF_ERROR(ParseResume(message, rules, &request));
  } else {
    BEBOP_RETURN_IF_ERROR(ParseParams(message, rules, context.fresh_seed, &request));
  }
  BEBOP_ASSIGN_OR_RETURN(request.weights, ParseWeights(message.weights()));
  request.stream_tokens = message.output().stream_tokens();
  request.detach = message.detach();
  request.priority = message.priority();
  request.deadline = context.deadline;
  return request;
}

absl::StatusOr<std::vector<ScoreRequest>> ToEngine(const v1::ScoreRequest& message, const RequestRules& rules,
                                                   const RequestContext& context) {
  BEBOP_RETURN_IF_ERROR(CheckUnknown(message, rules));
  BEBOP_RETURN_IF_ERROR(CheckCount("sequences", message.sequences_size(), 1, limits::kScoreSequences, "sequences"));
  int64_t total_tokens = 0;
  int32_t shortest = std::numeric_limits<int32_t>::max();
  for (int i = 0; i < message.sequences_size(); ++i) {
    const std::string field = absl::StrCat("sequences[", i, "].token_ids");
    const auto& ids = message.sequences(i).token_ids();
    BEBOP_RETURN_IF_ERROR(CheckCount(field, ids.size(), 1, rules.max_model_len, "ids"));
    BEBOP_RETURN_IF_ERROR(CheckTokenIds(field, ids, rules.vocab_size));
    total_tokens += ids.size();
    shortest = std::min(shortest, ids.size());
  }
  BEBOP_RETURN_IF_ERROR(CheckCount("sequences", total_tokens, 1, limits::kScoreTokens, "tokens in all sequences"));
  BEBOP_RETURN_IF_ERROR(CheckRange("score_start", message.score_start(), 0, shortest - 1));

  ScoreRequest common;
  common.score_start = message.score_start();
  if (message.has_temperature()) {
    BEBOP_RETURN_IF_ERROR(CheckTemperature("temperature", message.temperature(), /*zero_is_greedy=*/false));
    common.temperature = message.temperature();
  }
  BEBOP_RETURN_IF_ERROR(CheckRange("top_logprobs", message.top_logprobs(), 0, std::min(limits::kTopLogprobs, rules.vocab_size)));
  common.top_logprobs = message.top_logprobs();
  BEBOP_RETURN_IF_ERROR(CheckCount("token_ids_logprob", message.token_ids_logprob_size(), 0, limits::kTokenIdsLogprob, "ids"));
  BEBOP_RETURN_IF_ERROR(CheckTokenIds("token_ids_logprob", message.token_ids_logprob(), rules.vocab_size));
  common.token_ids_logprob.assign(message.token_ids_logprob().begin(), message.token_ids_logprob().end());
  common.entropy = message.entropy();
  BEBOP_RETURN_IF_ERROR(CheckRange("draft_depth", message.draft_depth(), 0,
                                   rules.has_mtp ? std::min(rules.max_draft_tokens, kMaxDraftTokens) : kMaxDraftTokens));
  if (message.draft_depth() > 0 && !rules.has_mtp) return NeedsDraftLayer("draft_depth");
  common.draft_depth = message.draft_depth();
  common.deadline = context.deadline;

  // Bytes of the reply's arrays for one position, so that a small request cannot ask for an endless reply.
  const int64_t position_bytes = 4 * (1 + (common.entropy ? 1 : 0) + 2 * common.top_logprobs +
                                      static_cast<int64_t>(common.token_ids_logprob.size()) + 4 * common.draft_depth);
  BEBOP_RETURN_IF_ERROR(CheckCount("sequences", total_tokens * position_bytes, 0, limits::kScoreReplyBytes, "bytes of reply"));

  std::vector<ScoreRequest> requests(static_cast<size_t>(message.sequences_size()), common);
  for (int i = 0; i < message.sequences_size(); ++i) {
    const auto& ids = message.sequences(i).token_ids();
    requests[static_cast<size_t>(i)].token_ids.assign(ids.begin(), ids.end());
  }
  return requests;
}

absl::Status Validate(const v1::AbortRequest& message, const RequestRules& rules) {
  BEBOP_RETURN_IF_ERROR(CheckUnknown(message, rules));
  BEBOP_RETURN_IF_ERROR(CheckCount("request_ids", message.request_ids_size(), 1, limits::kAbortIds, "ids"));
  for (int i = 0; i < message.request_ids_size(); ++i) {
    BEBOP_RETURN_IF_ERROR(CheckRequestId(absl::StrCat("request_ids[", i, "]"), message.request_ids(i)));
  }
  return absl::OkStatus();
}

absl::Status Validate(const v1::TokenizeRequest& message, const RequestRules& rules) {
  BEBOP_RETURN_IF_ERROR(CheckUnknown(message, rules));
  BEBOP_RETURN_IF_ERROR(CheckCount("text", static_cast<int64_t>(message.text().size()), 0, limits::kTokenizeBytes, "bytes"));
  return rules.has_tokenizer ? absl::OkStatus() : NeedsTokenizer("Tokenize");
}

absl::Status Validate(const v1::DetokenizeRequest& message, const RequestRules& rules, int32_t tokenizer_vocab_size) {
  BEBOP_RETURN_IF_ERROR(CheckUnknown(message, rules));
  BEBOP_RETURN_IF_ERROR(CheckCount("token_ids", message.token_ids_size(), 0, limits::kDetokenizeIds, "ids"));
  if (!rules.has_tokenizer) return NeedsTokenizer("Detokenize");
  // The model may have padding ids beyond the tokenizer's; generation can draw them, so they decode to nothing.
  return CheckTokenIds("token_ids", message.token_ids(), std::max(rules.vocab_size, tokenizer_vocab_size));
}

absl::StatusOr<DefaultSpeculation> ToEngine(const v1::SetSpeculationRequest& message, const RequestRules& rules) {
  BEBOP_RETURN_IF_ERROR(CheckUnknown(message, rules));
  if (message.speculation().has_synthetic_acceptance()) {
    return InvalidField("speculation.synthetic_acceptance", absl::StrCat(message.speculation().synthetic_acceptance()), "a default; requests set it");
  }
  BEBOP_ASSIGN_OR_RETURN(const SpeculationParams parsed, ParseSpeculation(message.speculation(), rules));
  // The number is also for requests that choose a mode, so it is kept while the default mode is OFF.
  return DefaultSpeculation{.mode = parsed.mode,
                            .num_draft_tokens = message.speculation().has_num_draft_tokens() ? message.speculation().num_draft_tokens()
                                                                                            : rules.default_num_draft_tokens};
}

absl::Status Validate(const v1::ResumeGenerationRequest& message, const RequestRules& rules) { return CheckUnknown(message, rules); }

absl::Status Validate(const v1::FlushCacheRequest& message, const RequestRules& rules) { return CheckUnknown(message, rules); }

absl::StatusOr<PauseMode> ToEngine(const v1::PauseGenerationRequest& message, const RequestRules& rules) {
  BEBOP_RETURN_IF_ERROR(CheckUnknown(message, rules));
  switch (message.mode()) {
    case v1::PauseGenerationRequest::UNSPECIFIED:
    case v1::PauseGenerationRequest::KEEP: return PauseMode::kKeep;
    case v1::PauseGenerationRequest::ABORT: return PauseMode::kAbort;
    case v1::PauseGenerationRequest::WAIT: return PauseMode::kWait;
    default: return InvalidField("mode", absl::StrCat(static_cast<int>(message.mode())), "ABORT, WAIT or KEEP");
  }
}

absl::StatusOr<SleepTags> ToEngine(const v1::SleepRequest& message, const RequestRules& rules) {
  BEBOP_RETURN_IF_ERROR(CheckUnknown(message, rules));
  return ParseTags(message.tags());
}

absl::StatusOr<SleepTags> ToEngine(const v1::WakeUpRequest& message, const RequestRules& rules) {
  BEBOP_RETURN_IF_ERROR(CheckUnknown(message, rules));
  return ParseTags(message.tags());
}

absl::StatusOr<absl::Duration> ToEngine(const v1::DrainRequest& message, const RequestRules& rules, absl::Duration fallback) {
  BEBOP_RETURN_IF_ERROR(CheckUnknown(message, rules));
  if (!message.has_deadline_seconds()) return fallback;
  BEBOP_RETURN_IF_ERROR(CheckRange("deadline_seconds", message.deadline_seconds(), 0.0, limits::kDrainSeconds));
  return absl::Seconds(message.deadline_seconds());
}

v1::ControlState MakeControlState(const EngineControl& control, const EngineLoads& loads, const RequestRules& rules) {
  v1::ControlState state;
  state.set_paused(control.paused);
  state.set_draining(control.draining);
  AddTags(control.sleeping, &state);
  state.mutable_speculation()->set_mode(ToProto(rules.default_mode));
  state.mutable_speculation()->set_num_draft_tokens(rules.default_num_draft_tokens);
  state.set_abort_epoch(control.abort_epoch);
  state.set_running_requests(loads.running_requests);
  state.set_waiting_requests(loads.waiting_requests);
  return state;
}

v1::SpeculationParams::Mode ToProto(SpeculationMode mode) {
  switch (mode) {
    case SpeculationMode::kOff: return v1::SpeculationParams::OFF;
    case SpeculationMode::kTargetOnly: return v1::SpeculationParams::TARGET_ONLY;
    case SpeculationMode::kRejection: return v1::SpeculationParams::REJECTION;
    case SpeculationMode::kCoupled: return v1::SpeculationParams::COUPLED;
  }
  BEBOP_CHECK(false);
}

namespace {

// What SpecStats (int32: one sample) and SpecTotals (int64: all samples) have in common.
template <typename Message>
void SetCounts(const SpecCounts& counts, int32_t num_positions, Message* message) {
  BEBOP_CHECK(num_positions >= 0 && num_positions <= kMaxDraftTokens);
  message->set_num_spec_steps(counts.num_spec_steps);
  message->set_num_draft_tokens(counts.num_draft_tokens);
  message->set_num_accepted_draft_tokens(counts.num_accepted_draft_tokens);
  message->set_num_trimmed_tokens(counts.num_trimmed_tokens);
  for (size_t i = 0; i < static_cast<size_t>(num_positions); ++i) {
    message->add_drafted_per_pos(counts.drafted_per_pos[i]);
    message->add_accepted_per_pos(counts.accepted_per_pos[i]);
  }
}

}  // namespace

v1::SpecStats ToProto(const SpecCounts& counts, int32_t num_positions, bool with_overlap) {
  v1::SpecStats stats;
  SetCounts(counts, num_positions, &stats);
  if (with_overlap) stats.mutable_overlap_per_pos()->Add(counts.overlap_per_pos.begin(), counts.overlap_per_pos.begin() + num_positions);
  return stats;
}

namespace {

v1::GenerateRequest MakeParams(const GenerateRequest& request, uint64_t seed, const SpeculationParams& speculation_params) {
  v1::GenerateRequest params;
  v1::SamplingParams* sampling = params.mutable_sampling();
  sampling->set_temperature(request.sampling.temperature);
  sampling->set_top_p(request.sampling.top_p);
  sampling->set_top_k(request.sampling.top_k);
  sampling->set_min_p(request.sampling.min_p);
  sampling->set_seed(seed);
  v1::StoppingParams* stopping = params.mutable_stopping();
  stopping->set_max_new_tokens(request.stopping.max_new_tokens);
  stopping->set_min_new_tokens(request.stopping.min_new_tokens);
  stopping->mutable_stop_token_ids()->Add(request.stopping.stop_token_ids.begin(), request.stopping.stop_token_ids.end());
  for (const std::string& stop : request.stopping.stop_strings) stopping->add_stop(stop);
  stopping->set_ignore_eos(request.stopping.ignore_eos);
  v1::OutputParams* output = params.mutable_output();
  output->set_logprobs(request.output.logprobs);
  output->set_raw_logprobs(request.output.raw_logprobs);
  output->set_entropy(request.output.entropy);
  output->set_token_source(request.output.token_source);
  output->set_draft_logprobs(request.output.draft_logprobs);
  output->set_spec_detail(request.output.spec_detail);
  v1::SpeculationParams* speculation = params.mutable_speculation();
  speculation->set_mode(ToProto(speculation_params.mode));
  speculation->set_num_draft_tokens(speculation_params.num_draft_tokens);
  if (speculation_params.synthetic_acceptance >= 0.0) {
    speculation->set_synthetic_acceptance(static_cast<float>(speculation_params.synthetic_acceptance));
  }
  return params;
}

}  // namespace

v1::GenerateRequest ResolvedParams(const GenerateRequest& request) { return MakeParams(request, request.sampling.seed, request.speculation); }

v1::GenerateRequest AppliedParams(const SampleResult& sample, const GenerateRequest& request) {
  return MakeParams(request, sample.seed_used, sample.speculation);
}

v1::SampleResult ToProto(const SampleResult& sample, const v1::GenerateRequest& params) {
  v1::SampleResult result;
  result.set_sample_index(sample.sample_index);
  result.set_seed_used(sample.seed_used);
  SetTokenArrays(sample, 0, &result);
  v1::Finish* finish = result.mutable_finish();
  finish->set_reason(ToProto(sample.finish));
  if (sample.stop_token_id) finish->set_stop_token_id(*sample.stop_token_id);
  if (sample.stop_string) finish->set_stop_string(*sample.stop_string);

  v1::Usage* usage = result.mutable_usage();
  usage->set_prompt_tokens(sample.prompt_tokens);
  usage->set_cached_tokens(sample.cached_tokens);
  usage->set_completion_tokens(static_cast<int32_t>(sample.token_ids.size()));
  usage->set_preemptions(sample.preemptions);
  usage->set_recomputed_tokens(sample.recomputed_tokens);
  *result.mutable_spec() = ToProto(sample.spec, params.speculation().num_draft_tokens(), params.output().spec_detail());
  for (const WeightSpan& span : sample.weight_spans) {
    v1::WeightSpan* out = result.add_weight_spans();
    out->set_step(span.target_step);
    if (!span.label.empty()) out->set_label(span.label);
    out->set_draft_step(span.draft_step);
    out->set_start(span.begin);
    out->set_end(span.end);
  }
  result.set_kv_mixed(sample.kv_mixed);
  result.set_abort_epoch(sample.abort_epoch);

  v1::Timing* timing = result.mutable_timing();
  timing->set_queue(absl::ToDoubleSeconds(sample.queue_time));
  timing->set_prefill(absl::ToDoubleSeconds(sample.prefill_time));
  timing->set_decode(absl::ToDoubleSeconds(sample.decode_time));
  timing->set_ttft(absl::ToDoubleSeconds(sample.time_to_first_token));
  timing->set_e2e(absl::ToDoubleSeconds(sample.total_time));

  *result.mutable_applied()->mutable_sampling() = params.sampling();
  *result.mutable_applied()->mutable_stopping() = params.stopping();
  *result.mutable_applied()->mutable_speculation() = params.speculation();
  return result;
}

v1::TokenChunk ToProto(const SampleResult& partial, int32_t begin) {
  v1::TokenChunk chunk;
  chunk.set_sample_index(partial.sample_index);
  chunk.set_start(begin);
  SetTokenArrays(partial, static_cast<size_t>(begin), &chunk);
  return chunk;
}

v1::SequenceScore ToProto(const ScoreResult& score, const ScoreRequest& request) {
  v1::SequenceScore result;
  AppendFrom(score.logprobs, 0, result.mutable_logprobs());
  AppendFrom(score.entropy, 0, result.mutable_entropy());
  for (const ScoredPosition& position : score.positions) {
    if (request.top_logprobs > 0) {
      v1::TopLogprobs* top = result.add_top_logprobs();
      AppendFrom(position.top_ids, 0, top->mutable_token_ids());
      AppendFrom(position.top_logprobs, 0, top->mutable_logprobs());
    }
    if (!request.token_ids_logprob.empty()) {
      AppendFrom(position.asked_logprobs, 0, result.add_token_ids_logprobs()->mutable_logprobs());
    }
  }
  for (const DraftScore& draft : score.draft) {
    v1::DraftScore* entry = result.add_draft();
    entry->set_depth(draft.depth);
    entry->set_start(draft.start);
    AppendFrom(draft.logprobs, 0, entry->mutable_logprobs());
    AppendFrom(draft.overlap, 0, entry->mutable_overlap());
    AppendFrom(draft.argmax_prob, 0, entry->mutable_argmax_prob());
    AppendFrom(draft.entropy, 0, entry->mutable_entropy());
  }
  result.set_weight_step(score.weight_step);
  return result;
}

v1::ModelInfo MakeModelInfo(const EngineInfo& info, absl::string_view served_model_name, const Tokenizer* tokenizer) {
  const ModelConfig& config = info.config;
  v1::ModelInfo model;
  model.set_name(std::string(served_model_name));
  model.set_vocab_size(config.vocab_size);
  model.set_hidden_size(config.hidden_size);
  model.set_intermediate_size(config.intermediate_size);
  const auto num_full = static_cast<int32_t>(std::count(config.layers.begin(), config.layers.end(), LayerKind::kFullAttention));
  model.set_num_layers(static_cast<int32_t>(config.layers.size()));
  model.set_num_full_attention_layers(num_full);
  model.set_num_linear_attention_layers(static_cast<int32_t>(config.layers.size()) - num_full);
  model.set_num_attention_heads(config.num_attention_heads);
  model.set_num_key_value_heads(config.num_key_value_heads);
  model.set_head_dim(config.head_dim);
  model.set_linear_num_key_heads(config.linear_num_key_heads);
  model.set_linear_num_value_heads(config.linear_num_value_heads);
  model.set_linear_key_head_dim(config.linear_key_head_dim);
  model.set_linear_value_head_dim(config.linear_value_head_dim);
  model.set_tie_word_embeddings(config.tie_word_embeddings);
  model.set_max_position_embeddings(config.max_position_embeddings);
  model.mutable_eos_token_ids()->Add(config.eos_token_ids.begin(), config.eos_token_ids.end());
  model.set_has_mtp(info.has_mtp);
  model.set_has_tokenizer(tokenizer != nullptr);
  model.set_tokenizer_vocab_size(tokenizer != nullptr ? tokenizer->vocab_size() : 0);
  model.set_layer_bytes(info.layer_bytes);
  model.set_lm_head_bytes(info.lm_head_bytes);
  model.set_mtp_bytes(info.mtp_bytes);
  return model;
}

v1::Loads MakeLoads(const EngineLoads& loads, const EngineControl& control) {
  v1::Loads result;
  result.set_running_requests(loads.running_requests);
  result.set_waiting_requests(loads.waiting_requests);
  result.set_running_sequences(loads.running_sequences);
  result.set_max_num_seqs(loads.max_num_seqs);
  result.set_used_pages(loads.used_pages);
  result.set_total_pages(loads.total_pages);
  result.set_used_state_slots(loads.used_state_slots);
  result.set_total_state_slots(loads.total_state_slots);
  result.set_queued_bytes(loads.queued_bytes);
  result.set_retained_bytes(loads.retained_bytes);
  result.set_submitted(loads.submitted);
  result.set_finished(loads.finished);
  result.set_cancelled(loads.cancelled);
  result.set_failed(loads.failed);
  result.set_refused(loads.refused);
  result.set_steps(loads.steps);
  result.set_prompt_tokens(loads.prompt_tokens);
  result.set_generated_tokens(loads.generated_tokens);
  result.set_preemptions(loads.preemptions);
  SetCounts(loads.spec, kMaxDraftTokens, result.mutable_spec());
  result.set_paused(control.paused);
  AddTags(control.sleeping, &result);
  result.set_target_step(loads.target_step);
  result.set_draft_step(loads.draft_step);
  result.set_weight_commits(loads.weight_commits);
  result.set_last_swap_seconds(absl::ToDoubleSeconds(loads.last_swap_time));
  result.set_total_swap_seconds(absl::ToDoubleSeconds(loads.total_swap_time));
  result.set_recomputed_tokens(loads.recomputed_tokens);
  SetCounts(loads.version_spec, kMaxDraftTokens, result.mutable_version_spec());
  SetCounts(loads.previous_version_spec, kMaxDraftTokens, result.mutable_previous_version_spec());
  return result;
}

}  // namespace bebop
