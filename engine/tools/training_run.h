// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/config/model_config.h"
#include "engine/runtime/backend.h"
#include "engine/tools/train_options.h"
#include "engine/tools/training_log.h"
#include "engine/training/mtp_trainer.h"
#include "engine/training/training_checkpoint.h"
#include "engine/training/training_data.h"
#include "engine/training/training_ops.h"
#include "engine/weights/model_weights.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

// One run of bebop-train-mtp: reads, trains, keeps checkpoints, evaluates, writes the file. It computes nothing itself.
//
//   auto run = TrainingRun::Prepare(options);      // what is wrong with flags and files, before the first step
//   auto finished = (*run)->Train(stop);           // false: stopped by `stop`, with a checkpoint to go on from
//   if (*finished) status = (*run)->Finish();      // the evaluation and the file
class TrainingRun {
 public:
  // Errors of flags, files and memory, naming the offender and both values; nothing has been written.
  static absl::StatusOr<std::unique_ptr<TrainingRun>> Prepare(const TrainOptions& options);

  // Trains to the end, or until `stop` is not 0; then a checkpoint is there, and false is returned. DATA_LOSS: loss or gradient
  // is not finite; a checkpoint of the weights before that step is there, unless the run had no step yet. Others: a checkpoint or
  // the device failed; the last whole checkpoint stays.
  absl::StatusOr<bool> Train(const std::atomic<int>& stop);
  // Evaluates, writes the trained file and removes the checkpoints. An error leaves the last checkpoint.
  absl::Status Finish();

  int64_t step() const { return progress_.state.step; }
  // What is there after a run that `status` (OK: a signal) has ended, and how to go on from it.
  std::string HowToGoOn(const absl::Status& status) const;

 private:
  explicit TrainingRun(const TrainOptions& options) : options_(options), checkpoints_(options.checkpoints) {}

  absl::Status ReadInputs();   // config, data, the head to begin from
  absl::Status LoadTarget();   // backend and weights
  absl::Status MakeTrainer();  // and continues the run that was stopped
  std::map<std::string, std::string> Identity() const;
  absl::Status Save();
  absl::StatusOr<ReportSum> Evaluate();
  RunPlace Place() const;

  const TrainOptions options_;  // with defaults filled in
  TrainingCheckpoints checkpoints_;
  ModelConfig config_;
  TrainingData data_, eval_data_;
  std::vector<float> start_;  // the head to begin from; empty once the trainer has it
  std::string start_digest_;
  DType out_dtype_ = DType::kBFloat16;
  std::vector<int64_t> epoch_batches_;  // of every epoch
  int64_t all_batches_ = 0;

  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<ModelWeights> weights_;
  std::unique_ptr<TrainingOps> ops_;
  std::unique_ptr<MtpTrainer> trainer_;
  std::unique_ptr<TrainingLog> log_;
  TrainingProgress progress_;  // state.step is always right; the rest of `state` when a checkpoint is made
  double seconds_this_run_ = 0.0;
  int64_t batches_this_run_ = 0;
};

}  // namespace bebop
