// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "bebop/v1/control.pb.h"
#include "client/cli/commands.h"
#include "client/cpp/control_client.h"

// The verbs that steer a server through its admin port. Each prints the ControlState that the server replies with.
namespace bebop {

int RunPause(ControlClient* client, const GlobalFlags& global, const v1::PauseGenerationRequest& request);
int RunResume(ControlClient* client, const GlobalFlags& global);
int RunSleep(ControlClient* client, const GlobalFlags& global, const std::vector<std::string>& tags);
int RunWakeUp(ControlClient* client, const GlobalFlags& global, const std::vector<std::string>& tags);
int RunFlushCache(ControlClient* client, const GlobalFlags& global);
int RunDrain(ControlClient* client, const GlobalFlags& global, const v1::DrainRequest& request);
// Without flags it changes nothing and shows what there is.
int RunSpec(ControlClient* client, const GlobalFlags& global, const v1::SpeculationParams& speculation);

}  // namespace bebop
