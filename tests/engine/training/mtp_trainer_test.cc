// SPDX-License-Identifier: Apache-2.0
#include "engine/training/mtp_trainer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "tests/engine/training/training_test_util.h"
#include "tests/kernels/kernel_test_util.h"

// What a step computes is judged by autograd in tests/oracle/trainer_test.py; here is what needs no oracle.
namespace bebop {
namespace {

using testing::Random;
using testing::SameBits;
using testing::TrainerHarness;

constexpr char kTinyModel[] = "tests/models/bebop-tiny";
constexpr int32_t kSteps = 3;

ModelConfig SmallConfig() {
  ModelConfig config;
  config.hidden_size = 40;
  config.intermediate_size = 56;
  config.vocab_size = 131;
  config.layers = {LayerKind::kLinearAttention, LayerKind::kFullAttention};
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 16;
  config.rotary_dim = 8;
  config.linear_num_key_heads = 2;
  config.linear_num_value_heads = 6;
  config.linear_key_head_dim = 20;
  config.linear_value_head_dim = 36;
  config.linear_conv_kernel_dim = 4;
  config.num_mtp_layers = 1;
  config.max_position_embeddings = 4096;
  return config;
}

struct Batch {
  std::vector<std::unique_ptr<TrainingDocument>> documents;
  std::vector<const TrainingDocument*> pointers;

  void Add(int32_t length, int32_t loss_start, Random& random, int32_t vocab_size = 131) {
    auto document = std::make_unique<TrainingDocument>();
    for (int32_t i = 0; i < length; ++i) document->token_ids.push_back(static_cast<uint32_t>(random.Below(vocab_size)));
    document->loss_start = loss_start;
    document->line = 10 * (static_cast<int64_t>(documents.size()) + 1);
    pointers.push_back(document.get());
    documents.push_back(std::move(document));
  }
};

Batch MakeBatch(const std::vector<std::pair<int32_t, int32_t>>& shapes) {
  Random random(17);
  Batch batch;
  for (const auto& [length, loss_start] : shapes) batch.Add(length, loss_start, random);
  return batch;
}

TrainerOptions SmallOptions(DraftLoss loss = DraftLoss::kEndToEndTotalVariation) {
  TrainerOptions options;
  options.loss = loss;
  options.num_steps_ahead = kSteps;
  options.batch_tokens = 512;
  options.optimizer.learning_rate = 1e-3;
  return options;
}

constexpr DraftLoss kLosses[] = {
    DraftLoss::kCrossEntropy,           DraftLoss::kKl, DraftLoss::kReverseKl, DraftLoss::kTotalVariation,
    DraftLoss::kEndToEndTotalVariation, DraftLoss::kLk};

TEST(MtpTrainerTest, ThreadsAndChunksChangeNoBitOfTheParameters) {
  const Batch batch = MakeBatch({{70, 20}, {9, 0}, {130, 100}, {33, 2}});
  for (const DraftLoss loss : {DraftLoss::kKl, DraftLoss::kEndToEndTotalVariation}) {
    std::vector<float> expected;
    double expected_loss = 0;
    for (const auto& [threads, chunk_rows] :
         std::vector<std::pair<int, int64_t>>{{1, 0}, {2, 0}, {3, 2 * kSteps}, {2, 50}, {1, 201}}) {
      TrainerHarness harness(SmallConfig(), DType::kBFloat16, threads);
      TrainerOptions options = SmallOptions(loss);
      options.chunk_rows = chunk_rows;
      auto trainer = harness.Make(options);
      ASSERT_TRUE(trainer.ok()) << trainer.status();
      double loss_sum = 0;
      for (int step = 0; step < 3; ++step) {
        const auto report = (*trainer)->Step(batch.pointers);
        ASSERT_TRUE(report.ok()) << report.status();
        loss_sum += report->loss;
      }
      const std::vector<float> parameters = (*trainer)->state().parameters;
      if (expected.empty()) {
        expected = parameters;
        expected_loss = loss_sum;
        EXPECT_FALSE(SameBits(parameters, harness.parameters));
      }
      EXPECT_TRUE(SameBits(parameters, expected)) << threads << " threads, " << chunk_rows << " rows";
      EXPECT_NEAR(loss_sum, expected_loss, 1e-12);
    }
  }
}

TEST(MtpTrainerTest, ResumesWithTheSameBits) {
  const Batch first = MakeBatch({{70, 20}, {19, 0}}), second = MakeBatch({{40, 4}});
  TrainerHarness harness(SmallConfig(), DType::kFloat32, 2);
  TrainerOptions options = SmallOptions();
  options.optimizer.warmup_steps = 3;
  options.optimizer.weight_decay = 0.1;
  const auto run = [&](MtpTrainer& trainer) {
    ASSERT_TRUE(trainer.Step(first.pointers).ok());
    ASSERT_TRUE(trainer.Step(second.pointers).ok());
  };
  auto straight = harness.Make(options), stopped = harness.Make(options), resumed = harness.Make(options);
  ASSERT_TRUE(straight.ok() && stopped.ok() && resumed.ok());
  run(**straight);
  run(**straight);
  run(**stopped);
  (*resumed)->SetState((*stopped)->state());
  run(**resumed);
  const MtpTrainer::State expected = (*straight)->state(), actual = (*resumed)->state();
  EXPECT_EQ(actual.step, 4);
  EXPECT_EQ(actual.step, expected.step);
  EXPECT_TRUE(SameBits(actual.parameters, expected.parameters));
  EXPECT_TRUE(SameBits(actual.first_moment, expected.first_moment));
  EXPECT_TRUE(SameBits(actual.second_moment, expected.second_moment));
  EXPECT_FALSE(SameBits(actual.parameters, (*stopped)->state().parameters));
}

// Packing is only that: a batch is the mean of its documents, weighted by their terms, and so is its gradient. 20 documents are
// more than one pass of the target takes.
TEST(MtpTrainerTest, ABatchIsTheMeanOfItsDocuments) {
  for (const DraftLoss loss : kLosses) {
    std::vector<std::pair<int32_t, int32_t>> shapes = {{70, 20}, {33, 0}};
    for (int32_t i = 0; i < 18; ++i) shapes.emplace_back(5 + i % 4, i % 5);
    const Batch batch = MakeBatch(shapes);
    TrainerHarness harness(SmallConfig(), DType::kFloat32, 2);
    TrainerOptions options = SmallOptions(loss);
    options.optimizer.beta1 = 0.0;  // so that the first moment is the gradient
    options.optimizer.clip_norm = 0.0;
    const auto run = [&](std::span<const TrainingDocument* const> documents, std::vector<float>* gradient) {
      auto trainer = harness.Make(options);
      EXPECT_TRUE(trainer.ok()) << trainer.status();
      const auto report = (*trainer)->Step(documents);
      EXPECT_TRUE(report.ok()) << report.status();
      *gradient = (*trainer)->state().first_moment;
      return *report;
    };
    std::vector<float> packed;
    const TrainingReport whole = run(batch.pointers, &packed);
    double sum = 0;
    int64_t terms = 0;
    std::vector<double> gradient(packed.size()), acceptance(kSteps);
    std::vector<int64_t> rows(kSteps);
    for (const TrainingDocument* document : batch.pointers) {
      std::vector<float> own;
      const TrainingReport report = run({&document, 1}, &own);
      terms += report.terms;
      sum += static_cast<double>(report.terms) * report.loss;
      for (size_t i = 0; i < own.size(); ++i) gradient[i] += static_cast<double>(report.terms) * own[i];
      for (size_t k = 0; k < kSteps; ++k) {
        rows[k] += report.rows[k];
        acceptance[k] += static_cast<double>(report.rows[k]) * report.acceptance[k];
      }
    }
    EXPECT_EQ(whole.terms, terms);
    EXPECT_EQ(whole.rows, rows);
    EXPECT_NEAR(whole.loss, sum / static_cast<double>(terms), 1e-7 * std::abs(whole.loss));
    for (size_t k = 0; k < kSteps; ++k) EXPECT_NEAR(whole.acceptance[k], acceptance[k] / static_cast<double>(rows[k]), 1e-7);
    double difference = 0, norm = 0;
    for (size_t i = 0; i < packed.size(); ++i) {
      const double mean = gradient[i] / static_cast<double>(terms);
      difference += (packed[i] - mean) * (packed[i] - mean);
      norm += mean * mean;
    }
    EXPECT_LE(std::sqrt(difference / norm), 1e-5) << static_cast<int>(loss);
    EXPECT_NEAR(whole.gradient_norm, std::sqrt(norm), 1e-5 * std::sqrt(norm));
  }
}

TEST(MtpTrainerTest, EvaluationReportsAStepThatItDoesNotTake) {
  const Batch batch = MakeBatch({{70, 20}, {33, 0}});
  for (const DraftLoss loss : kLosses) {
    TrainerHarness harness(SmallConfig(), DType::kBFloat16, 1);
    auto trainer = harness.Make(SmallOptions(loss));
    ASSERT_TRUE(trainer.ok()) << trainer.status();
    const auto before = (*trainer)->Evaluate(batch.pointers);
    ASSERT_TRUE(before.ok()) << before.status();
    EXPECT_TRUE(SameBits((*trainer)->state().parameters, harness.parameters));
    EXPECT_EQ((*trainer)->state().step, 0);
    const auto step = (*trainer)->Step(batch.pointers);
    ASSERT_TRUE(step.ok()) << step.status();
    EXPECT_EQ(step->step, 1);
    EXPECT_EQ(before->loss, step->loss);
    EXPECT_EQ(before->acceptance, step->acceptance);
    EXPECT_EQ(before->target_entropy, step->target_entropy);
    EXPECT_EQ(before->draft_entropy, step->draft_entropy);
    EXPECT_EQ(before->kl, step->kl);
    EXPECT_EQ(before->terms, step->terms);
    EXPECT_EQ(before->tokens, 103);
    EXPECT_GT(step->gradient_norm, 0);
    EXPECT_EQ(before->gradient_norm, 0);
    EXPECT_GT(step->gemm_flops, before->gemm_flops);
    EXPECT_GT(step->seconds, 0);
  }
}

TEST(MtpTrainerTest, TheLossOfTheBundledModelFalls) {
  TrainerHarness harness(kTinyModel, DType::kBFloat16, 2);
  Random random(5);
  Batch batch;
  for (const int32_t length : {100, 64, 9}) batch.Add(length, length / 4, random, harness.config().vocab_size);
  TrainerOptions options = SmallOptions();
  options.optimizer.learning_rate = 3e-4;
  auto trainer = harness.Make(options);
  ASSERT_TRUE(trainer.ok()) << trainer.status();
  const double start = (*trainer)->Evaluate(batch.pointers)->loss;
  double last = start;
  for (int step = 0; step < 8; ++step) ASSERT_TRUE((*trainer)->Step(batch.pointers).ok());
  last = (*trainer)->Evaluate(batch.pointers)->loss;
  EXPECT_LT(last, start - 0.01);
  EXPECT_LT(start, 1.0);
  EXPECT_GT(last, 0.0);
}

TEST(MtpTrainerTest, ALossThatIsNotFiniteChangesNothingAndNamesTheDocuments) {
  const Batch batch = MakeBatch({{20, 0}, {33, 0}, {12, 4}});
  TrainerHarness harness(SmallConfig(), DType::kFloat32, 2);
  harness.parameters[static_cast<size_t>(MtpLayout(SmallConfig()).down)] = testing::kNan;
  auto trainer = harness.Make(SmallOptions());
  ASSERT_TRUE(trainer.ok()) << trainer.status();
  const auto report = (*trainer)->Step(batch.pointers);
  EXPECT_EQ(report.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(absl::StrContains(report.status().message(), "step 1")) << report.status();
  EXPECT_TRUE(absl::StrContains(report.status().message(), "the loss is not finite")) << report.status();
  EXPECT_TRUE(absl::StrContains(report.status().message(), "token 0 of line 10")) << report.status();
  EXPECT_TRUE(absl::StrContains(report.status().message(), "lines 10, 20, 30")) << report.status();
  const absl::Status evaluation = (*trainer)->Evaluate(batch.pointers).status();
  EXPECT_EQ(evaluation.code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(absl::StrContains(evaluation.message(), "evaluation after step 0: the loss is not finite, first")) << evaluation;
  const MtpTrainer::State state = (*trainer)->state();
  EXPECT_EQ(state.step, 0);
  EXPECT_TRUE(SameBits(state.parameters, harness.parameters));
  for (const float value : state.first_moment) ASSERT_EQ(value, 0.0f);

  // It goes on once the weights are good again.
  TrainerHarness good(SmallConfig(), DType::kFloat32, 2);
  MtpTrainer::State repaired = state;
  repaired.parameters = good.parameters;
  (*trainer)->SetState(repaired);
  const auto after = (*trainer)->Step(batch.pointers);
  ASSERT_TRUE(after.ok()) << after.status();
  auto fresh = good.Make(SmallOptions());
  EXPECT_EQ((*fresh)->Step(batch.pointers)->loss, after->loss);
  EXPECT_TRUE(SameBits((*fresh)->state().parameters, (*trainer)->state().parameters));
}

// Operators of the CPU, but for a norm that is what it is told.
class BrokenNorm final : public TrainingOps {
 public:
  explicit BrokenNorm(TrainingOps* ops) : ops_(*ops) {}
  absl::Status CheckModel(const ModelConfig& config, DType dtype) const override { return ops_.CheckModel(config, dtype); }
  absl::Status ReserveOperands(int64_t values) override { return ops_.ReserveOperands(values); }
  int64_t OperandBytes(int64_t values) const override { return ops_.OperandBytes(values); }
  int64_t PackedMatrixBytes(int64_t rows, int64_t cols) const override { return ops_.PackedMatrixBytes(rows, cols); }
  PackedMatrix Pack(const TensorView& w, void* destination) override { return ops_.Pack(w, destination); }
  PackedMatrix PackTransposed(const TensorView& w, void* destination) override { return ops_.PackTransposed(w, destination); }
  void Linear(const LinearArgs& args) override { ops_.Linear(args); }
  void LinearBackwardWeight(const LinearBackwardWeightArgs& args) override { ops_.LinearBackwardWeight(args); }
  void Embedding(const EmbeddingArgs& args) override { ops_.Embedding(args); }
  void RmsNorm(const RmsNormArgs& args) override { ops_.RmsNorm(args); }
  void RmsNormBackward(const RmsNormBackwardArgs& args) override { ops_.RmsNormBackward(args); }
  void SwiGlu(const SwiGluArgs& args) override { ops_.SwiGlu(args); }
  void SwiGluBackward(const SwiGluBackwardArgs& args) override { ops_.SwiGluBackward(args); }
  void QkNormRope(const QkNormRopeArgs& args) override { ops_.QkNormRope(args); }
  void QkNormRopeBackward(const QkNormRopeBackwardArgs& args) override { ops_.QkNormRopeBackward(args); }
  void ChainAttention(const ChainAttentionArgs& args) override { ops_.ChainAttention(args); }
  void ChainAttentionBackward(const ChainAttentionBackwardArgs& args) override { ops_.ChainAttentionBackward(args); }
  void Copy(const TensorView& from, const TensorView& to) override { ops_.Copy(from, to); }
  void Clear(const TensorView& view) override { ops_.Clear(view); }
  DType logits_dtype() const override { return ops_.logits_dtype(); }
  void Normalize(const TensorView& logits, LogitNormalizer* normalizers) override { ops_.Normalize(logits, normalizers); }
  void DraftLossForward(const DraftLossArgs& args) override { ops_.DraftLossForward(args); }
  void DraftLossBackward(const DraftLossGradientArgs& args) override { ops_.DraftLossBackward(args); }
  ChainLossResult BatchLoss(const ChainLossArgs& args) override { return ops_.BatchLoss(args); }
  double SquaredNorm(const float* values, int64_t count) override { return norm != 0 ? norm : ops_.SquaredNorm(values, count); }
  void AdamWUpdate(const AdamWArgs& args) override { ops_.AdamWUpdate(args); }

  double norm = 0;

 private:
  TrainingOps& ops_;
};

TEST(MtpTrainerTest, AGradientThatIsNotFiniteChangesNothing) {
  const Batch batch = MakeBatch({{20, 0}, {33, 0}});
  TrainerHarness harness(SmallConfig(), DType::kFloat32, 2);
  BrokenNorm ops(&harness.ops());
  auto trainer =
      MtpTrainer::Create(harness.config(), &harness.weights(), &harness.backend(), &ops, SmallOptions(), harness.parameters);
  ASSERT_TRUE(trainer.ok()) << trainer.status();
  for (const double norm : {static_cast<double>(testing::kNan), HUGE_VAL}) {
    ops.norm = norm;
    const auto report = (*trainer)->Step(batch.pointers);
    EXPECT_EQ(report.status().code(), absl::StatusCode::kDataLoss);
    EXPECT_TRUE(absl::StrContains(report.status().message(), std::isnan(norm) ? "gradient norm is nan" : "gradient norm is inf"))
        << report.status();
    EXPECT_TRUE(absl::StrContains(report.status().message(), "lines 10, 20")) << report.status();
    EXPECT_TRUE(SameBits((*trainer)->state().parameters, harness.parameters));
    EXPECT_EQ((*trainer)->state().step, 0);
  }
  // What the broken step left behind is not in the next one.
  ops.norm = 0;
  auto fresh = harness.Make(SmallOptions());
  ASSERT_TRUE((*trainer)->Step(batch.pointers).ok() && (*fresh)->Step(batch.pointers).ok());
  EXPECT_TRUE(SameBits((*fresh)->state().parameters, (*trainer)->state().parameters));
}

TEST(MtpTrainerTest, ABatchWithNothingThatCountsIsNoStep) {
  const Batch batch = MakeBatch({{20, 19}, {kSteps, 0}});  // no chain fits after token 19, and none in the second document
  TrainerHarness harness(SmallConfig(), DType::kFloat32, 1);
  auto trainer = harness.Make(SmallOptions());
  ASSERT_TRUE(trainer.ok()) << trainer.status();
  const auto report = (*trainer)->Step(batch.pointers);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->terms, 0);
  EXPECT_EQ(report->step, 0);
  EXPECT_EQ(report->tokens, 23);
  EXPECT_TRUE(SameBits((*trainer)->state().parameters, harness.parameters));
}

TEST(MtpTrainerTest, ErrorsNameTheOptionAndBothValues) {
  TrainerHarness harness(SmallConfig(), DType::kFloat32, 1);
  const auto expect = [&](const TrainerOptions& options, const std::vector<std::string>& parts) {
    const absl::Status status = harness.Make(options).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    for (const std::string& part : parts) EXPECT_TRUE(absl::StrContains(status.message(), part)) << status;
  };
  TrainerOptions options = SmallOptions();
  options.num_steps_ahead = 9;
  expect(options, {"num_steps_ahead", "1 to 8", "9"});
  options = SmallOptions();
  options.batch_tokens = 4;
  expect(options, {"batch_tokens", "5", "4"});
  options = SmallOptions();
  options.chunk_rows = 5;
  expect(options, {"chunk_rows", "6", "5"});
  options = SmallOptions();
  options.truncate_top_k = 132;
  expect(options, {"truncate_top_k", "131", "132"});
  options = SmallOptions(DraftLoss::kCrossEntropy);
  options.truncate_top_k = 5;
  expect(options, {"truncate_top_k", "cross-entropy"});
  options = SmallOptions();
  options.optimizer.learning_rate = testing::kNan;
  expect(options, {"learning_rate", "nan"});
  options = SmallOptions();
  options.optimizer.beta2 = 1.0;
  expect(options, {"beta2", "less than 1", "1"});

  harness.parameters.pop_back();
  expect(SmallOptions(),
         {"parameters", std::to_string(harness.parameters.size()), std::to_string(harness.parameters.size() + 1)});

  TrainerHarness other(SmallConfig(), DType::kFloat32, 1);
  auto trainer = other.Make(SmallOptions());
  const Batch batch = MakeBatch({{300, 0}, {213, 0}});
  const absl::Status status = (*trainer)->Step(batch.pointers).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(absl::StrContains(status.message(), "512") && absl::StrContains(status.message(), "513")) << status;
}

// Host memory that counts, and has a limit.
class CountedMemory final : public DeviceMemory {
 public:
  bool is_host() const override { return true; }
  absl::StatusOr<std::shared_ptr<void>> Allocate(int64_t bytes, std::string_view what) override {
    if (live + bytes > limit) return absl::ResourceExhaustedError(std::string(what) + ": no more");
    auto memory = host_->Allocate(bytes, what);
    if (!memory.ok()) return memory;
    live += bytes;
    return std::shared_ptr<void>(memory->get(), [this, bytes, owner = *memory](void*) { live -= bytes; });
  }
  void CopyIn(void* destination, const void* source, int64_t bytes) override { host_->CopyIn(destination, source, bytes); }
  void CopyOut(void* destination, const void* source, int64_t bytes) override { host_->CopyOut(destination, source, bytes); }
  void Copy(void* destination, const void* source, int64_t bytes) override { host_->Copy(destination, source, bytes); }
  int64_t available_bytes() const override { return host_->available_bytes(); }
  absl::Status status() const override { return absl::OkStatus(); }

  int64_t live = 0;
  int64_t limit = int64_t{1} << 40;

 private:
  const std::unique_ptr<DeviceMemory> host_ = MakeHostMemory();
};

class CountedBackend final : public Backend {
 public:
  CountedBackend(Backend* backend, CountedMemory* memory) : backend_(*backend), memory_(*memory) {}
  const std::string& name() const override { return backend_.name(); }
  DeviceMemory* memory() override { return &memory_; }
  absl::StatusOr<std::unique_ptr<DeviceMemory>> NewMemory() override { return backend_.NewMemory(); }
  Ops* ops() override { return backend_.ops(); }
  cuda::Stream* stream() override { return backend_.stream(); }
  DType activation_dtype(DType dtype) const override { return backend_.activation_dtype(dtype); }
  absl::Status CheckShapes(const ModelConfig& config, DType dtype) const override { return backend_.CheckShapes(config, dtype); }
  absl::StatusOr<EngineSizes> Sizes(const EngineOptions& options, const ModelConfig& config, int64_t bytes) override {
    return backend_.Sizes(options, config, bytes);
  }
  absl::StatusOr<std::unique_ptr<Executor>> MakeExecutor(const EngineOptions& options, const ModelConfig& config,
                                                         const EngineSizes& sizes, Model* model,
                                                         ModelStateStorage* storage) override {
    return backend_.MakeExecutor(options, config, sizes, model, storage);
  }
  void EnterThread() override { backend_.EnterThread(); }

 private:
  Backend& backend_;
  CountedMemory& memory_;
};

TEST(MtpTrainerTest, TakesTheMemoryThatItSays) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    TrainerHarness harness(SmallConfig(), dtype, 1);
    CountedMemory memory;
    CountedBackend backend(&harness.backend(), &memory);
    TrainerOptions options = SmallOptions();
    options.batch_tokens = 1024;
    {
      auto trainer =
          MtpTrainer::Create(harness.config(), &harness.weights(), &backend, &harness.ops(), options, harness.parameters);
      ASSERT_TRUE(trainer.ok()) << trainer.status();
      const int64_t bytes = MtpTrainer::Bytes(harness.config(), options, dtype, backend, harness.ops());
      // The operators keep one of the parts themselves: the gradient of the logits as the product reads it. The rest differs by
      // the alignment of the caches' arrays.
      const int64_t operand = harness.ops().OperandBytes(1024 * (kSteps + 1) * 160);
      EXPECT_NEAR(static_cast<double>(memory.live + operand), static_cast<double>(bytes), 16 * 1024);
      EXPECT_GT(bytes, 4 << 20);
      const Batch batch = MakeBatch({{600, 0}, {400, 30}});
      const int64_t before = memory.live;
      ASSERT_TRUE((*trainer)->Step(batch.pointers).ok());
      EXPECT_EQ(memory.live, before);
    }
    EXPECT_EQ(memory.live, 0);
    memory.limit = 3 << 20;
    const auto refused =
        MtpTrainer::Create(harness.config(), &harness.weights(), &backend, &harness.ops(), options, harness.parameters);
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
    for (const char* part : {"target pass ", "moments ", "lm_head ", "logits "}) {
      EXPECT_TRUE(absl::StrContains(refused.status().message(), part)) << refused.status();
    }
    EXPECT_EQ(memory.live, 0);
  }
}

}  // namespace
}  // namespace bebop
