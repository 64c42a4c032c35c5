// SPDX-License-Identifier: Apache-2.0
#include "server/resume_handle.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/weights/weight_digest.h"
#include "google/protobuf/text_format.h"
#include "server/limits.h"
#include "server/status_details.h"

namespace bebop {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

constexpr absl::string_view kMagic = "BBR1";  // the digit is the version of the format
constexpr size_t kChecksumBytes = sizeof(uint64_t);
constexpr size_t kModelBytes = 8;
constexpr size_t kPromptBytes = 16;
constexpr size_t kBodyAt = kMagic.size() + kChecksumBytes;
constexpr size_t kFixedBytes = kBodyAt + kModelBytes + kPromptBytes + 4 + 4;
// Counts that a handle may bring: far beyond what a sample can have, and far from wrapping when more is added.
constexpr int32_t kMaxCount = 1 << 30;
// Two steps within it can be subtracted.
constexpr int64_t kMaxStep = (int64_t{1} << 62) - 1;
constexpr size_t kShownBytes = 64;

absl::string_view AsBytes(const uint8_t* data, size_t size) { return {reinterpret_cast<const char*>(data), size}; }

template <size_t n>
std::array<uint8_t, n> Hash(absl::string_view bytes) {
  const Sha256Digest digest = Sha256Of(std::string_view(bytes.data(), bytes.size()));
  std::array<uint8_t, n> head;
  std::copy_n(digest.begin(), n, head.begin());
  return head;
}

template <typename Uint>
void AppendUint(Uint value, std::string* bytes) {
  for (size_t i = 0; i < sizeof(Uint); ++i) bytes->push_back(static_cast<char>(value >> (8 * i)));
}

// REQUIRES: sizeof(Uint) bytes, of which it takes the first. One load, to a compiler.
template <typename Uint>
Uint ReadUint(const char* bytes) {
  Uint value = 0;
  for (size_t i = 0; i < sizeof(Uint); ++i) value |= static_cast<Uint>(static_cast<uint8_t>(bytes[i])) << (8 * i);
  return value;
}

absl::Status BadHandle(absl::string_view field, absl::string_view fault) {
  return DetailedError(absl::StatusCode::kInvalidArgument, "BAD_RESUME_HANDLE", absl::StrCat(field, ": ", fault), {{"field", std::string(field)}});
}

// A field's value for an error: numbers as they are, lists and texts up to a few bytes.
std::string ValueText(const Message& message, const FieldDescriptor* field) {
  const auto* reflection = message.GetReflection();
  std::string text;
  if (field->is_repeated()) {
    for (int i = 0; i < reflection->FieldSize(message, field) && text.size() <= kShownBytes; ++i) {
      std::string entry;
      google::protobuf::TextFormat::PrintFieldValueToString(message, field, i, &entry);
      absl::StrAppend(&text, i > 0 ? ", " : "", entry);
    }
    text = absl::StrCat("[", text, "]");
  } else if (!field->has_presence() || reflection->HasField(message, field)) {
    google::protobuf::TextFormat::PrintFieldValueToString(message, field, -1, &text);
  } else {
    text = "unset";
  }
  if (text.size() > kShownBytes) text = absl::StrCat(text.substr(0, kShownBytes), "...");
  return text;
}

bool IsSame(const Message& one, const Message& other, const FieldDescriptor* field) {
  const auto* reflection = one.GetReflection();
  if (field->is_repeated() && reflection->FieldSize(one, field) != reflection->FieldSize(other, field)) return false;
  if (field->has_presence() && reflection->HasField(one, field) != reflection->HasField(other, field)) return false;
  // Text format prints numbers so that they read back as they were, so equal text is an equal value.
  const int count = field->is_repeated() ? reflection->FieldSize(one, field) : 1;
  for (int i = 0; i < count; ++i) {
    std::string text, other_text;
    google::protobuf::TextFormat::PrintFieldValueToString(one, field, field->is_repeated() ? i : -1, &text);
    google::protobuf::TextFormat::PrintFieldValueToString(other, field, field->is_repeated() ? i : -1, &other_text);
    if (text != other_text) return false;
  }
  return true;
}

absl::Status CheckSame(const std::string& path, const Message& now, const Message& before) {
  const auto* descriptor = now.GetDescriptor();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    const std::string name = absl::StrCat(path, path.empty() ? "" : ".", field->name());
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {  // no list of messages among the parameters
      BEBOP_RETURN_IF_ERROR(CheckSame(name, now.GetReflection()->GetMessage(now, field), before.GetReflection()->GetMessage(before, field)));
    } else if (!IsSame(now, before, field)) {
      return ResumeMismatch(name, ValueText(now, field), ValueText(before, field));
    }
  }
  return absl::OkStatus();
}

// Count of a per-token array: all tokens, or none where it was not asked for.
absl::Status CheckLength(absl::string_view field, absl::string_view array, int length, bool asked_for, int num_tokens) {
  const int expected = asked_for ? num_tokens : 0;
  if (length == expected) return absl::OkStatus();
  return BadHandle(field, absl::StrCat(array, " has ", length, " values for ", num_tokens, " tokens; expected ", expected));
}

absl::Status CheckCount(absl::string_view field, absl::string_view name, int64_t count, int64_t most) {
  if (count >= 0 && count <= most) return absl::OkStatus();
  return BadHandle(field, absl::StrCat(name, " is ", count, ", not in [0, ", most, "]"));
}

absl::Status CheckTokens(absl::string_view field, const v1::SampleResult& sample, const GenerateRequest& request, int32_t vocab_size) {
  const int num_tokens = sample.token_ids_size();
  if (num_tokens >= request.stopping.max_new_tokens) {
    return BadHandle(field, absl::StrCat(num_tokens, " tokens; a sample with max_new_tokens ", request.stopping.max_new_tokens, " has ended by then"));
  }
  for (const uint32_t id : sample.token_ids()) {
    if (id >= static_cast<uint32_t>(vocab_size)) return BadHandle(field, absl::StrCat("token id ", id, " is not below the vocabulary size ", vocab_size));
  }
  const OutputParams& output = request.output;
  BEBOP_RETURN_IF_ERROR(CheckLength(field, "logprobs", sample.logprobs_size(), output.logprobs, num_tokens));
  BEBOP_RETURN_IF_ERROR(CheckLength(field, "raw_logprobs", sample.raw_logprobs_size(), output.raw_logprobs, num_tokens));
  BEBOP_RETURN_IF_ERROR(CheckLength(field, "entropy", sample.entropy_size(), output.entropy, num_tokens));
  BEBOP_RETURN_IF_ERROR(CheckLength(field, "token_source", sample.token_source_size(), output.token_source, num_tokens));
  BEBOP_RETURN_IF_ERROR(CheckLength(field, "draft_logprobs", sample.draft_logprobs_size(), output.draft_logprobs, num_tokens));
  for (const int32_t source : sample.token_source()) {
    if (source < -2 || source > kMaxDraftTokens) return BadHandle(field, absl::StrCat("token_source ", source, " is not in [-2, ", kMaxDraftTokens, "]"));
  }
  return absl::OkStatus();
}

absl::Status CheckSpans(absl::string_view field, const v1::SampleResult& sample) {
  int32_t next = 0;
  for (const v1::WeightSpan& span : sample.weight_spans()) {
    if (span.start() != next || span.end() <= next) return BadHandle(field, "weight_spans do not tile the tokens");
    next = span.end();
    for (const int64_t step : {span.step(), span.draft_step()}) {
      if (step < -kMaxStep || step > kMaxStep) return BadHandle(field, absl::StrCat("weight step ", step, " is out of range"));
    }
    if (span.label().size() > static_cast<size_t>(limits::kWeightLabelBytes)) {
      return BadHandle(field, absl::StrCat("a weight label is longer than ", limits::kWeightLabelBytes, " bytes"));
    }
  }
  return next == sample.token_ids_size() ? absl::OkStatus() : BadHandle(field, "weight_spans do not tile the tokens");
}

absl::Status CheckSpec(absl::string_view field, const v1::SpecStats& spec, const GenerateRequest& request) {
  const int32_t positions = request.speculation.num_draft_tokens;
  const int32_t details = request.output.spec_detail ? positions : 0;
  if (spec.drafted_per_pos_size() != positions || spec.accepted_per_pos_size() != positions || spec.overlap_per_pos_size() != details) {
    return BadHandle(field, absl::StrCat("counts per draft position have not ", positions, " entries"));
  }
  for (const int32_t count : {spec.num_spec_steps(), spec.num_draft_tokens(), spec.num_accepted_draft_tokens(), spec.num_trimmed_tokens()}) {
    BEBOP_RETURN_IF_ERROR(CheckCount(field, "a count of spec", count, kMaxCount));
  }
  for (const auto* counts : {&spec.drafted_per_pos(), &spec.accepted_per_pos()}) {
    for (const int32_t count : *counts) BEBOP_RETURN_IF_ERROR(CheckCount(field, "a count of spec", count, kMaxCount));
  }
  for (const double overlap : spec.overlap_per_pos()) {
    if (!(overlap >= 0.0 && overlap <= kMaxCount)) return BadHandle(field, absl::StrCat("overlap_per_pos ", overlap, " is out of range"));
  }
  return absl::OkStatus();
}

SpecCounts ToEngine(const v1::SpecStats& message) {
  SpecCounts counts;
  counts.num_spec_steps = message.num_spec_steps();
  counts.num_draft_tokens = message.num_draft_tokens();
  counts.num_accepted_draft_tokens = message.num_accepted_draft_tokens();
  counts.num_trimmed_tokens = message.num_trimmed_tokens();
  std::copy(message.drafted_per_pos().begin(), message.drafted_per_pos().end(), counts.drafted_per_pos.begin());
  std::copy(message.accepted_per_pos().begin(), message.accepted_per_pos().end(), counts.accepted_per_pos.begin());
  std::copy(message.overlap_per_pos().begin(), message.overlap_per_pos().end(), counts.overlap_per_pos.begin());
  return counts;
}

template <typename T, typename Field>
std::vector<T> ToVector(const Field& field) {
  return {field.begin(), field.end()};
}

}  // namespace

std::array<uint8_t, 8> ModelHash(const ModelConfig& config) {
  return Hash<8>(absl::StrCat(config.vocab_size, " ", config.hidden_size, " ", config.intermediate_size, " ", config.layers.size(), " ",
                              config.num_attention_heads, " ", config.num_key_value_heads, " ", config.head_dim));
}

ResumeOrigin MakeResumeOrigin(const std::array<uint8_t, 8>& model, const std::vector<uint32_t>& prompt) {
  std::string bytes;
  bytes.reserve(4 * prompt.size());
  for (const uint32_t id : prompt) AppendUint(id, &bytes);
  return {.model = model, .prompt = Hash<kPromptBytes>(bytes)};
}

uint64_t HandleChecksum(absl::string_view bytes) {
  // Each turn is a bijection of the state for a given word and of the word for a given state, so one changed word never cancels out.
  constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;
  uint64_t state = bytes.size() * kOdd;
  const auto add = [&state](uint64_t word) {
    state = (state ^ word) * kOdd;
    state ^= state >> 32;
  };
  for (; bytes.size() >= sizeof(uint64_t); bytes.remove_prefix(sizeof(uint64_t))) add(ReadUint<uint64_t>(bytes.data()));
  if (!bytes.empty()) {
    char last[sizeof(uint64_t)] = {};
    std::copy(bytes.begin(), bytes.end(), last);
    add(ReadUint<uint64_t>(last));
  }
  return state;
}

bool IsCutShort(FinishReason reason) {
  switch (reason) {
    case FinishReason::kAborted:
    case FinishReason::kDrained:
    case FinishReason::kDeadline:
    case FinishReason::kSuperseded:
    case FinishReason::kWeightPolicy: return true;
    case FinishReason::kNone:
    case FinishReason::kStop:
    case FinishReason::kLength:
    case FinishReason::kNonFinite:
    case FinishReason::kFailed: return false;
  }
  return false;
}

std::string EncodeResumeHandle(const ResumeOrigin& origin, const v1::GenerateRequest& params, v1::SampleResult sample, int32_t pending_drafts) {
  sample.clear_finish();
  sample.clear_timing();
  sample.clear_applied();
  sample.clear_abort_epoch();
  sample.clear_resume_handle();
  std::string body;
  absl::StrAppend(&body, AsBytes(origin.model.data(), origin.model.size()), AsBytes(origin.prompt.data(), origin.prompt.size()));
  AppendUint(static_cast<uint32_t>(pending_drafts), &body);
  const std::string params_bytes = params.SerializeAsString();
  AppendUint(static_cast<uint32_t>(params_bytes.size()), &body);
  body += params_bytes;
  sample.AppendToString(&body);
  std::string handle(kMagic);
  AppendUint(HandleChecksum(body), &handle);
  return handle + body;
}

absl::StatusOr<ResumeHandle> DecodeResumeHandle(absl::string_view field, const std::string& bytes) {
  const absl::string_view all = bytes;
  if (all.size() < kFixedBytes || all.substr(0, kMagic.size()) != kMagic) {
    return BadHandle(field, absl::StrCat(all.size(), " bytes that are no resume handle, or one of another version of the format"));
  }
  absl::string_view rest = all.substr(kBodyAt);
  if (ReadUint<uint64_t>(all.data() + kMagic.size()) != HandleChecksum(rest)) {
    return BadHandle(field, "damaged: the checksum is not that of the bytes");
  }
  ResumeHandle handle;
  std::memcpy(handle.origin.model.data(), rest.data(), kModelBytes);
  rest.remove_prefix(kModelBytes);
  std::memcpy(handle.origin.prompt.data(), rest.data(), kPromptBytes);
  rest.remove_prefix(kPromptBytes);
  const auto pending_drafts = ReadUint<uint32_t>(rest.data());
  rest.remove_prefix(4);
  const auto params_bytes = ReadUint<uint32_t>(rest.data());
  rest.remove_prefix(4);
  if (pending_drafts > static_cast<uint32_t>(kMaxDraftTokens)) return BadHandle(field, absl::StrCat(pending_drafts, " pending drafts"));
  if (params_bytes > rest.size()) return BadHandle(field, "cut off within the parameters");
  handle.pending_drafts = static_cast<int32_t>(pending_drafts);
  const absl::string_view sample = rest.substr(params_bytes);
  if (!handle.params.ParseFromArray(rest.data(), static_cast<int>(params_bytes)) ||
      !handle.sample.ParseFromArray(sample.data(), static_cast<int>(sample.size()))) {
    return BadHandle(field, "what it holds cannot be read");
  }
  return handle;
}

absl::StatusOr<std::vector<ResumeHandle>> DecodeResumeHandles(const v1::GenerateRequest& message) {
  if (message.resume_size() > limits::kNumSamples) {
    return InvalidField("resume", absl::StrCat(message.resume_size(), " handles"), absl::StrCat("at most ", limits::kNumSamples, " handles"));
  }
  int64_t total_bytes = 0;
  for (const std::string& bytes : message.resume()) total_bytes += static_cast<int64_t>(bytes.size());
  if (total_bytes > limits::kResumeBytes) {
    return InvalidField("resume", absl::StrCat(total_bytes, " bytes"), absl::StrCat("at most ", limits::kResumeBytes, " bytes together"));
  }
  std::vector<ResumeHandle> handles;
  std::set<int32_t> indexes;
  for (int i = 0; i < message.resume_size(); ++i) {
    const std::string field = absl::StrCat("resume[", i, "]");
    BEBOP_ASSIGN_OR_RETURN(ResumeHandle handle, DecodeResumeHandle(field, message.resume(i)));
    const int32_t index = handle.sample.sample_index();
    BEBOP_RETURN_IF_ERROR(CheckCount(field, "sample_index", index, limits::kNumSamples - 1));
    if (!indexes.insert(index).second) return ResumeMismatch(field, absl::StrCat("sample ", index), "of a sample that is not there already");
    if (i > 0) {
      const ResumeHandle& first = handles.front();
      if (handle.origin != first.origin) return ResumeMismatch(field, "of another prompt or model", "of the group of resume[0]");
      if (const absl::Status same = CheckSameParams(handle.params, first.params); !same.ok()) {
        return ResumeMismatch(field, absl::StrCat("of another group (", std::string(same.message()), ")"), "of the group of resume[0]");
      }
    }
    handles.push_back(std::move(handle));
  }
  return handles;
}

absl::StatusOr<SampleResult> ToEngine(absl::string_view field, const ResumeHandle& handle, const GenerateRequest& request, int32_t vocab_size) {
  const v1::SampleResult& sample = handle.sample;
  if (sample.seed_used() != request.sampling.seed) return BadHandle(field, "its seed is not that of its parameters");
  BEBOP_RETURN_IF_ERROR(CheckTokens(field, sample, request, vocab_size));
  BEBOP_RETURN_IF_ERROR(CheckSpans(field, sample));
  BEBOP_RETURN_IF_ERROR(CheckSpec(field, sample.spec(), request));
  BEBOP_RETURN_IF_ERROR(CheckCount(field, "pending drafts", handle.pending_drafts, request.speculation.num_draft_tokens));
  const auto prompt_tokens = static_cast<int64_t>(request.prompt.size());
  const v1::Usage& usage = sample.usage();
  if (usage.prompt_tokens() != prompt_tokens || usage.completion_tokens() != sample.token_ids_size()) {
    return BadHandle(field, "usage does not count the prompt and the tokens");
  }
  BEBOP_RETURN_IF_ERROR(CheckCount(field, "cached_tokens", usage.cached_tokens(), prompt_tokens));
  BEBOP_RETURN_IF_ERROR(CheckCount(field, "preemptions", usage.preemptions(), kMaxCount));
  BEBOP_RETURN_IF_ERROR(CheckCount(field, "recomputed_tokens", usage.recomputed_tokens(), kMaxCount));

  SampleResult result;
  result.sample_index = sample.sample_index();
  result.seed_used = sample.seed_used();
  result.token_ids = ToVector<uint32_t>(sample.token_ids());
  result.logprobs = ToVector<float>(sample.logprobs());
  result.raw_logprobs = ToVector<float>(sample.raw_logprobs());
  result.entropy = ToVector<float>(sample.entropy());
  result.draft_logprobs = ToVector<float>(sample.draft_logprobs());
  result.token_source = ToVector<int32_t>(sample.token_source());
  result.spec = ToEngine(sample.spec());
  for (const v1::WeightSpan& span : sample.weight_spans()) {
    result.weight_spans.push_back(
        {.target_step = span.step(), .draft_step = span.draft_step(), .label = span.label(), .begin = span.start(), .end = span.end()});
  }
  result.kv_mixed = sample.kv_mixed();
  result.pending_drafts = handle.pending_drafts;
  result.prompt_tokens = usage.prompt_tokens();
  result.cached_tokens = usage.cached_tokens();
  result.preemptions = usage.preemptions();
  result.recomputed_tokens = usage.recomputed_tokens();
  return result;
}

absl::Status ResumeMismatch(absl::string_view field, absl::string_view value, absl::string_view before) {
  return DetailedError(absl::StatusCode::kInvalidArgument, "RESUME_MISMATCH",
                       absl::StrCat(field, ": ", value, " is not ", before, ", as resume has it"),
                       {{"field", std::string(field)}, {"value", std::string(value)}, {"limit", std::string(before)}});
}

absl::Status CheckSameParams(const v1::GenerateRequest& params, const v1::GenerateRequest& before) {
  for (const char* name : {"sampling", "stopping", "output", "speculation"}) {
    const FieldDescriptor* field = params.GetDescriptor()->FindFieldByName(name);
    BEBOP_RETURN_IF_ERROR(
        CheckSame(name, params.GetReflection()->GetMessage(params, field), before.GetReflection()->GetMessage(before, field)));
  }
  return absl::OkStatus();
}

}  // namespace bebop
