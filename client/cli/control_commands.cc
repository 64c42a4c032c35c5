// SPDX-License-Identifier: Apache-2.0
// pause, resume, sleep, wake-up, flush-cache, drain, spec.
#include "client/cli/control_commands.h"

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/cli/console.h"

namespace bebop {
namespace {

std::string AsText(const v1::ControlState& state) {
  std::string text = state.draining() ? "draining" : state.paused() ? "paused" : "running";
  if (state.sleeping_size() > 0) absl::StrAppend(&text, ", asleep: ", absl::StrJoin(state.sleeping(), ", "));
  absl::StrAppend(&text, "\n", state.running_requests(), " requests running, ", state.waiting_requests(), " waiting");
  if (state.aborted_samples() > 0) absl::StrAppend(&text, "\n", state.aborted_samples(), " samples ended; epoch ", state.abort_epoch());
  const v1::SpeculationParams& speculation = state.speculation();
  absl::StrAppend(&text, "\nspeculation by default: ", absl::AsciiStrToLower(v1::SpeculationParams::Mode_Name(speculation.mode())), ", ",
                  speculation.num_draft_tokens(), " drafts where a mode drafts");
  return text;
}

int Show(const GlobalFlags& global, const absl::StatusOr<v1::ControlState>& state) {
  if (!state.ok()) return ReportError(state.status());
  PrintLine(global.json ? ToJsonLine(*state) : AsText(*state));
  return kExitOk;
}

template <typename Request>
Request WithTags(const std::vector<std::string>& tags) {
  Request request;
  for (const std::string& tag : tags) request.add_tags(tag);
  return request;
}

}  // namespace

int RunPause(ControlClient* client, const GlobalFlags& global, const v1::PauseGenerationRequest& request) {
  return Show(global, client->PauseGeneration(request));
}

int RunResume(ControlClient* client, const GlobalFlags& global) { return Show(global, client->ResumeGeneration()); }

int RunSleep(ControlClient* client, const GlobalFlags& global, const std::vector<std::string>& tags) {
  return Show(global, client->Sleep(WithTags<v1::SleepRequest>(tags)));
}

int RunWakeUp(ControlClient* client, const GlobalFlags& global, const std::vector<std::string>& tags) {
  return Show(global, client->WakeUp(WithTags<v1::WakeUpRequest>(tags)));
}

int RunFlushCache(ControlClient* client, const GlobalFlags& global) { return Show(global, client->FlushCache()); }

int RunDrain(ControlClient* client, const GlobalFlags& global, const v1::DrainRequest& request) { return Show(global, client->Drain(request)); }

int RunSpec(ControlClient* client, const GlobalFlags& global, const v1::SpeculationParams& speculation) {
  v1::SetSpeculationRequest request;
  *request.mutable_speculation() = speculation;
  return Show(global, client->SetSpeculation(request));
}

}  // namespace bebop
