// SPDX-License-Identifier: Apache-2.0
#include "engine/tools/training_run.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "engine/base/status_macros.h"
#include "engine/formats/file.h"
#include "engine/formats/safetensors.h"
#include "engine/training/batch_plan.h"
#include "engine/weights/checkpoint.h"
#include "engine/weights/weight_digest.h"
#include "kernels/common/check.h"
#include "kernels/common/cpu_features.h"

namespace bebop {
namespace {

TrainOptions WithDefaults(TrainOptions options) {
  if (options.checkpoints.empty()) options.checkpoints = options.out + ".checkpoints";
  return options;
}

// All digits: two rates that differ have different texts.
std::string Exact(double value) { return absl::StrFormat("%.17g", value); }

std::string DigestOf(const std::vector<float>& values) {
  return DigestHex(Sha256Of({reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)}));
}

std::vector<const TrainingDocument*> BatchOf(const TrainingData& data, const std::vector<int32_t>& indices) {
  std::vector<const TrainingDocument*> batch;
  for (const int32_t index : indices) batch.push_back(&data.documents[static_cast<size_t>(index)]);
  return batch;
}

bool SameFile(const std::string& a, const std::string& b) {
  std::error_code error;
  return std::filesystem::equivalent(a, b, error);  // false when either is not there
}

absl::Status RefuseInput(const std::string& out, const std::string& input, const char* flag) {
  return absl::InvalidArgumentError(absl::StrCat("--out: ", out, " would take the place of ", input, " of ", flag,
                                                 ", and it would be lost; give another file"));
}

// OK when writing `out` takes nothing from the checkpoint folder that `flag` names. What an earlier run has left there, a file of
// mtp.* tensors alone that no index names, may be replaced.
absl::Status CheckSparesCheckpoint(const std::string& out, const std::string& folder, const char* flag) {
  std::error_code error;
  for (std::filesystem::directory_iterator entry(folder, error); !error && entry != std::filesystem::directory_iterator();
       entry.increment(error)) {
    const std::string path = entry->path().string();
    if (!SameFile(out, path)) continue;
    if (!MtpFileType(path).ok()) return RefuseInput(out, path, flag);
    const std::string index_path = absl::StrCat(folder, "/model.safetensors.index.json");
    if (!FileExists(index_path)) continue;
    BEBOP_ASSIGN_OR_RETURN(const MappedFile index_file, MappedFile::Open(index_path));
    BEBOP_ASSIGN_OR_RETURN(const SafetensorsIndex index, ParseSafetensorsIndex(index_file.bytes(), index_path));
    for (const auto& [tensor, shard] : index.weight_map) {
      if (SameFile(out, absl::StrCat(folder, "/", shard))) return RefuseInput(out, path, flag);
    }
  }
  return absl::OkStatus();  // what is wrong with the folder, its reader says
}

// OK when what the run writes is none of what it reads. --mtp FILE may be --out: the run begins from it, and replaces it when it
// is done.
absl::Status CheckSparesInputs(const TrainOptions& options) {
  for (const std::string& out : {options.out, options.out + ".tmp"}) {
    if (SameFile(out, options.data)) return RefuseInput(out, options.data, "--data");
    if (SameFile(out, options.eval_data)) return RefuseInput(out, options.eval_data, "--eval-data");
    if (out != options.out && SameFile(out, options.mtp)) return RefuseInput(out, options.mtp, "--mtp");
    BEBOP_RETURN_IF_ERROR(CheckSparesCheckpoint(out, options.model, "--model"));
    if (!options.mtp.empty()) BEBOP_RETURN_IF_ERROR(CheckSparesCheckpoint(out, options.mtp, "--mtp"));
  }
  const auto refuse_folder = [&](const char* flag, const std::string& other) {
    return absl::InvalidArgumentError(
        absl::StrCat("--checkpoints: ", options.checkpoints, " is ", other, " of ", flag, "; give a folder of its own"));
  };
  if (SameFile(options.checkpoints, options.model)) return refuse_folder("--model", options.model);
  if (SameFile(options.checkpoints, options.mtp)) return refuse_folder("--mtp", options.mtp);
  std::error_code error;
  const auto canonical = [&](const std::string& path) { return std::filesystem::weakly_canonical(path, error); };
  if (canonical(options.checkpoints) == canonical(options.out)) return refuse_folder("--out", options.out);
  return absl::OkStatus();
}

// Floating point operations a second of the products of training: forward, both gradients, at the shape of the MLP's largest
// matrix. The best of some, as others may use the machine.
absl::StatusOr<double> MeasureGemmRate(const ModelConfig& config, int64_t batch_tokens, DeviceMemory& memory, TrainingOps& ops) {
  constexpr absl::Duration kLongEnough = absl::Milliseconds(200);
  constexpr int kFewest = 3;  // the first one also brings memory in
  // Enough rows for the full rate: few on a processor, many on a device.
  const int64_t rows = memory.is_host() ? std::min<int64_t>(batch_tokens, 256) : batch_tokens;
  const int64_t hidden = config.hidden_size, wide = 2 * int64_t{config.intermediate_size};
  std::vector<std::shared_ptr<void>> storage;
  absl::Status status;
  const auto matrix = [&](int64_t height, int64_t width) {
    auto memory_of = memory.Allocate(height * width * ElementBytes(DType::kFloat32), "products to measure");
    if (!memory_of.ok()) status = memory_of.status();
    storage.push_back(memory_of.ok() ? *std::move(memory_of) : nullptr);
    return FloatMatrix(static_cast<float*>(storage.back().get()), height, width);
  };
  const auto packed = [&](int64_t height, int64_t width) {
    auto memory_of = memory.Allocate(ops.PackedMatrixBytes(height, width), "products to measure");
    if (!memory_of.ok()) status = memory_of.status();
    storage.push_back(memory_of.ok() ? *std::move(memory_of) : nullptr);
    return storage.back().get();
  };
  const TensorView x = matrix(rows, hidden), y = matrix(rows, wide), w = matrix(wide, hidden), dx = matrix(rows, hidden);
  void* const forward_data = packed(wide, hidden);
  void* const transposed_data = packed(hidden, wide);
  BEBOP_RETURN_IF_ERROR(status);
  // Ordinary values that stay what they are, however often the products run: y is 1 everywhere.
  const auto fill = [&](const TensorView& view, float value) {
    const std::vector<float> values(static_cast<size_t>(view.rows * view.cols), value);
    memory.CopyIn(view.data, values.data(), static_cast<int64_t>(values.size() * sizeof(float)));
  };
  fill(x, 1.0f);
  fill(w, 1.0f / static_cast<float>(hidden));
  const PackedMatrix forward = ops.Pack(w, forward_data), transposed = ops.PackTransposed(w, transposed_data);
  double best = std::numeric_limits<double>::infinity();
  const absl::Time start = absl::Now();
  for (int i = 0; i < kFewest || absl::Now() - start < kLongEnough; ++i) {
    const absl::Time before = absl::Now();
    ops.Linear({.x = x, .w = forward, .y = y});
    ops.Linear({.x = y, .w = transposed, .y = dx});
    ops.LinearBackwardWeight({.x = x, .dy = y, .dw = w});
    float last = 0.0f;
    memory.CopyOut(&last, w.data, sizeof(last));  // waits
    best = std::min(best, absl::ToDoubleSeconds(absl::Now() - before));
  }
  BEBOP_RETURN_IF_ERROR(memory.status());
  return 6.0 * static_cast<double>(rows) * static_cast<double>(hidden) * static_cast<double>(wide) / best;
}

// The device has more than one name for itself: what a run must share is its kind.
std::string DeviceKind(const std::string& device) { return device.substr(0, device.find(':')); }

}  // namespace

absl::StatusOr<std::unique_ptr<TrainingRun>> TrainingRun::Prepare(const TrainOptions& given) {
  BEBOP_RETURN_IF_ERROR(CheckOptions(given));
  const TrainOptions options = WithDefaults(given);
  const auto under = [](const char* flag, const absl::Status& status) {
    return absl::Status(status.code(), absl::StrCat(flag, ": ", status.message()));
  };
  if (const absl::Status writable = CheckWritable(options.out); !writable.ok()) return under("--out", writable);
  BEBOP_RETURN_IF_ERROR(CheckSparesInputs(options));
  std::unique_ptr<TrainingRun> run(new TrainingRun(options));
  // Until the run is gone: two runs would clear away each other's checkpoints, and write one OUT.tmp.
  absl::StatusOr<RunLock> folder = RunLock::Acquire(options.checkpoints);
  if (!folder.ok()) return under("--checkpoints", folder.status());
  absl::StatusOr<RunLock> out = RunLock::Acquire(options.out);
  if (!out.ok()) return under("--out", out.status());
  run->folder_lock_ = *std::move(folder);
  run->out_lock_ = *std::move(out);
  BEBOP_ASSIGN_OR_RETURN(const int64_t newest, run->checkpoints_.Newest());
  if (newest >= 0 && !options.resume) {
    return absl::FailedPreconditionError(
        absl::StrCat("--checkpoints: ", run->checkpoints_.PathOf(newest),
                     " is of a run that was stopped: go on with it by --resume, or remove the folder to begin anew"));
  }
  BEBOP_RETURN_IF_ERROR(run->ReadInputs());
  BEBOP_RETURN_IF_ERROR(run->LoadTarget());
  BEBOP_RETURN_IF_ERROR(run->MakeTrainer());
  return run;
}

absl::Status TrainingRun::ReadInputs() {
  BEBOP_ASSIGN_OR_RETURN(config_, LoadModelConfig(options_.model));
  if (config_.num_mtp_layers == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(options_.model, "/config.json: mtp_num_hidden_layers: expected 1, got 0: the model has no MTP layer",
                     options_.init_mtp ? "; set it to 1 to have --init-mtp give it one" : " to train"));
  }
  if (options_.max_seq_len > config_.max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat("--max-seq-len: ", options_.max_seq_len,
                                                   " is more than max_position_embeddings ", config_.max_position_embeddings,
                                                   " of ", options_.model, "/config.json"));
  }
  const int64_t longest =
      options_.max_seq_len > 0 ? options_.max_seq_len : std::min<int64_t>(options_.batch_tokens, config_.max_position_embeddings);
  if (longest < options_.num_steps_ahead + 2) {
    return absl::InvalidArgumentError(absl::StrCat(options_.model, "/config.json: max_position_embeddings ",
                                                   config_.max_position_embeddings, " is less than --num-steps-ahead ",
                                                   options_.num_steps_ahead, " + 2"));
  }
  if (options_.truncate_top_k > config_.vocab_size) {
    return absl::InvalidArgumentError(absl::StrCat("--truncate-top-k: ", options_.truncate_top_k, " is more than vocab_size ",
                                                   config_.vocab_size, " of ", options_.model, "/config.json"));
  }
  const TrainingDataOptions data_options = {.vocab_size = config_.vocab_size,
                                            .num_steps_ahead = options_.num_steps_ahead,
                                            .max_seq_len = static_cast<int32_t>(longest)};
  BEBOP_ASSIGN_OR_RETURN(data_, ReadTrainingData(options_.data, data_options));
  if (!options_.eval_data.empty()) {
    BEBOP_ASSIGN_OR_RETURN(eval_data_, ReadTrainingData(options_.eval_data, data_options));
  }
  for (const auto& [path, data] : {std::pair(&options_.data, &data_), std::pair(&options_.eval_data, &eval_data_)}) {
    if (!path->empty()) BEBOP_RETURN_IF_ERROR(CheckAnythingCounts(*path, *data));
  }
  for (int64_t epoch = 0; epoch < options_.epochs; ++epoch) {
    epoch_batches_.push_back(static_cast<int64_t>(Batches(data_, options_.seed, epoch).size()));
    all_batches_ += epoch_batches_.back();
    if (options_.max_steps > 0 && all_batches_ >= options_.max_steps) break;
  }
  if (options_.max_steps > 0) all_batches_ = std::min(all_batches_, options_.max_steps);

  const MtpLayout layout(config_);
  if (options_.init_mtp) {
    start_ = InitMtpParameters(layout, options_.seed);
  } else {
    BEBOP_ASSIGN_OR_RETURN(start_, ReadMtpParameters(options_.mtp.empty() ? options_.model : options_.mtp, config_, layout));
  }
  start_digest_ = DigestOf(start_);
  return absl::OkStatus();
}

absl::Status TrainingRun::CheckAnythingCounts(const std::string& path, const TrainingData& data) const {
  for (const TrainingDocument& document : data.documents) {
    if (AnythingCounts(document, options_.loss, options_.num_steps_ahead)) return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(path, ": expected documents with predictions that count for --loss ",
                                                 LossName(options_.loss), " at --num-steps-ahead ", options_.num_steps_ahead,
                                                 ", got none in ", data.counts.documents,
                                                 " documents: what follows loss_start is too short"));
}

std::vector<std::vector<int32_t>> TrainingRun::Batches(const TrainingData& data, uint64_t seed, int64_t epoch) const {
  std::vector<std::vector<int32_t>> batches = PlanEpoch(data, options_.batch_tokens, seed, epoch);
  // The order does not depend on the loss, so that runs of two losses see the data alike: whole batches are left out, and no
  // document.
  std::erase_if(batches, [&](const std::vector<int32_t>& batch) {
    return std::none_of(batch.begin(), batch.end(), [&](int32_t index) {
      return AnythingCounts(data.documents[static_cast<size_t>(index)], options_.loss, options_.num_steps_ahead);
    });
  });
  return batches;
}

absl::Status TrainingRun::LoadTarget() {
  pool_ = std::make_unique<ThreadPool>(options_.num_threads > 0 ? options_.num_threads
                                                                : std::max(1u, std::thread::hardware_concurrency()));
  EngineOptions engine_options;
  engine_options.device = options_.device;
  BEBOP_ASSIGN_OR_RETURN(backend_, MakeBackend(engine_options, pool_.get()));
  backend_->EnterThread();
  BEBOP_RETURN_IF_ERROR(backend_->CheckShapes(config_, options_.dtype));
  LoadOptions load;
  load.path = options_.model;
  load.dtype = options_.dtype;
  load.needs_mtp = false;
  BEBOP_ASSIGN_OR_RETURN(weights_, LoadModelWeights(config_, load, *pool_, backend_->memory()));
  BEBOP_ASSIGN_OR_RETURN(ops_, MakeTrainingOps(backend_.get(), pool_.get()));

  // The file has the type of the tensors that it stands in for.
  BEBOP_ASSIGN_OR_RETURN(std::optional<DType> type, MtpFileType(options_.model));
  if (!type && !options_.mtp.empty()) {
    BEBOP_ASSIGN_OR_RETURN(type, MtpFileType(options_.mtp));
  }
  out_dtype_ = type.value_or(weights_->version.tensors.front().form);
  return absl::OkStatus();
}

absl::Status TrainingRun::MakeTrainer() {
  TrainerOptions options;
  options.loss = options_.loss;
  options.num_steps_ahead = options_.num_steps_ahead;
  options.batch_tokens = options_.batch_tokens;
  options.truncate_top_k = options_.truncate_top_k;
  options.optimizer.learning_rate = options_.learning_rate;
  options.optimizer.weight_decay = options_.weight_decay;
  options.optimizer.clip_norm = options_.clip_norm;
  options.optimizer.decay = options_.decay;
  options.optimizer.warmup_steps = static_cast<int64_t>(std::ceil(options_.warmup_ratio * static_cast<double>(all_batches_)));
  options.optimizer.total_steps = all_batches_;
  BEBOP_ASSIGN_OR_RETURN(trainer_, MtpTrainer::Create(config_, weights_.get(), backend_.get(), ops_.get(), options, start_));

  progress_.identity = Identity();
  BEBOP_ASSIGN_OR_RETURN(std::optional<TrainingProgress> found, checkpoints_.Load(trainer_->layout(), progress_.identity));
  BEBOP_ASSIGN_OR_RETURN(const double gemm_rate, MeasureGemmRate(config_, options_.batch_tokens, *backend_->memory(), *ops_));
  log_ = std::make_unique<TrainingLog>(options_.json, gemm_rate);
  const std::string set = backend_->memory()->is_host() ? absl::StrCat(", ", cpu::InstructionSetName(cpu::DetectInstructionSet()),
                                                                       ", ", pool_->num_threads(), " threads")
                                                        : "";
  log_->Note(absl::StrCat("data: ", CountsText(data_.counts)));
  if (2 * data_.counts.truncated > data_.counts.documents) {
    log_->Note(absl::StrCat("warning: --max-seq-len (by default --batch-tokens) cuts ", data_.counts.truncated, " of ",
                            data_.counts.documents, " documents, and what it cuts off is not trained on"));
  }
  log_->Note(absl::StrFormat("%s%s: products at %.0f GFLOP/s; memory beside the target's %s: %s", backend_->name(), set,
                             gemm_rate * 1e-9, BytesText(weights_->storage_bytes),
                             BytesText(MtpTrainer::Bytes(config_, options, options_.dtype, *backend_, *ops_))));
  if (found) {
    progress_ = *std::move(found);
    trainer_->SetState(progress_.state);
    log_->Note(absl::StrCat("resumed: ", checkpoints_.PathOf(progress_.state.step)));
  } else if (options_.resume) {
    log_->Note(absl::StrCat("--resume: ", options_.checkpoints, " has no checkpoint: beginning at step 0"));
  }
  progress_.state.parameters = {};
  progress_.state.first_moment = {};
  progress_.state.second_moment = {};
  start_ = {};
  return absl::OkStatus();
}

// By flag, so that an error names what to change.
std::map<std::string, std::string> TrainingRun::Identity() const {
  return {{"--model (digest of its target)", DigestHex(weights_->version.target_digest)},
          {"--data (SHA-256)", data_.digest},
          {"--mtp, --init-mtp or --model (SHA-256 of the weights to begin from)", start_digest_},
          {"--loss", LossName(options_.loss)},
          {"--num-steps-ahead", absl::StrCat(options_.num_steps_ahead)},
          {"--lr", Exact(options_.learning_rate)},
          {"--warmup-ratio", Exact(options_.warmup_ratio)},
          {"--decay", DecayName(options_.decay)},
          {"--weight-decay", Exact(options_.weight_decay)},
          {"--clip-norm", Exact(options_.clip_norm)},
          {"--epochs", absl::StrCat(options_.epochs)},
          {"--max-steps", absl::StrCat(options_.max_steps)},
          {"--batch-tokens", absl::StrCat(options_.batch_tokens)},
          {"--max-seq-len", absl::StrCat(options_.max_seq_len)},
          {"--seed", absl::StrCat(options_.seed)},
          {"--truncate-top-k", absl::StrCat(options_.truncate_top_k)},
          {"--dtype", DTypeName(options_.dtype)},
          {"--device", DeviceKind(options_.device)}};
}

absl::Status TrainingRun::Save() {
  TrainingProgress progress = progress_;
  progress.state = trainer_->state();
  // A step can overflow them although its loss and gradient were finite. What is there already is better.
  for (const std::vector<float>* values :
       {&progress.state.parameters, &progress.state.first_moment, &progress.state.second_moment}) {
    if (!std::all_of(values->begin(), values->end(), [](float value) { return std::isfinite(value); })) {
      return absl::DataLossError(absl::StrCat("training: step ", progress.state.step, " has made weights that are not finite"));
    }
  }
  return checkpoints_.Save(progress, trainer_->layout());
}

std::string TrainingRun::HowToGoOn(const absl::Status& status) const {
  const absl::StatusOr<int64_t> newest = checkpoints_.Newest();
  if (!newest.ok() || *newest < 0) return "there is no checkpoint yet";
  const std::string path = checkpoints_.PathOf(*newest);
  if (absl::IsDataLoss(status)) {
    return absl::StrCat(path,
                        "/mtp.safetensors has the last good weights: another run can begin from them by --mtp, with a smaller "
                        "--lr or without those lines");
  }
  return absl::StrCat(path, " is the last checkpoint: the same command with --resume goes on from it");
}

RunPlace TrainingRun::Place() const {
  RunPlace place;
  place.step = progress_.state.step;
  place.epoch = std::min(progress_.epoch, static_cast<int64_t>(epoch_batches_.size()) - 1);
  place.tokens = progress_.tokens;
  place.done_batches = progress_.batch;
  for (int64_t epoch = 0; epoch < progress_.epoch; ++epoch) place.done_batches += epoch_batches_[static_cast<size_t>(epoch)];
  place.all_batches = std::max(all_batches_, place.done_batches);
  if (batches_this_run_ > 0) {
    place.seconds_left =
        seconds_this_run_ / static_cast<double>(batches_this_run_) * static_cast<double>(place.all_batches - place.done_batches);
  }
  return place;
}

absl::StatusOr<bool> TrainingRun::Train(const std::atomic<int>& stop) {
  if (!options_.eval_data.empty() && progress_.state.step == 0) {
    BEBOP_ASSIGN_OR_RETURN(const std::optional<ReportSum> sum, Evaluate(stop));
    if (sum) log_->Evaluation(0, *sum);
  }
  ReportSum since_log;
  TrainingReport report;
  const auto finished = [this] { return options_.max_steps > 0 && progress_.state.step >= options_.max_steps; };
  int64_t saved = progress_.state.step;
  while (progress_.epoch < static_cast<int64_t>(epoch_batches_.size()) && !finished()) {
    const auto batches = Batches(data_, options_.seed, progress_.epoch);
    while (progress_.batch < static_cast<int64_t>(batches.size()) && !finished()) {
      if (stop.load() != 0) {
        BEBOP_RETURN_IF_ERROR(Save());
        return false;
      }
      const auto batch = BatchOf(data_, batches[static_cast<size_t>(progress_.batch)]);
      absl::StatusOr<TrainingReport> stepped = trainer_->Step(batch);
      if (!stepped.ok()) {
        // The parameters are as they were before it.
        if (!absl::IsDataLoss(stepped.status()) || progress_.state.step == 0) return stepped.status();
        const absl::Status kept = Save();
        return kept.ok() ? stepped.status()
                         : absl::Status(stepped.status().code(), absl::StrCat(stepped.status().message(), "; ", kept.message()));
      }
      ++progress_.batch;
      progress_.tokens += stepped->tokens;
      progress_.seconds += stepped->seconds;
      seconds_this_run_ += stepped->seconds;
      ++batches_this_run_;
      BEBOP_CHECK(stepped->terms > 0);  // a batch is a step: --max-steps, warm-up and decay count either
      report = *std::move(stepped);
      progress_.state.step = report.step;
      since_log.Add(report);
      if (report.step % options_.log_every == 0) {
        log_->Steps(Place(), since_log, report);
        since_log.Clear();
      }
      log_->Progress(Place(), report);
      if (report.step % options_.checkpoint_every == 0) {
        BEBOP_RETURN_IF_ERROR(Save());
        saved = report.step;
      }
      if (options_.eval_every > 0 && report.step % options_.eval_every == 0 && report.step < all_batches_) {
        // It can take longer than whoever wants to stop the run waits.
        if (saved != report.step) BEBOP_RETURN_IF_ERROR(Save());
        saved = report.step;
        BEBOP_ASSIGN_OR_RETURN(const std::optional<ReportSum> sum, Evaluate(stop));
        if (sum) log_->Evaluation(report.step, *sum);
      }
    }
    if (progress_.batch < static_cast<int64_t>(batches.size())) break;  // --max-steps
    ++progress_.epoch;
    progress_.batch = 0;
  }
  if (since_log.terms() > 0) log_->Steps(Place(), since_log, report);
  // Evaluating takes time, and the disk may be full: neither costs a step.
  if (saved != progress_.state.step) BEBOP_RETURN_IF_ERROR(Save());
  return true;
}

absl::StatusOr<std::optional<ReportSum>> TrainingRun::Evaluate(const std::atomic<int>& stop) {
  ReportSum sum;
  for (const std::vector<int32_t>& indices : Batches(eval_data_, /*seed=*/0, /*epoch=*/0)) {
    if (stop.load() != 0) return std::nullopt;
    BEBOP_ASSIGN_OR_RETURN(const TrainingReport report, trainer_->Evaluate(BatchOf(eval_data_, indices)));
    sum.Add(report);
  }
  return sum;
}

absl::StatusOr<bool> TrainingRun::Finish(const std::atomic<int>& stop) {
  std::optional<ReportSum> evaluation;
  if (!options_.eval_data.empty()) {
    BEBOP_ASSIGN_OR_RETURN(evaluation, Evaluate(stop));
    if (!evaluation) return false;
  }
  BEBOP_RETURN_IF_ERROR(WriteMtpFile(options_.out, trainer_->layout(), trainer_->state().parameters, out_dtype_));
  // The run has done what it was for: what it cannot clear away is said, and no failure.
  if (const absl::Status removed = checkpoints_.Remove(); !removed.ok()) {
    log_->Note(absl::StrCat(options_.out, " is written, but its checkpoints are still there, remove ", options_.checkpoints, ": ",
                            removed.message()));
  }
  log_->Finished(Place(), progress_.seconds, evaluation, data_.counts, options_.out);
  return true;
}

}  // namespace bebop
