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
// Names, shapes and dtypes are checked as LoadModelWeights checks them, with its errors. FAILED_PRECONDITION: the checkpoint has
// no MTP tensors; names --mtp and --init-mtp.
absl::StatusOr<std::vector<float>> ReadMtpParameters(const std::string& path, const ModelConfig& config, const MtpLayout& layout);
// The type of the MTP tensors there: kBFloat16 if all are BF16, else kFloat32, which holds them all exactly; nullopt: there are
// none.
absl::StatusOr<std::optional<DType>> MtpFileType(const std::string& path);
// A fresh layer that a seed decides: matrices normal with 0.02 (output and down projections scaled by 1/√2), norms zero; fc
// copies the embedding's and the hidden state's halves at equal weight.
std::vector<float> InitMtpParameters(const MtpLayout& layout, uint64_t seed);

// OK when WriteMtpFile could write `path` now: said before hours of training, not after. Leaves everything as it is. Errors as
// there; INVALID_ARGUMENT: a folder.
absl::Status CheckWritable(const std::string& path);
// Writes `parameters` as a safetensors file of the checkpoint's names, [tensor -> dtype] as the checkpoint has them (bf16 rounded
// to nearest even): whole or not at all (a temporary file PATH.tmp, synced, renamed; what had that name is lost).
// RESOURCE_EXHAUSTED: disk full; PERMISSION_DENIED, NOT_FOUND: naming the path.
absl::Status WriteMtpFile(const std::string& path, const MtpLayout& layout, const std::vector<float>& parameters, DType dtype);

// Where a run is. `identity` is everything that a resumed run must share (loss, options, digests of data and target): name ->
// value.
struct TrainingProgress {
  MtpTrainer::State state;
  int64_t epoch = 0;
  int64_t batch = 0;  // of the epoch: the next one to train on
  int64_t tokens = 0;
  double seconds = 0.0;
  std::map<std::string, std::string> identity;
};

// Checkpoints of one run in a folder: step-<n>/ with mtp.safetensors (the float32 weights, which a server loads, too),
// optimizer.safetensors (both moments) and state.json (all else, and the digests of both), each synced, made as step-<n>.tmp and
// renamed. A kill at any moment leaves the last whole one. Keeps the newest two; needs room for three.
class TrainingCheckpoints {
 public:
  explicit TrainingCheckpoints(std::string folder);
  // Of the newest checkpoint, whole or not; -1: none.
  absl::StatusOr<int64_t> Newest() const;
  std::string PathOf(int64_t step) const;
  // RESOURCE_EXHAUSTED: disk full; PERMISSION_DENIED, NOT_FOUND: naming the path. Earlier checkpoints are as they were.
  absl::Status Save(const TrainingProgress& progress, const MtpLayout& layout);
  // The newest whole one; nullopt: none. FAILED_PRECONDITION: its identity differs; names the first difference and both values.
  // Others: there are checkpoints, and all are damaged; that of the newest.
  absl::StatusOr<std::optional<TrainingProgress>> Load(const MtpLayout& layout,
                                                       const std::map<std::string, std::string>& identity) const;
  // Removes all of them, and the folder when nothing else is in it.
  absl::Status Remove();

 private:
  const std::string folder_;
};

}  // namespace bebop
