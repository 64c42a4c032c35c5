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
#include "engine/training/run_lock.h"
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
//   if (*finished) finished = (*run)->Finish(stop);  // the evaluation and the file; false: stopped, too
class TrainingRun {
 public:
  // Errors of flags, files and memory, naming the offender and both values; nothing has been written. What is written later is
  // none of the files that are read, but for --mtp FILE. FAILED_PRECONDITION, too: another process has --out or --checkpoints;
  // nobody else gets them while the run lives.
  static absl::StatusOr<std::unique_ptr<TrainingRun>> Prepare(const TrainOptions& given);

  // Trains to the end, or until `stop` is not 0, which is looked at between the batches of steps and evaluations; then a
  // checkpoint is there, and false is returned. DATA_LOSS: loss or gradient
  // is not finite; a checkpoint of the weights before that step is there, unless the run had no step yet. Others: a checkpoint or
  // the device failed; the last whole checkpoint stays.
  absl::StatusOr<bool> Train(const std::atomic<int>& stop);
  // Evaluates, writes the trained file and removes the checkpoints. False: stopped while it evaluated; it leaves the last
  // checkpoint, as an error does. Call after Train has returned true.
  absl::StatusOr<bool> Finish(const std::atomic<int>& stop);

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
  absl::StatusOr<std::optional<ReportSum>> Evaluate(const std::atomic<int>& stop);  // nullopt: stopped
  // INVALID_ARGUMENT: none of its documents does for the loss.
  absl::Status CheckAnythingCounts(const std::string& path, const TrainingData& data) const;
  // PlanEpoch without the batches in which nothing counts: each is a step.
  std::vector<std::vector<int32_t>> Batches(const TrainingData& data, uint64_t seed, int64_t epoch) const;
  RunPlace Place() const;

  const TrainOptions options_;  // with defaults filled in
  RunLock folder_lock_, out_lock_;
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
