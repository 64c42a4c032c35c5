// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "bebop/v1/control.pb.h"
#include "bebop/v1/info.pb.h"
#include "bebop/v1/rollout.pb.h"
#include "engine/runtime/engine_interface.h"
#include "engine/schedule/request.h"

// Protocol buffers <-> engine types: pure functions. Requests come out complete (defaults resolved) and in range; every refusal is
// an InvalidField (status_details.h) or names the missing capability. Nothing below this file knows protobuf.
namespace bebop {

// What validation and defaults depend on besides the message.
struct RequestRules {
  int32_t max_model_len = 0;
  int32_t vocab_size = 0;
  int32_t max_draft_tokens = 0;  // of the engine
  bool has_mtp = false;
  bool has_tokenizer = false;
  bool allow_synthetic_acceptance = false;
  bool allow_unknown_fields = false;
  SpeculationMode default_mode = SpeculationMode::kOff;
  int32_t default_num_draft_tokens = 0;  // for modes other than OFF, whatever default_mode is
  std::array<uint8_t, 8> model = {};     // ModelHash, of resume handles
};

// What a request gets that is not in its message.
struct RequestContext {
  std::string fresh_request_id;  // used when the message has none
  uint64_t fresh_seed = 0;       // used when the message has none
  absl::Time deadline = absl::InfiniteFuture();  // the server's longest wall time per request
};

// INVALID_ARGUMENT / UNKNOWN_FIELD naming the path and number of the first unknown field anywhere in `message`.
absl::Status CheckKnownFields(const google::protobuf::Message& message);

// Hash of everything but request_id: equal for byte-equal bodies (deterministic serialisation), different otherwise. Holds within
// one process only.
uint64_t BodyHash(const v1::GenerateRequest& message);

// Errors besides InvalidField: FAILED_PRECONDITION NO_TOKENIZER (stop strings), UNIMPLEMENTED NO_DRAFT_LAYER, FAILED_PRECONDITION
// SYNTHETIC_ACCEPTANCE_DISABLED, INVALID_ARGUMENT BAD_RESUME_HANDLE and RESUME_MISMATCH.
// With resume handles, parameters that the message leaves unset are theirs, not the server's defaults: whatever SetSpeculation or another replica's
// flags say by now, the sample goes on as it began.
absl::StatusOr<GenerateRequest> ToEngine(const v1::GenerateRequest& message, const RequestRules& rules, const RequestContext& context);

// One engine request a sequence.
absl::StatusOr<std::vector<ScoreRequest>> ToEngine(const v1::ScoreRequest& message, const RequestRules& rules,
                                                   const RequestContext& context);

absl::Status Validate(const v1::AbortRequest& message, const RequestRules& rules);
absl::Status Validate(const v1::TokenizeRequest& message, const RequestRules& rules);
// `tokenizer_vocab_size`: 1 + the largest id.
absl::Status Validate(const v1::DetokenizeRequest& message, const RequestRules& rules, int32_t tokenizer_vocab_size);

// 1..64 bytes of [A-Za-z0-9._:-].
bool IsValidRequestId(absl::string_view id);

// What requests get from now on that leave speculation unset, after `message` on top of what `rules` has. InvalidField; NO_DRAFT_LAYER.
struct DefaultSpeculation {
  SpeculationMode mode = SpeculationMode::kOff;
  int32_t num_draft_tokens = 0;
};
absl::StatusOr<DefaultSpeculation> ToEngine(const v1::SetSpeculationRequest& message, const RequestRules& rules);
absl::Status Validate(const v1::ResumeGenerationRequest& message, const RequestRules& rules);
absl::Status Validate(const v1::FlushCacheRequest& message, const RequestRules& rules);
absl::StatusOr<PauseMode> ToEngine(const v1::PauseGenerationRequest& message, const RequestRules& rules);
absl::StatusOr<SleepTags> ToEngine(const v1::SleepRequest& message, const RequestRules& rules);
absl::StatusOr<SleepTags> ToEngine(const v1::WakeUpRequest& message, const RequestRules& rules);
// `fallback`: the server's --drain-timeout.
absl::StatusOr<absl::Duration> ToEngine(const v1::DrainRequest& message, const RequestRules& rules, absl::Duration fallback);
v1::ControlState MakeControlState(const EngineControl& control, const EngineLoads& loads, const RequestRules& rules);

// sampling, stopping, output and speculation with nothing left open: what a resume handle remembers.
v1::GenerateRequest ResolvedParams(const GenerateRequest& request);
// The same of the group that `sample` is of, whose caller sent `request`. A repeat attaches to what the first call was given: its seed, and its
// speculation, which may come from defaults that have changed since. The same for all samples of a group.
v1::GenerateRequest AppliedParams(const SampleResult& sample, const GenerateRequest& request);

// `params`: AppliedParams. REQUIRES: the sample ended with data (not kNone, kFailed).
v1::SampleResult ToProto(const SampleResult& sample, const v1::GenerateRequest& params);
// Values of `partial` from `begin` on.
v1::TokenChunk ToProto(const SampleResult& partial, int32_t begin);
v1::SequenceScore ToProto(const ScoreResult& score, const ScoreRequest& request);
// Counts per position are cut to `num_positions` entries.
v1::SpecStats ToProto(const SpecCounts& counts, int32_t num_positions, bool with_overlap);
v1::SpeculationParams::Mode ToProto(SpeculationMode mode);

v1::ModelInfo MakeModelInfo(const EngineInfo& info, absl::string_view served_model_name, const Tokenizer* tokenizer);
// Names of the tags, for ControlState, ServerInfo and Loads.
template <typename Message>
void AddTags(const SleepTags& tags, Message* message) {
  if (tags.weights) message->add_sleeping("weights");
  if (tags.kv_cache) message->add_sleeping("kv_cache");
}

v1::Loads MakeLoads(const EngineLoads& loads, const EngineControl& control);

}  // namespace bebop
