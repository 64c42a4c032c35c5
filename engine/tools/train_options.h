// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "engine/training/optimizer.h"
#include "kernels/common/dtype.h"
#include "kernels/draft_losses/draft_losses.h"

namespace bebop {

// The flags of bebop-train-mtp; their help texts are in train_mtp.cc.
struct TrainOptions {
  std::string model;
  std::string data;
  std::string out;
  std::string mtp;  // empty: begin from the MTP tensors of `model`
  bool init_mtp = false;
  DraftLoss loss = DraftLoss::kEndToEndTotalVariation;
  int32_t num_steps_ahead = 5;
  double learning_rate = 3.5e-5;
  double warmup_ratio = 0.03;
  RateDecay decay = RateDecay::kNone;
  double weight_decay = 0.0;
  double clip_norm = 1.0;
  int64_t epochs = 1;
  int64_t max_steps = 0;  // 0: all of the epochs
  int64_t batch_tokens = 2048;
  int64_t max_seq_len = 0;  // 0: batch_tokens, and no more than the model takes
  uint64_t seed = 0;
  int32_t truncate_top_k = 0;
  bool resume = false;
  std::string checkpoints;  // empty: `out`.checkpoints
  int64_t checkpoint_every = 200;
  std::string eval_data;
  int64_t eval_every = 0;  // 0: before the first step and after the last
  int64_t log_every = 10;
  bool json = false;
  std::string device = "cpu";
  DType dtype = DType::kBFloat16;
  int32_t num_threads = 0;  // 0: all processors
};

// As flags have them: "e2e_tv", "cosine".
const char* LossName(DraftLoss loss);
const char* DecayName(RateDecay decay);

// What shows without a look at any file. INVALID_ARGUMENT: a flag that is missing, out of its range, or excludes another, with
// both values.
absl::Status CheckOptions(const TrainOptions& options);

}  // namespace bebop
