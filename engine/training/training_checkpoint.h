// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/training/mtp_parameters.h"
#include "engine/training/mtp_trainer.h"
#include "kernels/common/dtype.h"

namespace bebop {

// Reads the MTP layer as float32 in the order of `layout`: the mtp.* tensors of the safetensors file or checkpoint folder `path`.
// Names, shapes and dtypes are checked as LoadModelWeights checks them, with its errors. FAILED_PRECONDITION: the checkpoint has no MTP
// tensors; names --mtp and --init-mtp.
absl::StatusOr<std::vector<float>> ReadMtpParameters(const std::string& path, const ModelConfig& config, const MtpLayout& layout);
// A fresh layer that a seed decides: matrices normal with 0.02 (output and down projections scaled by 1/√2), norms zero; fc copies the embedding's and
// the hidden state's halves at equal weight.
std::vector<float> InitMtpParameters(const MtpLayout& layout, uint64_t seed);

// Writes `parameters` as a safetensors file of the checkpoint's names, [tensor -> dtype] as the checkpoint has them (bf16 rounded to
// nearest even): whole or not at all (a temporary file beside it, synced, renamed). RESOURCE_EXHAUSTED: disk full; PERMISSION_DENIED,
// NOT_FOUND: naming the path.
absl::Status WriteMtpFile(const std::string& path, const MtpLayout& layout, const std::vector<float>& parameters, DType dtype);

// Where a run is. `identity` is everything that a resumed run must share (loss, options, digests of data and target): name -> value.
struct TrainingProgress {
  MtpTrainer::State state;
  int64_t epoch = 0;
  int64_t batch = 0;  // of the epoch: the next one to train on
  int64_t tokens = 0;
  double seconds = 0.0;
  std::map<std::string, std::string> identity;
};

// Checkpoints of one run in a folder: step-<n>/ with optimizer.safetensors (float32 weights and both moments) and state.json, each synced,
// made as step-<n>.tmp and renamed. A kill at any moment leaves the last whole one. Keeps the newest two.
class TrainingCheckpoints {
 public:
  explicit TrainingCheckpoints(std::string folder);
  absl::Status Save(const TrainingProgress& progress, const MtpLayout& layout);
  // The newest whole one; nullopt: none. FAILED_PRECONDITION: its identity differs; names the first difference and both values.
  absl::StatusOr<std::optional<TrainingProgress>> Load(const MtpLayout& layout, const std::map<std::string, std::string>& identity) const;

 private:
  const std::string folder_;
};

}  // namespace bebop
