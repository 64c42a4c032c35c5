// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
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
// SYNTHETIC_ACCEPTANCE_DISABLED.
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

// `request` is the one the sample belongs to. REQUIRES: the sample ended with data (not kNone, kFailed).
v1::SampleResult ToProto(const SampleResult& sample, const GenerateRequest& request);
// Values of `partial` from `begin` on.
v1::TokenChunk ToProto(const SampleResult& partial, int32_t begin);
v1::SequenceScore ToProto(const ScoreResult& score, const ScoreRequest& request);
// Counts per position are cut to `num_positions` entries.
v1::SpecStats ToProto(const SpecCounts& counts, int32_t num_positions, bool with_overlap);
v1::SpeculationParams::Mode ToProto(SpeculationMode mode);

v1::ModelInfo MakeModelInfo(const EngineInfo& info, absl::string_view served_model_name, const Tokenizer* tokenizer);
v1::Loads MakeLoads(const EngineLoads& loads);

}  // namespace bebop
