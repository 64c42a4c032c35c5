// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "bebop/v1/rollout.pb.h"
#include "engine/config/model_config.h"
#include "engine/schedule/request.h"

// SampleResult.resume_handle: all that another server of the same model needs to go on with a sample that was cut short, in the caller's hands,
// so that no server keeps it. Draws are keyed by seed, sample and position, so no random state goes along; caches are computed again.
//
// Bytes: "BBR1" | checksum (8) | model (8) | prompt (16) | pending drafts (4) | length of the parameters (4) | parameters | sample. Integers are
// little-endian. The checksum (HandleChecksum) is over everything behind it and tells damage, not forgery: whoever may send requests may make up
// tokens, so what a handle says is checked like any other input. The parameters are a v1::GenerateRequest with sampling, stopping, output and speculation as they were resolved; the
// sample is a v1::SampleResult.
namespace bebop {

// What a handle remembers of where it came from, besides the parameters.
struct ResumeOrigin {
  std::array<uint8_t, 8> model = {};    // hash of the model's dimensions: weights change, and names differ between replicas
  std::array<uint8_t, 16> prompt = {};  // hash of the prompt
  bool operator==(const ResumeOrigin&) const = default;
};
std::array<uint8_t, 8> ModelHash(const ModelConfig& config);
ResumeOrigin MakeResumeOrigin(const std::array<uint8_t, 8>& model, const std::vector<uint32_t>& prompt);

struct ResumeHandle {
  ResumeOrigin origin;
  v1::GenerateRequest params;  // sampling, stopping, output, speculation
  v1::SampleResult sample;
  int32_t pending_drafts = 0;
};

// Eight bytes at a time, as handles are made while the engine waits. Any change within one such word changes it, and its length is in it.
uint64_t HandleChecksum(absl::string_view bytes);

// True for the reasons that leave something to go on with.
bool IsCutShort(FinishReason reason);

// `params`: ResolvedParams of the request; `sample`: its result. Reason, times, epoch and applied parameters are left out.
std::string EncodeResumeHandle(const ResumeOrigin& origin, const v1::GenerateRequest& params, v1::SampleResult sample, int32_t pending_drafts);

// `field` names the handle in errors. INVALID_ARGUMENT [BAD_RESUME_HANDLE]: not the bytes that Encode made, or of another format.
absl::StatusOr<ResumeHandle> DecodeResumeHandle(absl::string_view field, const std::string& bytes);

// The handles of one request. INVALID_ARGUMENT: INVALID_FIELD (their number or size), BAD_RESUME_HANDLE, and RESUME_MISMATCH where they are not of one
// group or one sample comes twice.
absl::StatusOr<std::vector<ResumeHandle>> DecodeResumeHandles(const v1::GenerateRequest& message);

// Checks what the handle holds against `request`, which has been resolved and whose parameters are the handle's: lengths, ranges, spans that tile.
// BAD_RESUME_HANDLE.
absl::StatusOr<SampleResult> ToEngine(absl::string_view field, const ResumeHandle& handle, const GenerateRequest& request, int32_t vocab_size);

// INVALID_ARGUMENT [RESUME_MISMATCH]: "<field>: <value> is not <before>", as where the sample began.
absl::Status ResumeMismatch(absl::string_view field, absl::string_view value, absl::string_view before);
// RESUME_MISMATCH naming the first field in which the two differ.
absl::Status CheckSameParams(const v1::GenerateRequest& params, const v1::GenerateRequest& before);

}  // namespace bebop
