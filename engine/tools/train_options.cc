// SPDX-License-Identifier: Apache-2.0
#include "engine/tools/train_options.h"

#include <limits>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/runtime/backend.h"
#include "engine/training/mtp_block.h"
#include "engine/training/mtp_trainer.h"

namespace bebop {
namespace {

// Written so that NaN is out of every range.
template <typename T>
absl::Status CheckRange(const char* flag, T value, T low, T high) {
  if (value >= low && value <= high) return absl::OkStatus();
  const std::string range =
      high == std::numeric_limits<T>::max() ? absl::StrCat(">= ", low) : absl::StrCat("in [", low, ", ", high, "]");
  return absl::InvalidArgumentError(absl::StrCat(flag, ": ", value, " is not ", range));
}

absl::Status CheckGiven(const char* flag, const std::string& value, const char* what) {
  return value.empty() ? absl::InvalidArgumentError(absl::StrCat(flag, ": missing; give ", what)) : absl::OkStatus();
}

}  // namespace

const char* LossName(DraftLoss loss) {
  switch (loss) {
    case DraftLoss::kCrossEntropy:
      return "ce";
    case DraftLoss::kKl:
      return "kl";
    case DraftLoss::kReverseKl:
      return "reverse_kl";
    case DraftLoss::kTotalVariation:
      return "tv";
    case DraftLoss::kEndToEndTotalVariation:
      return "e2e_tv";
    case DraftLoss::kLk:
      break;
  }
  return "lk";
}

const char* DecayName(RateDecay decay) {
  return decay == RateDecay::kNone ? "none" : decay == RateDecay::kLinear ? "linear" : "cosine";
}

absl::Status CheckOptions(const TrainOptions& options) {
  constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
  BEBOP_RETURN_IF_ERROR(CheckGiven("--model", options.model, "the checkpoint directory"));
  BEBOP_RETURN_IF_ERROR(CheckGiven("--data", options.data, "the file of documents"));
  BEBOP_RETURN_IF_ERROR(CheckGiven("--out", options.out, "the safetensors file to write"));
  if (options.init_mtp && !options.mtp.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("--init-mtp: --mtp ", options.mtp, " is given, too; drop one of the two"));
  }
  if (const absl::Status status = CheckDeviceName(options.device); !status.ok()) {
    return absl::Status(status.code(), absl::StrCat("--", status.message()));
  }
  BEBOP_RETURN_IF_ERROR(CheckRange("--num-steps-ahead", options.num_steps_ahead, 1, MtpBlock::kMaxSteps));
  BEBOP_RETURN_IF_ERROR(CheckRange("--lr", options.learning_rate, 0.0, TrainerLimits::kLearningRate));
  BEBOP_RETURN_IF_ERROR(CheckRange("--warmup-ratio", options.warmup_ratio, 0.0, 1.0));
  BEBOP_RETURN_IF_ERROR(CheckRange("--weight-decay", options.weight_decay, 0.0, TrainerLimits::kWeightDecay));
  BEBOP_RETURN_IF_ERROR(CheckRange("--clip-norm", options.clip_norm, 0.0, TrainerLimits::kClipNorm));
  BEBOP_RETURN_IF_ERROR(CheckRange("--epochs", options.epochs, int64_t{1}, int64_t{1'000'000}));
  BEBOP_RETURN_IF_ERROR(CheckRange("--max-steps", options.max_steps, int64_t{0}, kAny));
  const int64_t shortest = TrainerLimits::LeastTokens(options.num_steps_ahead);
  BEBOP_RETURN_IF_ERROR(CheckRange("--batch-tokens", options.batch_tokens, shortest, TrainerLimits::kBatchTokens));
  if (options.max_seq_len != 0) {
    BEBOP_RETURN_IF_ERROR(CheckRange("--max-seq-len", options.max_seq_len, shortest, TrainerLimits::kBatchTokens));
    if (options.max_seq_len > options.batch_tokens) {
      return absl::InvalidArgumentError(absl::StrCat("--max-seq-len: ", options.max_seq_len, " is more than --batch-tokens ",
                                                     options.batch_tokens, ", and a document is in one batch"));
    }
  }
  BEBOP_RETURN_IF_ERROR(CheckRange("--truncate-top-k", options.truncate_top_k, 0, std::numeric_limits<int32_t>::max()));
  if (options.truncate_top_k > 0 && options.loss == DraftLoss::kCrossEntropy) {
    return absl::InvalidArgumentError(absl::StrCat("--truncate-top-k: ", options.truncate_top_k,
                                                   " with --loss ce, which looks at one token alone; drop one of the two"));
  }
  BEBOP_RETURN_IF_ERROR(CheckRange("--checkpoint-every", options.checkpoint_every, int64_t{1}, kAny));
  BEBOP_RETURN_IF_ERROR(CheckRange("--eval-every", options.eval_every, int64_t{0}, kAny));
  if (options.eval_every > 0 && options.eval_data.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--eval-every: ", options.eval_every, " without --eval-data; give what to evaluate on"));
  }
  BEBOP_RETURN_IF_ERROR(CheckRange("--log-every", options.log_every, int64_t{1}, kAny));
  return CheckRange("--threads", options.num_threads, 0, 1024);
}

}  // namespace bebop
