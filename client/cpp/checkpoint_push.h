// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/cpp/weights_client.h"

namespace bebop {

// What an update is to do; see StartWeightUpdateRequest.
struct WeightUpdateOptions {
  std::string update_id;  // empty: one is made up
  int64_t target_step = 0;
  std::optional<int64_t> base_step;
  std::string label;
  std::vector<v1::WeightComponent::Type> components;  // empty: all that the model has
  v1::InFlight::Mode in_flight = v1::InFlight::UNSPECIFIED;
  std::optional<int32_t> deadline_ms;
  bool rewind = false;
  // Called now and then on the calling thread with the bytes sent so far.
  std::function<void(int64_t done, int64_t total)> on_progress;
};

// Streams a checkpoint's tensors to the server and has them swapped in, as a learner would. `paths`: one folder (model.safetensors, or the shards
// that model.safetensors.index.json names), or safetensors files.
//
// The server decides what it takes; this maps spellings (model. or model.language_model., model.mtp. or mtp.), casts floating-point types to those
// that the server lists, leaves model.visual.* out, components that are not asked for, and a copy of tied embeddings under lm_head.weight. SHA-256 of
// every tensor goes with it, and that of the whole with the end. A lost stream goes on where it broke. After any other error the update is aborted.
//
// Errors of files: NOT_FOUND, INVALID_ARGUMENT (UNKNOWN_TENSOR, DUPLICATE_TENSOR), DATA_LOSS (a file ends early), each naming the file. All others are
// the server's.
absl::StatusOr<v1::FinishWeightUpdateResult> PushCheckpoint(WeightsClient* client, const std::vector<std::string>& paths, const WeightUpdateOptions& options);

// Has the server read `path` beneath its --weights-root and swap it in. An error aborts the update.
absl::StatusOr<v1::FinishWeightUpdateResult> UpdateFromPath(WeightsClient* client, const std::string& path, const WeightUpdateOptions& options);

}  // namespace bebop
