// SPDX-License-Identifier: Apache-2.0
// weights push, update, info, check, abort.
#include <chrono>
#include <cstdio>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/cli/commands.h"
#include "client/cli/console.h"

namespace bebop {
namespace {

constexpr auto kProgressInterval = std::chrono::milliseconds(50);

// A status without a server's reason that names a file of this machine: bad input, not a refusal.
bool IsFileError(const absl::Status& status) {
  const bool has_code = absl::IsNotFound(status) || absl::IsInvalidArgument(status) || absl::IsPermissionDenied(status) || absl::IsDataLoss(status);
  return has_code && GetErrorDetails(status).reason.empty();
}

int ReportUpdateError(const absl::Status& status) {
  return IsFileError(status) ? ReportUsage(std::string(status.message())) : ReportError(status);
}

// `draft` is empty without an MTP layer.
std::string VersionAsText(const v1::WeightInfo& info) {
  std::string text = absl::StrCat("target step ", info.target_step(), ", digest ", info.target_digest());
  if (!info.draft_digest().empty()) absl::StrAppend(&text, "\ndraft step ", info.draft_step(), ", digest ", info.draft_digest());
  if (!info.label().empty()) absl::StrAppend(&text, "\nlabel ", info.label());
  return text;
}

std::string AsText(const v1::FinishWeightUpdateResult& result) {
  return absl::StrFormat("%s\nstaged in %.3f s, swapped in %.3f s: %d samples kept, %d recomputed, %d ended", VersionAsText(result.info()),
                         result.stage_seconds(), result.swap_seconds(), result.kept_samples(), result.recomputed_samples(), result.ended_samples());
}

std::string AsText(const v1::WeightInfo& info) {
  std::string text = VersionAsText(info);
  absl::StrAppend(&text, "\n", info.num_updates(), " updates since the start");
  if (!info.update_id().empty()) absl::StrAppend(&text, ", the last one ", info.update_id());
  if (!info.has_update()) return text;
  const v1::WeightUpdate& update = info.update();
  absl::StrAppend(&text, "\nopen: ", update.update_id(), " to step ", update.target_step(), ", ", update.complete_tensors(), "/", update.num_tensors(),
                  " tensors, ", update.received_bytes(), "/", update.expected_bytes(), " bytes");
  return text;
}

std::string AsText(const v1::CheckWeightsResult& result) {
  std::string text = absl::StrCat("target ", result.target_matches() ? "matches" : "DIFFERS", ", digest ", result.target_digest());
  const std::string draft = result.draft_digest().empty() ? "none" : absl::StrCat("digest ", result.draft_digest());
  return absl::StrCat(text, "\ndraft ", result.draft_matches() ? "matches" : "DIFFERS", ", ", draft);
}

template <typename Reply>
void Print(const GlobalFlags& global, const Reply& reply) {
  PrintLine(global.json ? ToJsonLine(reply) : AsText(reply));
}

}  // namespace

int RunWeightsPush(WeightsClient* client, const GlobalFlags& global, const WeightsUpdateFlags& flags) {
  std::unique_ptr<Progress> progress;
  std::chrono::steady_clock::time_point last_shown;  // the clock's epoch: long ago
  WeightUpdateOptions options = flags.options;
  options.on_progress = [&](int64_t done, int64_t total) {
    if (progress == nullptr) progress = std::make_unique<Progress>("weights push, MiB", total >> 20);
    const auto now = std::chrono::steady_clock::now();
    if (done < total && now - last_shown < kProgressInterval) return;
    progress->Show(done >> 20);
    last_shown = now;
  };
  const absl::StatusOr<v1::FinishWeightUpdateResult> result = PushCheckpoint(client, flags.paths, options);
  progress.reset();
  if (!result.ok()) return ReportUpdateError(result.status());
  Print(global, *result);
  return kExitOk;
}

int RunWeightsUpdate(WeightsClient* client, const GlobalFlags& global, const WeightsUpdateFlags& flags) {
  const absl::StatusOr<v1::FinishWeightUpdateResult> result = UpdateFromPath(client, flags.paths.front(), flags.options);
  if (!result.ok()) return ReportError(result.status());
  Print(global, *result);
  return kExitOk;
}

int RunWeightsInfo(WeightsClient* client, const GlobalFlags& global) {
  const absl::StatusOr<v1::WeightInfo> info = client->GetWeightInfo(/*tensors=*/false);
  if (!info.ok()) return ReportError(info.status());
  Print(global, *info);
  return kExitOk;
}

int RunWeightsCheck(WeightsClient* client, const GlobalFlags& global) {
  const absl::StatusOr<v1::CheckWeightsResult> result = client->CheckWeights();
  if (!result.ok()) return ReportError(result.status());
  Print(global, *result);
  return result->target_matches() && result->draft_matches() ? kExitOk : kExitRefused;
}

int RunWeightsAbort(WeightsClient* client, const GlobalFlags& global, const std::string& update_id) {
  v1::AbortWeightUpdateRequest request;
  request.set_update_id(update_id);
  const absl::StatusOr<v1::AbortWeightUpdateResult> result = client->AbortWeightUpdate(request);
  if (!result.ok()) return ReportError(result.status());
  if (global.json) {
    PrintLine(ToJsonLine(*result));
  } else {
    PrintLine(result->update_id().empty() ? "no such update is open" : absl::StrCat("aborted ", result->update_id()));
  }
  return kExitOk;
}

}  // namespace bebop
