// SPDX-License-Identifier: Apache-2.0
#include "server/limits.h"

#include "absl/strings/str_cat.h"
#include "engine/sampling/sampling_params.h"

namespace bebop {
namespace {

using namespace limits;  // NOLINT: the tables below name many of them

constexpr absl::string_view kModelLength = "the model length";
constexpr absl::string_view kOutputLength = "max_new_tokens";
constexpr absl::string_view kServerText = "short text made by the server";

constexpr SizeLimit kSizeLimits[] = {
    // Requests: checked before anything else happens with them.
    {"GenerateRequest.request_id", kRequestIdBytes, "bytes", "of [A-Za-z0-9._:-]; empty: the server makes one"},
    {"GenerateRequest.prompt_token_ids", 0, "ids", "1 .. the model length - 1"},
    {"StoppingParams.stop_token_ids", kStopTokenIds, "ids", ""},
    {"StoppingParams.stop", kStopStrings, "strings", "of 1 .. 256 bytes each"},
    {"GenerateRequest.resume", kNumSamples, "handles", "one a sample; of 32 MiB together"},
    {"ScoreRequest.sequences", kScoreSequences, "sequences", "1 or more; of 1,048,576 tokens together; reply arrays of 64 MiB"},
    {"Sequence.token_ids", 0, "ids", "1 .. the model length"},
    {"ScoreRequest.token_ids_logprob", kTokenIdsLogprob, "ids", ""},
    {"AbortRequest.request_ids", kAbortIds, "ids", "1 or more, of 64 bytes each"},
    {"TokenizeRequest.text", kTokenizeBytes, "bytes", ""},
    {"DetokenizeRequest.token_ids", kDetokenizeIds, "ids", ""},
    {"TensorSpec.name", kTensorNameBytes, "bytes", "1 or more"},
    {"TensorSpec.dtype", kTensorDTypeBytes, "bytes", ""},
    {"TensorSpec.shape", kTensorDimensions, "sizes", ""},
    {"StartWeightUpdateRequest.update_id", kRequestIdBytes, "bytes", "of [A-Za-z0-9._:-]; 1 or more"},
    {"StartWeightUpdateRequest.label", kWeightLabelBytes, "bytes", ""},
    {"StartWeightUpdateRequest.components", kWeightComponents, "components", "each once"},
    {"StartWeightUpdateRequest.manifest", kWeightTensors, "tensors", ""},
    {"WeightChunk.update_id", kRequestIdBytes, "bytes", "empty: that of the chunk before"},
    {"WeightChunk.tensor", kTensorNameBytes, "bytes", "empty: that of the chunk before"},
    {"WeightChunk.data", kWeightChunkBytes, "bytes", "whole elements"},
    {"WeightChunk.digest", 32, "bytes", "exactly, or empty"},
    {"UpdateWeightsRequest.update_id", kRequestIdBytes, "bytes", "1 or more"},
    {"UpdateWeightsRequest.path", kWeightPathBytes, "bytes", "1 or more"},
    {"FinishWeightUpdateRequest.update_id", kRequestIdBytes, "bytes", "1 or more"},
    {"FinishWeightUpdateRequest.expect_target_digest", 64, "bytes", "exactly, hexadecimal, or empty"},
    {"FinishWeightUpdateRequest.expect_draft_digest", 64, "bytes", "exactly, hexadecimal, or empty"},
    {"AbortWeightUpdateRequest.update_id", kRequestIdBytes, "bytes", "empty: whichever is open"},
    {"SleepRequest.tags", kSleepTags, "tags", "\"weights\" or \"kv_cache\"; empty: both"},
    {"WakeUpRequest.tags", kSleepTags, "tags", "\"weights\" or \"kv_cache\"; empty: both"},
    // Replies: follow from the request's.
    {"GenerateResult.request_id", kRequestIdBytes, "bytes", ""},
    {"GenerateResult.prompt_token_ids", 0, "ids", kModelLength},
    {"GenerateResult.samples", kNumSamples, "samples", "num_samples"},
    {"SampleResult.token_ids", 0, "ids", kOutputLength},
    {"SampleResult.logprobs", 0, "values", kOutputLength},
    {"SampleResult.raw_logprobs", 0, "values", kOutputLength},
    {"SampleResult.entropy", 0, "values", kOutputLength},
    {"SampleResult.token_source", 0, "values", kOutputLength},
    {"SampleResult.draft_logprobs", 0, "values", kOutputLength},
    {"SampleResult.weight_spans", 0, "spans", kOutputLength},
    {"SampleResult.resume_handle", kResumeBytes, "bytes", "only of samples that were cut short"},
    {"Finish.stop_string", kStopStringBytes, "bytes", ""},
    {"SpecStats.drafted_per_pos", kMaxDraftTokens, "values", ""},
    {"SpecStats.accepted_per_pos", kMaxDraftTokens, "values", ""},
    {"SpecStats.overlap_per_pos", kMaxDraftTokens, "values", ""},
    {"SpecTotals.drafted_per_pos", kMaxDraftTokens, "values", ""},
    {"SpecTotals.accepted_per_pos", kMaxDraftTokens, "values", ""},
    {"WeightSpan.label", kRequestIdBytes, "bytes", ""},
    {"Admitted.request_id", kRequestIdBytes, "bytes", ""},
    {"TokenChunk.token_ids", 0, "ids", kOutputLength},
    {"TokenChunk.logprobs", 0, "values", kOutputLength},
    {"TokenChunk.raw_logprobs", 0, "values", kOutputLength},
    {"TokenChunk.entropy", 0, "values", kOutputLength},
    {"TokenChunk.token_source", 0, "values", kOutputLength},
    {"TokenChunk.draft_logprobs", 0, "values", kOutputLength},
    {"GroupDone.request_id", kRequestIdBytes, "bytes", ""},
    {"GroupDone.prompt_token_ids", 0, "ids", kModelLength},
    {"ScoreResult.scores", kScoreSequences, "scores", "one a sequence"},
    {"SequenceScore.logprobs", 0, "values", kModelLength},
    {"SequenceScore.top_logprobs", 0, "values", kModelLength},
    {"SequenceScore.token_ids_logprobs", 0, "values", kModelLength},
    {"SequenceScore.entropy", 0, "values", kModelLength},
    {"SequenceScore.draft", kMaxDraftTokens, "depths", "draft_depth"},
    {"TopLogprobs.token_ids", kTopLogprobs, "ids", "top_logprobs"},
    {"TopLogprobs.logprobs", kTopLogprobs, "values", "top_logprobs"},
    {"TokenLogprobs.logprobs", kTokenIdsLogprob, "values", "one a token_ids_logprob"},
    {"DraftScore.logprobs", 0, "values", kModelLength},
    {"DraftScore.overlap", 0, "values", kModelLength},
    {"DraftScore.argmax_prob", 0, "values", kModelLength},
    {"DraftScore.entropy", 0, "values", kModelLength},
    {"AbortResult.aborted_request_ids", kAbortIds, "ids", "of 64 bytes each"},
    {"TokenizeResult.token_ids", kTokenizeResultIds, "ids", "one a byte of the normalised text"},
    {"DetokenizeResult.text", 0, "bytes", "what the ids decode to"},
    {"ServerInfo.api_version", 0, "bytes", kServerText},
    {"ServerInfo.build", 0, "bytes", kServerText},
    {"ServerInfo.capabilities", 64, "strings", kServerText},
    {"ServerInfo.boot_id", 0, "bytes", kServerText},
    {"ServerInfo.served_model_name", kStopStringBytes, "bytes", "--served-model-name"},
    {"ServerInfo.device", 0, "bytes", kServerText},
    {"ServerInfo.instruction_set", 0, "bytes", kServerText},
    {"ServerInfo.dtype", 0, "bytes", kServerText},
    {"ServerInfo.load_format", 0, "bytes", kServerText},
    {"ModelInfo.name", kStopStringBytes, "bytes", "--served-model-name"},
    {"WeightInfo.label", kWeightLabelBytes, "bytes", ""},
    {"WeightInfo.target_digest", 64, "bytes", "hexadecimal"},
    {"WeightInfo.draft_digest", 64, "bytes", "hexadecimal; empty without an MTP layer"},
    {"WeightInfo.update_id", kRequestIdBytes, "bytes", ""},
    {"WeightInfo.tensors", kWeightTensors, "tensors", "the model's"},
    {"WeightUpdate.update_id", kRequestIdBytes, "bytes", ""},
    {"WeightUpdate.missing", kMissingTensors, "tensors", ""},
    {"TensorProgress.name", kTensorNameBytes, "bytes", ""},
    {"AbortWeightUpdateResult.update_id", kRequestIdBytes, "bytes", ""},
    {"CheckWeightsResult.target_digest", 64, "bytes", "hexadecimal"},
    {"CheckWeightsResult.draft_digest", 64, "bytes", "hexadecimal; empty without an MTP layer"},
    {"ModelInfo.eos_token_ids", kEosTokenIds, "ids", "the checkpoint's"},
    {"ServerInfo.sleeping", kSleepTags, "tags", ""},
    {"Loads.sleeping", kSleepTags, "tags", ""},
    {"ControlState.sleeping", kSleepTags, "tags", ""},
};

constexpr NumberLimit kNumberLimits[] = {
    {"GenerateRequest.num_samples", "1 .. 1024; unset: 1"},
    {"GenerateRequest.priority", "any; unset: 0"},
    {"SamplingParams.temperature", "0, or 0.0001 .. 100; unset: 1"},
    {"SamplingParams.top_p", "(0, 1]; unset: 1"},
    {"SamplingParams.top_k", ">= 0; unset: 0 = off"},
    {"SamplingParams.min_p", "0 .. 1; unset: 0 = off"},
    {"SamplingParams.seed", "any; unset: drawn by the server"},
    {"StoppingParams.max_new_tokens", "1 .. the model length - the prompt; unset: as many as fit"},
    {"StoppingParams.min_new_tokens", "0 .. max_new_tokens; unset: 0"},
    {"SpeculationParams.mode", "a named value; unset: the server's default"},
    {"SpeculationParams.num_draft_tokens", "0 .. the server's max_draft_tokens (at most 8); unset: the server's choice; 0 with OFF"},
    {"WeightParams.min_step", "any; unset: any step will do"},
    {"WeightParams.max_step_spread", ">= 0; unset: any spread"},
    {"WeightParams.on_update", "a named value; unset: as the update says"},
    {"SpeculationParams.synthetic_acceptance", "0 .. 1, only where the server allows it; unset: off"},
    {"ScoreRequest.score_start", "0 .. length of the shortest sequence - 1"},
    {"ScoreRequest.temperature", "0.0001 .. 100; unset: 1"},
    {"ScoreRequest.top_logprobs", "0 .. 20"},
    {"ScoreRequest.draft_depth", "0 .. the server's max_draft_tokens (at most 8)"},
    {"PauseGenerationRequest.mode", "a named value; unset: KEEP"},
    {"DrainRequest.deadline_seconds", "0 .. 86400; unset: --drain-timeout"},
    {"StartWeightUpdateRequest.base_step", ">= 0; the loaded step; unset: any, but not with OVERWRITE_DELTA"},
    {"StartWeightUpdateRequest.target_step", ">= 0; above the loaded step, unless rewind"},
    {"StartWeightUpdateRequest.encoding", "a named value; unset: FULL"},
    {"StartWeightUpdateRequest.in_flight", "a named value; unset: KEEP"},
    {"StartWeightUpdateRequest.deadline_ms", "1 .. 3600000; unset: 600000"},
    {"WeightChunk.offset", "a multiple of the element's size within the tensor"},
};

std::string MebiBytes(int64_t bytes) { return absl::StrCat(bytes >> 20, " MiB"); }

}  // namespace

std::span<const SizeLimit> SizeLimits() { return kSizeLimits; }
std::span<const NumberLimit> NumberLimits() { return kNumberLimits; }

std::string LimitsMarkdown() {
  std::string text =
      "# Limits\n\nWhat the server accepts from the network. Made from `server/limits.cc`; a test compares the two and walks the message\n"
      "descriptors, so every sized field has a row. Over a limit is `INVALID_ARGUMENT` naming the field, the value and the limit.\n\n"
      "## Transport\n\n| what | limit |\n|---|---|\n";
  absl::StrAppend(&text, "| receive message, rollout port | ", MebiBytes(kRolloutReceiveBytes), " |\n");
  absl::StrAppend(&text, "| receive message, admin port | ", MebiBytes(kAdminReceiveBytes), " |\n");
  absl::StrAppend(&text, "| gRPC buffers, rollout port | ", MebiBytes(kRolloutQuotaBytes), " |\n");
  absl::StrAppend(&text, "| gRPC buffers, admin port | ", MebiBytes(kAdminQuotaBytes), " |\n");
  absl::StrAppend(&text, "| metadata | ", kMetadataBytes >> 10, " KiB |\n");
  absl::StrAppend(&text, "| concurrent streams per connection | ", kConcurrentStreams, " |\n");
  absl::StrAppend(&text, "| client pings | one every ", kMinPingIntervalSeconds, " s |\n");
  absl::StrAppend(&text, "| unsent events of a `GenerateStream` before its group pauses | ", kStreamBufferBytes >> 10, " KiB |\n");
  absl::StrAppend(&text, "\n## Calls at a time\n\nOne more is `RESOURCE_EXHAUSTED` (CAPACITY), to be tried again; a `Drain` is answered at once instead.\n\n");
  absl::StrAppend(&text, "| what | limit |\n|---|---|\n");
  absl::StrAppend(&text, "| admin calls that may wait | ", kBlockingCalls, ", and ", kQueuedCalls, " in line |\n");
  absl::StrAppend(&text, "| short admin calls (`ResumeGeneration`, `GetWeightInfo`, `AbortWeightUpdate`) | ", kShortCalls, ", and ", kQueuedCalls,
                  " in line |\n");
  absl::StrAppend(&text, "| `PauseGeneration` with WAIT | ", kWaitingPauses, " |\n");
  absl::StrAppend(&text, "| `Drain` | ", kWaitingDrains, " |\n");
  absl::StrAppend(&text, "| `PushWeights` streams | ", kPushStreams, " |\n");
  absl::StrAppend(&text, "\n## Sized fields\n\n| field | limit |\n|---|---|\n");
  for (const SizeLimit& row : kSizeLimits) {
    absl::StrAppend(&text, "| `", row.field, "` | ");
    if (row.max > 0) absl::StrAppend(&text, row.max, " ", row.unit, row.rule.empty() ? "" : "; ");
    absl::StrAppend(&text, row.rule, " |\n");
  }
  absl::StrAppend(&text, "\n## Numbers in requests\n\n| field | values |\n|---|---|\n");
  for (const NumberLimit& row : kNumberLimits) absl::StrAppend(&text, "| `", row.field, "` | ", row.range, " |\n");
  return text;
}

}  // namespace bebop
