// SPDX-License-Identifier: Apache-2.0
#include "engine/training/mtp_trainer.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "engine/base/status_macros.h"
#include "engine/training/batch_plan.h"
#include "engine/training/logit_truncation.h"
#include "engine/training/mtp_block.h"
#include "engine/training/target_pass.h"
#include "kernels/common/check.h"

namespace bebop {
namespace {

constexpr int64_t kAlignment = 256;  // of every array: what DeviceMemory gives
// What the logits of a chunk take by default, and the rows of which even a large vocabulary has that many: fewer would read
// lm_head too often.
constexpr int64_t kLogitBytes = int64_t{32} << 20;
// On a device, whose products want thousands of rows: 4,324 in bf16 at V = 248,320, 720 bases and their 5 steps.
constexpr int64_t kDeviceLogitBytes = int64_t{2} << 30;
constexpr int64_t kLeastLogitRows = 64;
constexpr int64_t kUnpackRows = 4096;  // rows of lm_head that become float32 at a time

int64_t LogitStride(const ModelConfig& config) { return RoundUp(config.vocab_size, 32); }

int64_t LogitRows(const ModelConfig& config, const TrainerOptions& options, const TrainingOps& ops) {
  const int64_t steps = options.num_steps_ahead;
  int64_t rows = options.chunk_rows;
  const DType dtype = ops.logits_dtype();
  const int64_t bytes = dtype == DType::kFloat32 ? kLogitBytes : kDeviceLogitBytes;
  if (rows == 0) rows = std::max(bytes / (LogitStride(config) * ElementBytes(dtype)), kLeastLogitRows);
  return std::max(2 * steps, std::min(rows, (steps + 1) * options.batch_tokens));
}

// A batch's arrays and the working memory of a step, in memory of the backend. Without memory (base null) Carve only counts.
struct Buffers {
  Buffers(const ModelConfig& config, const TrainerOptions& options, DType activation_dtype, const TrainingOps& ops, char* base) {
    const int64_t rows = options.batch_tokens, steps = options.num_steps_ahead, hidden = config.hidden_size;
    const int64_t logit_rows = LogitRows(config, options, ops), stride = LogitStride(config);
    const auto take = [&](auto** place, int64_t count) {
      *place = base == nullptr ? nullptr : reinterpret_cast<std::remove_reference_t<decltype(*place)>>(base + bytes);
      bytes += RoundUp(count * static_cast<int64_t>(sizeof(**place)), kAlignment);
    };
    const auto matrix = [&](int64_t count, int64_t cols, DType dtype) {
      char* data = nullptr;
      take(&data, count * cols * ElementBytes(dtype));
      return TensorView{data, dtype, count, cols, cols};
    };
    take(&documents, rows);
    take(&token_ids, steps * rows);
    take(&row_position, steps * rows);
    take(&chain_steps, rows);
    take(&target_rows, steps * rows);
    take(&data_tokens, steps * rows);
    target_hidden = matrix(rows, hidden, activation_dtype);
    float_hidden = activation_dtype == DType::kFloat32 ? target_hidden : matrix(rows, hidden, DType::kFloat32);
    for (int64_t step = 0; step < steps; ++step) dhidden.push_back(matrix(rows, hidden, DType::kFloat32));
    targets = matrix(logit_rows, hidden, activation_dtype);
    drafts = matrix(logit_rows, hidden, DType::kFloat32);
    logits = matrix(logit_rows, stride, ops.logits_dtype()).Columns(0, config.vocab_size);
    take(&normalizers, logit_rows);
    take(&loss_rows, logit_rows);
    take(&row_weights, logit_rows);
  }

  int64_t bytes = 0;
  DocumentRows* documents = nullptr;
  uint32_t* token_ids = nullptr;
  int32_t* row_position = nullptr;
  int32_t* chain_steps = nullptr;
  int32_t* target_rows = nullptr;
  uint32_t* data_tokens = nullptr;
  TensorView target_hidden, float_hidden;  // [T, H]; the same memory where activations are float32
  std::vector<TensorView> dhidden;         // K of [T, H]
  TensorView targets, drafts;              // [logit rows, H] of a chunk, gathered; drafts become their gradients
  TensorView logits;                       // [logit rows, V]: of the targets, then of the drafts
  LogitNormalizer* normalizers = nullptr;
  DraftLossRow* loss_rows = nullptr;
  double* row_weights = nullptr;
};

// Of the largest operand of a product that the operators copy: gradients of logits, where these are not in bf16 already.
int64_t OperandValues(const ModelConfig& config, const TrainerOptions& options, const TrainingOps& ops) {
  const int64_t width = ops.logits_dtype() == DType::kFloat32 ? LogitStride(config) : config.hidden_size;
  return std::max(MtpBlock::OperandValues(config, options.batch_tokens), LogitRows(config, options, ops) * width);
}

struct MemoryPart {
  const char* name;
  int64_t bytes;
};
std::vector<MemoryPart> Parts(const ModelConfig& config, const TrainerOptions& options, DType weight_dtype,
                              DType activation_dtype, const TrainingOps& ops) {
  constexpr int64_t kFlatArrays = 4;  // parameters, gradients, two moments
  return {{"target pass", TargetPass::Bytes(config, weight_dtype, activation_dtype, options.batch_tokens)},
          {"MTP activations and packed weights", MtpBlock::Bytes(config, options.batch_tokens, options.num_steps_ahead, ops)},
          {"copies of operands", ops.OperandBytes(OperandValues(config, options, ops))},
          {"parameters, gradients and moments", kFlatArrays * MtpLayout(config).total * ElementBytes(DType::kFloat32)},
          {"transposed lm_head", ops.reads_columns() ? 0 : ops.PackedMatrixBytes(config.hidden_size, config.vocab_size)},
          {"batch and logits", Buffers(config, options, activation_dtype, ops, nullptr).bytes}};
}

absl::Status CheckOptions(const ModelConfig& config, const TrainerOptions& options, const DeviceMemory& memory,
                          const TrainingOps& ops) {
  const auto refuse = [](const char* name, const std::string& range, double value) {
    return absl::InvalidArgumentError(absl::StrCat("training: ", name, ": expected ", range, ", got ", value));
  };
  const auto within = [&](const char* name, double value, double least, double most) {
    if (value >= least && value <= most) return absl::OkStatus();
    return refuse(name, absl::StrCat(least, " to ", most), value);
  };
  const OptimizerOptions& optimizer = options.optimizer;
  const int32_t steps = options.num_steps_ahead;
  constexpr auto kMostTokens = static_cast<double>(TrainerLimits::kBatchTokens);
  BEBOP_RETURN_IF_ERROR(within("num_steps_ahead", steps, 1, MtpBlock::kMaxSteps));
  BEBOP_RETURN_IF_ERROR(within("batch_tokens", static_cast<double>(options.batch_tokens), TrainerLimits::LeastTokens(steps),
                               kMostTokens));
  if (options.batch_tokens > ops.MaxRows(config)) {
    return absl::InvalidArgumentError(absl::StrCat("training: batch_tokens (--batch-tokens): ", options.batch_tokens,
                                                   ", but attention on this device takes at most ", ops.MaxRows(config),
                                                   " rows at num_attention_heads ", config.num_attention_heads));
  }
  if (options.chunk_rows != 0) {
    BEBOP_RETURN_IF_ERROR(within("chunk_rows", static_cast<double>(options.chunk_rows), 2 * steps, kMostTokens));
  }
  BEBOP_RETURN_IF_ERROR(within("truncate_top_k", options.truncate_top_k, 0, config.vocab_size));
  BEBOP_RETURN_IF_ERROR(within("learning_rate", optimizer.learning_rate, 0, TrainerLimits::kLearningRate));
  BEBOP_RETURN_IF_ERROR(within("weight_decay", optimizer.weight_decay, 0, TrainerLimits::kWeightDecay));
  BEBOP_RETURN_IF_ERROR(within("clip_norm", optimizer.clip_norm, 0, TrainerLimits::kClipNorm));
  if (!(optimizer.beta1 >= 0 && optimizer.beta1 < 1)) return refuse("beta1", "0 or more and less than 1", optimizer.beta1);
  if (!(optimizer.beta2 >= 0 && optimizer.beta2 < 1)) return refuse("beta2", "0 or more and less than 1", optimizer.beta2);
  if (!(optimizer.epsilon > 0)) return refuse("epsilon", "more than 0", optimizer.epsilon);
  if (options.truncate_top_k > 0) {
    if (!memory.is_host()) return absl::UnimplementedError("training: truncate_top_k: this experiment is for the CPU alone");
    if (options.loss == DraftLoss::kCrossEntropy) {
      return absl::InvalidArgumentError(
          "training: truncate_top_k: expected a loss against the target's distribution, got cross-entropy");
    }
  }
  return absl::OkStatus();
}

class Trainer final : public MtpTrainer {
 public:
  Trainer(const ModelConfig& config, const ModelWeights* weights, Backend* backend, TrainingOps* ops,
          const TrainerOptions& options)
      : config_(config),
        options_(options),
        layout_(config),
        weights_(*weights),
        backend_(*backend),
        memory_(*backend->memory()),
        ops_(*ops) {}

  absl::Status Init(std::span<const float> parameters) {
    const DType activation_dtype = backend_.activation_dtype(weights_.embedding.dtype);
    BEBOP_RETURN_IF_ERROR(ops_.ReserveOperands(OperandValues(config_, options_, ops_)));
    BEBOP_ASSIGN_OR_RETURN(lm_head_storage_, TransposeLmHead());
    BEBOP_ASSIGN_OR_RETURN(target_, TargetPass::Create(config_, &weights_, &backend_, options_.batch_tokens));
    BEBOP_ASSIGN_OR_RETURN(block_, MtpBlock::Create(config_, options_.batch_tokens, options_.num_steps_ahead, &memory_, &ops_));
    BEBOP_ASSIGN_OR_RETURN(optimizer_, AdamW::Create(layout_, options_.optimizer, &memory_, &ops_));
    const int64_t flat_bytes = layout_.total * ElementBytes(DType::kFloat32);
    BEBOP_ASSIGN_OR_RETURN(flat_storage_, memory_.Allocate(2 * flat_bytes, "parameters and gradients"));
    parameters_ = static_cast<float*>(flat_storage_.get());
    gradients_ = parameters_ + layout_.total;
    const int64_t bytes = Buffers(config_, options_, activation_dtype, ops_, nullptr).bytes;
    BEBOP_ASSIGN_OR_RETURN(buffer_storage_, memory_.Allocate(bytes, "batch and logits"));
    buffers_.emplace(config_, options_, activation_dtype, ops_, static_cast<char*>(buffer_storage_.get()));
    memory_.CopyIn(parameters_, parameters.data(), flat_bytes);
    block_->SetParameters(parameters_);
    return memory_.status();
  }

  absl::StatusOr<TrainingReport> Step(std::span<const TrainingDocument* const> batch) override {
    return Run(batch, /*train=*/true);
  }
  absl::StatusOr<TrainingReport> Evaluate(std::span<const TrainingDocument* const> batch) override {
    return Run(batch, /*train=*/false);
  }

  State state() override {
    State state;
    state.step = step_;
    const auto take = [this](const float* from, std::vector<float>& to) {
      to.resize(static_cast<size_t>(layout_.total));
      memory_.CopyOut(to.data(), from, layout_.total * ElementBytes(DType::kFloat32));
    };
    take(parameters_, state.parameters);
    take(optimizer_->first_moment(), state.first_moment);
    take(optimizer_->second_moment(), state.second_moment);
    return state;
  }

  void SetState(const State& state) override {
    const auto put = [this](const std::vector<float>& from, float* to) {
      BEBOP_CHECK(static_cast<int64_t>(from.size()) == layout_.total);
      memory_.CopyIn(to, from.data(), layout_.total * ElementBytes(DType::kFloat32));
    };
    step_ = state.step;
    put(state.parameters, parameters_);
    put(state.first_moment, optimizer_->first_moment());
    put(state.second_moment, optimizer_->second_moment());
    block_->SetParameters(parameters_);
  }

  const MtpLayout& layout() const override { return layout_; }

 private:
  // What the chunks add up. By step, so that the order of the sums is that of the bases, however these are cut into chunks.
  struct Sums {
    explicit Sums(int32_t num_steps)
        : acceptance(static_cast<size_t>(num_steps)), target_entropy(acceptance), draft_entropy(acceptance), kl(acceptance) {}
    double loss = 0.0;
    bool finite = true;
    int64_t bad_row = -1;  // the first row of the batch whose chain is not finite
    std::vector<double> acceptance, target_entropy, draft_entropy, kl;
  };

  // lm_headᵀ for the gradients of hidden states, by way of a float32 copy in rows that lives no longer than this, where
  // products cannot read it as it lies.
  absl::StatusOr<std::shared_ptr<void>> TransposeLmHead() {
    if (ops_.reads_columns()) {
      lm_head_transposed_ = InColumns(weights_.lm_head);
      return std::shared_ptr<void>();
    }
    const int64_t vocab = config_.vocab_size, hidden = config_.hidden_size;
    BEBOP_ASSIGN_OR_RETURN(std::shared_ptr<void> packed,
                           memory_.Allocate(ops_.PackedMatrixBytes(hidden, vocab), "transposed lm_head"));
    BEBOP_ASSIGN_OR_RETURN(const std::shared_ptr<void> rows,
                           memory_.Allocate(vocab * hidden * ElementBytes(DType::kFloat32), "lm_head in float32"));
    BEBOP_ASSIGN_OR_RETURN(const std::shared_ptr<void> ids,
                           memory_.Allocate(kUnpackRows * ElementBytes(DType::kFloat32), "row numbers"));
    const TensorView matrix = FloatMatrix(static_cast<float*>(rows.get()), vocab, hidden);
    std::vector<uint32_t> numbers;
    for (int64_t row = 0; row < vocab; row += kUnpackRows) {
      const int64_t count = std::min(kUnpackRows, vocab - row);
      numbers.clear();
      for (int64_t i = 0; i < count; ++i) numbers.push_back(static_cast<uint32_t>(row + i));
      memory_.CopyIn(ids.get(), numbers.data(), count * static_cast<int64_t>(sizeof(uint32_t)));
      // The lookup of a token's row unpacks it, whatever the weights' dtype and layout.
      ops_.Embedding(
          {.token_ids = static_cast<const uint32_t*>(ids.get()), .table = weights_.lm_head, .out = matrix.Rows(row, count)});
    }
    lm_head_transposed_ = ops_.PackTransposed(matrix, packed.get());
    BEBOP_RETURN_IF_ERROR(memory_.status());  // and waits, before the copy goes
    return packed;
  }

  template <typename T>
  void Upload(const std::vector<T>& from, T* to) {
    memory_.CopyIn(to, from.data(), static_cast<int64_t>(from.size() * sizeof(T)));
  }

  absl::StatusOr<TrainingReport> Run(std::span<const TrainingDocument* const> batch, bool train) {
    const absl::Time start = absl::Now();
    int64_t rows = 0;
    for (const TrainingDocument* document : batch) rows += static_cast<int64_t>(document->token_ids.size());
    if (rows > options_.batch_tokens) {
      return absl::InvalidArgumentError(
          absl::StrCat("training: batch: expected at most ", options_.batch_tokens, " tokens, got ", rows));
    }
    const int32_t num_steps = options_.num_steps_ahead;
    PlanBatch(batch, options_.loss, num_steps, buffers_->logits.rows, &plan_);
    TrainingReport report;
    report.step = train ? step_ : 0;
    report.tokens = rows;
    report.terms = plan_.terms;
    report.rows = plan_.step_rows;
    report.acceptance.assign(static_cast<size_t>(num_steps), 0.0);
    if (plan_.terms == 0) return report;  // nothing that counts: no loss, and no step

    const MtpBatch chains = UploadPlan(rows);
    target_->Run(batch, buffers_->target_hidden.Rows(0, rows));
    if (buffers_->float_hidden.data != buffers_->target_hidden.data)
      ops_.Copy(buffers_->target_hidden.Rows(0, rows), chains.target_hidden);
    for (int32_t step = 1; step <= num_steps; ++step) block_->ForwardStep(chains, step);
    dhidden_.clear();
    for (const TensorView& view : buffers_->dhidden) dhidden_.push_back(view.Rows(0, rows));
    if (train) {
      for (const TensorView& view : dhidden_) ops_.Clear(view);
    }
    Sums sums(num_steps);
    for (const LogitChunk& chunk : plan_.chunks) RunChunk(chunk, train, &sums);
    Finish(sums, &report);
    BEBOP_RETURN_IF_ERROR(memory_.status());
    if (!sums.finite) return NotFinite(batch, train, sums, 0.0);
    if (train) {
      ops_.Clear(FloatMatrix(gradients_, 1, layout_.total));
      block_->Backward(chains, num_steps, dhidden_.data(), gradients_);
      report.gradient_norm = optimizer_->Norm(gradients_);
      BEBOP_RETURN_IF_ERROR(memory_.status());
      if (!std::isfinite(report.gradient_norm)) return NotFinite(batch, train, sums, report.gradient_norm);
      ++step_;
      optimizer_->Step(step_, report.gradient_norm, gradients_, parameters_);
      block_->SetParameters(parameters_);
      BEBOP_RETURN_IF_ERROR(memory_.status());
      report.step = step_;
      report.learning_rate = LearningRate(options_.optimizer, step_);
    }
    report.gemm_flops = GemmFlops(rows, train);
    report.seconds = absl::ToDoubleSeconds(absl::Now() - start);
    return report;
  }

  MtpBatch UploadPlan(int64_t rows) {
    Upload(plan_.documents, buffers_->documents);
    Upload(plan_.token_ids, buffers_->token_ids);
    Upload(plan_.row_position, buffers_->row_position);
    Upload(plan_.steps, buffers_->chain_steps);
    Upload(plan_.target_rows, buffers_->target_rows);
    Upload(plan_.data_tokens, buffers_->data_tokens);
    return {.documents = buffers_->documents,
            .num_documents = static_cast<int32_t>(plan_.documents.size()),
            .num_rows = rows,
            .token_ids = buffers_->token_ids,
            .row_position = buffers_->row_position,
            .target_hidden = buffers_->float_hidden.Rows(0, rows),
            .embedding = weights_.embedding};
  }

  // The losses of a chunk's chains, and with `train` the gradients of their hidden states. An end-to-end loss weighs a step by
  // all acceptances of its chain, so all steps of a base are in one chunk.
  void RunChunk(const LogitChunk& chunk, bool train, Sums* sums) {
    const int32_t num_steps = options_.num_steps_ahead;
    const int64_t num_drafts = num_steps * chunk.num_bases, first = num_steps * chunk.first_base;
    const TensorView targets = buffers_->targets.Rows(0, chunk.num_targets), drafts = buffers_->drafts.Rows(0, num_drafts);
    const TensorView target_logits = buffers_->logits.Rows(0, chunk.num_targets);
    const TensorView draft_logits = buffers_->logits.Rows(chunk.num_targets, num_drafts);
    const std::span runs(plan_.runs.data() + chunk.first_run, static_cast<size_t>(chunk.num_runs));
    int64_t base = 0, target = 0;
    for (const BaseRun& run : runs) {
      memory_.Copy(targets.Rows(target, 1).data, buffers_->target_hidden.Rows(run.first_target, 1).data,
                   run.num_targets * config_.hidden_size * ElementBytes(targets.dtype));
      for (int32_t step = 1; step <= num_steps; ++step) {
        ops_.Copy(block_->hidden(step).Rows(run.first_row, run.num_bases),
                  drafts.Rows((step - 1) * chunk.num_bases + base, run.num_bases));
      }
      base += run.num_bases;
      target += run.num_targets;
    }
    backend_.ops()->Linear({.x = targets, .w = weights_.lm_head, .y = target_logits});
    ops_.Linear({.x = drafts, .w = weights_.lm_head, .y = draft_logits});
    if (options_.truncate_top_k > 0)
      TruncateLogits(options_.truncate_top_k, target_logits, buffers_->target_rows + first, draft_logits);
    ops_.Normalize(target_logits, buffers_->normalizers);
    const DraftLossArgs forward = {.loss = options_.loss,
                                   .draft = draft_logits,
                                   .target = target_logits,
                                   .target_normalizers = buffers_->normalizers,
                                   .target_rows = buffers_->target_rows + first,
                                   .tokens = buffers_->data_tokens + first,
                                   .rows = buffers_->loss_rows};
    ops_.DraftLossForward(forward);
    const ChainLossResult result = ops_.BatchLoss({.loss = options_.loss,
                                                   .num_bases = static_cast<int32_t>(chunk.num_bases),
                                                   .num_steps = num_steps,
                                                   .rows = buffers_->loss_rows,
                                                   .steps = buffers_->chain_steps + chunk.first_base,
                                                   .scale = 1.0 / static_cast<double>(plan_.terms),
                                                   .row_weights = buffers_->row_weights});
    AddRows(chunk, result, sums);
    if (!train || !sums->finite) return;
    ops_.DraftLossBackward({.forward = forward, .row_weights = buffers_->row_weights, .gradient = draft_logits});
    ops_.Linear({.x = draft_logits, .w = lm_head_transposed_, .y = drafts});
    base = 0;
    for (const BaseRun& run : runs) {
      for (int32_t step = 1; step <= num_steps; ++step) {
        ops_.Copy(drafts.Rows((step - 1) * chunk.num_bases + base, run.num_bases),
                  dhidden_[static_cast<size_t>(step - 1)].Rows(run.first_row, run.num_bases));
      }
      base += run.num_bases;
    }
  }

  void AddRows(const LogitChunk& chunk, const ChainLossResult& result, Sums* sums) {
    const int32_t num_steps = options_.num_steps_ahead;
    host_rows_.resize(static_cast<size_t>(num_steps * chunk.num_bases));
    memory_.CopyOut(host_rows_.data(), buffers_->loss_rows, static_cast<int64_t>(host_rows_.size() * sizeof(DraftLossRow)));
    sums->loss += result.loss;
    sums->finite = sums->finite && result.finite;
    size_t at = 0;
    for (int32_t step = 0; step < num_steps; ++step) {
      const auto k = static_cast<size_t>(step);
      for (int64_t r = chunk.first_run; r < chunk.first_run + chunk.num_runs; ++r) {
        const BaseRun& run = plan_.runs[static_cast<size_t>(r)];
        for (int64_t i = 0; i < run.num_bases; ++i, ++at) {
          const DraftLossRow& row = host_rows_[at];
          if (plan_.target_rows[static_cast<size_t>(num_steps * chunk.first_base) + at] < 0) continue;
          if (!row.finite && sums->bad_row < 0) sums->bad_row = run.first_row + i;
          sums->acceptance[k] += row.acceptance;
          sums->target_entropy[k] += row.target_entropy;
          sums->draft_entropy[k] += row.draft_entropy;
          sums->kl[k] += row.kl;
        }
      }
    }
  }

  void Finish(const Sums& sums, TrainingReport* report) const {
    report->loss = sums.loss;
    double rows = 0;
    for (size_t k = 0; k < report->rows.size(); ++k) {
      if (report->rows[k] == 0) continue;
      rows += static_cast<double>(report->rows[k]);
      report->acceptance[k] = sums.acceptance[k] / static_cast<double>(report->rows[k]);
      report->target_entropy += sums.target_entropy[k];
      report->draft_entropy += sums.draft_entropy[k];
      report->kl += sums.kl[k];
    }
    report->target_entropy /= rows;
    report->draft_entropy /= rows;
    report->kl /= rows;
  }

  absl::Status NotFinite(std::span<const TrainingDocument* const> batch, bool train, const Sums& sums, double norm) const {
    std::string first;
    for (size_t i = 0; i < batch.size() && sums.bad_row >= 0; ++i) {
      const DocumentRows& rows = plan_.documents[i];
      if (sums.bad_row < rows.first_row || sums.bad_row >= rows.first_row + rows.num_rows) continue;
      first = absl::StrCat(", first in the chain of token ", sums.bad_row - rows.first_row, " of line ", batch[i]->line);
    }
    const auto line = [](std::string* out, const TrainingDocument* document) { absl::StrAppend(out, document->line); };
    const std::string place = train ? absl::StrCat("step ", step_ + 1) : absl::StrCat("evaluation after step ", step_);
    const std::string what = sums.finite
                                 ? absl::StrCat("loss ", sums.loss, ", but the gradient norm is ", norm)
                                 : absl::StrCat("the loss is not finite", train ? ", and the gradient norm not taken" : "");
    return absl::DataLossError(
        absl::StrCat("training: ", place, ": ", what, first, "; documents of lines ", absl::StrJoin(batch, ", ", line)));
  }

  double GemmFlops(int64_t rows, bool train) const {
    const double steps = options_.num_steps_ahead, hidden = config_.hidden_size, tokens = static_cast<double>(rows);
    const double weights = 2 * hidden * hidden + static_cast<double>(layout_.qkv_width()) * hidden +
                           hidden * static_cast<double>(layout_.query_width) + 3 * hidden * static_cast<double>(layout_.ffn);
    double logits = 0;
    for (const LogitChunk& chunk : plan_.chunks) {
      logits += static_cast<double>(chunk.num_targets) + static_cast<double>(chunk.num_bases) * steps * (train ? 2 : 1);
    }
    return tokens * target_->RowFlops() + 2 * tokens * steps * weights * (train ? 3 : 1) +
           2 * logits * hidden * config_.vocab_size;
  }

  const ModelConfig config_;
  const TrainerOptions options_;
  const MtpLayout layout_;
  const ModelWeights& weights_;
  Backend& backend_;
  DeviceMemory& memory_;
  TrainingOps& ops_;
  std::shared_ptr<void> lm_head_storage_, flat_storage_, buffer_storage_;
  PackedMatrix lm_head_transposed_;
  std::unique_ptr<TargetPass> target_;
  std::unique_ptr<MtpBlock> block_;
  std::unique_ptr<AdamW> optimizer_;
  std::optional<Buffers> buffers_;
  float* parameters_ = nullptr;  // [layout.total]
  float* gradients_ = nullptr;
  int64_t step_ = 0;
  BatchPlan plan_;  // of the latest batch
  std::vector<TensorView> dhidden_;
  std::vector<DraftLossRow> host_rows_;
};

}  // namespace

int64_t MtpTrainer::Bytes(const ModelConfig& config, const TrainerOptions& options, DType weight_dtype, const Backend& backend,
                          const TrainingOps& ops) {
  int64_t bytes = 0;
  for (const MemoryPart& part : Parts(config, options, weight_dtype, backend.activation_dtype(weight_dtype), ops))
    bytes += part.bytes;
  return bytes;
}

absl::StatusOr<std::unique_ptr<MtpTrainer>> MtpTrainer::Create(const ModelConfig& config, const ModelWeights* weights,
                                                               Backend* backend, TrainingOps* ops, const TrainerOptions& options,
                                                               std::span<const float> parameters) {
  BEBOP_RETURN_IF_ERROR(ops->CheckModel(config, weights->embedding.dtype));
  BEBOP_RETURN_IF_ERROR(CheckOptions(config, options, *backend->memory(), *ops));
  const int64_t total = MtpLayout(config).total;
  if (static_cast<int64_t>(parameters.size()) != total) {
    return absl::InvalidArgumentError(absl::StrCat("training: parameters: expected ", total, " values, got ", parameters.size()));
  }
  auto trainer = std::make_unique<Trainer>(config, weights, backend, ops, options);
  absl::Status status = trainer->Init(parameters);
  if (status.ok()) return trainer;
  if (status.code() != absl::StatusCode::kResourceExhausted) return status;
  const DType dtype = weights->embedding.dtype;
  const auto part = [](std::string* out, const MemoryPart& part) { absl::StrAppend(out, part.name, " ", part.bytes); };
  return absl::ResourceExhaustedError(
      absl::StrCat(status.message(), "; training takes, in bytes: ",
                   absl::StrJoin(Parts(config, options, dtype, backend->activation_dtype(dtype), *ops), ", ", part)));
}

}  // namespace bebop
