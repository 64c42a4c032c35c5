// SPDX-License-Identifier: Apache-2.0
// Training at the sizes of the bundled model and of a 0.8B model, with random weights. Arguments of every entry: threads, then 0
// (bundled) or 1 (0.8B); of Step and Chain also rows, rows of a document, steps K. Times are processor times of all threads.
//
// Step: a whole step of the trainer, target pass to AdamW, every row of the batch counting. bound_ms is what its matrix products
// and loss passes take by themselves, measured in the same run, each product with its own shape and each at its fastest of three;
// of_bound is the ratio, which is to be 0.5 or more. parts: the bound's share of the target's products, of those with lm_head, of
// the MTP layer's and of the loss passes, in ms.
//
// Chain: the MTP layer's part alone (forward and backward of the recurrent chain, without the vocabulary); Forward,
// InputGradient, WeightGradient: its three kinds of matrix product. GFLOP/s counts the products alone: Chain over the products is
// its fraction of the GEMM bound.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "engine/training/mtp_block.h"
#include "engine/training/mtp_trainer.h"
#include "tests/engine/training/training_test_util.h"

namespace bebop {
namespace {

using benchmark::Counter;
using benchmark::State;

constexpr int32_t kVocab = 512;

ModelConfig Shape(bool large) {
  ModelConfig config;
  config.vocab_size = kVocab;
  config.hidden_size = large ? 1024 : 256;
  config.intermediate_size = large ? 3584 : 512;
  config.num_attention_heads = large ? 8 : 4;
  config.num_key_value_heads = 2;
  config.head_dim = large ? 256 : 64;
  config.rotary_dim = config.head_dim / 4;
  return config;
}

// Small values of a fixed sequence.
std::vector<float> Values(int64_t count) {
  std::vector<float> out(static_cast<size_t>(count));
  uint32_t state = 1;
  for (float& value : out) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(static_cast<int32_t>(state)) * 0x1.0p-36f;
  }
  return out;
}

struct Free {
  void operator()(float* data) const { std::free(data); }
};
using Aligned = std::unique_ptr<float, Free>;
Aligned MakePacked(int64_t rows, int64_t cols) {
  return Aligned(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(PackedBytes(DType::kFloat32, rows, cols)))));
}

void Report(State& state, double flops) { state.counters["GFLOP/s"] = Counter(flops * 1e-9, Counter::kIsIterationInvariantRate); }

// The whole model: Shape with its target and its vocabulary.
ModelConfig FullShape(bool large) {
  ModelConfig config = Shape(large);
  config.vocab_size = large ? 248320 : 1024;
  config.layers.assign(large ? 24 : 4, LayerKind::kLinearAttention);
  for (size_t layer = 3; layer < config.layers.size(); layer += 4) config.layers[layer] = LayerKind::kFullAttention;
  config.linear_num_key_heads = large ? 16 : 4;
  config.linear_num_value_heads = large ? 16 : 8;
  config.linear_key_head_dim = config.linear_value_head_dim = large ? 128 : 32;
  config.linear_conv_kernel_dim = 4;
  config.tie_word_embeddings = true;
  config.num_mtp_layers = 1;
  config.max_position_embeddings = 32768;
  return config;
}

// Milliseconds of processor time; the fastest of three.
double Milliseconds(const std::function<void()>& work) {
  const auto now = [] {
    timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) * 1e3 + static_cast<double>(time.tv_nsec) * 1e-6;
  };
  double fastest = std::numeric_limits<double>::infinity();
  for (int i = 0; i < 3; ++i) {
    const double start = now();
    work();
    fastest = std::min(fastest, now() - start);
  }
  return fastest;
}

struct Bound {
  double target = 0, lm_head = 0, block = 0, losses = 0;  // ms
  double total() const { return target + lm_head + block + losses; }
};

// What the products and loss passes of a step take by themselves. `logit_rows`: of a chunk.
Bound MeasureBound(testing::TrainerHarness& harness, int64_t rows, int64_t steps, int64_t targets, int64_t drafts,
                   int64_t logit_rows) {
  const ModelConfig& config = harness.config();
  TrainingOps& ops = harness.ops();
  const MtpLayout layout(config);
  int64_t widest = 2 * int64_t{config.intermediate_size};
  widest = std::max({widest, layout.qkv_width(), 2 * layout.hidden});
  for (const LayerWeights& layer : harness.weights().layers)
    widest = std::max(widest, layer.linear ? layer.linear->in.rows : layer.full->qkv.rows);
  std::vector<float> in = Values(rows * widest), out(in.size()), flat = harness.parameters;
  const auto linear = [&](Ops* served, const PackedMatrix& w) {
    const LinearArgs args = {FloatMatrix(in.data(), rows, w.cols), w, FloatMatrix(out.data(), rows, w.rows)};
    return Milliseconds([&] { served != nullptr ? served->Linear(args) : ops.Linear(args); });
  };
  Bound bound;
  for (const LayerWeights& layer : harness.weights().layers) {
    for (const PackedMatrix& w : {layer.linear ? layer.linear->in : layer.full->qkv,
                                  layer.linear ? layer.linear->out : layer.full->out, layer.mlp.gate_up, layer.mlp.down}) {
      bound.target += linear(harness.backend().ops(), w);
    }
  }
  for (const TensorView& w : {layout.Fc(flat.data()), layout.Qkv(flat.data()), layout.Out(flat.data()),
                              layout.GateUp(flat.data()), layout.Down(flat.data())}) {
    const Aligned forward = MakePacked(w.rows, w.cols), transposed = MakePacked(w.cols, w.rows);
    double once = linear(nullptr, ops.Pack(w, forward.get())) + linear(nullptr, ops.PackTransposed(w, transposed.get()));
    std::vector<float> gradient(static_cast<size_t>(w.rows * w.cols));
    once += Milliseconds([&] {
      ops.LinearBackwardWeight({FloatMatrix(in.data(), rows, w.cols), FloatMatrix(out.data(), rows, w.rows), true,
                                FloatMatrix(gradient.data(), w.rows, w.cols)});
    });
    bound.block += once * static_cast<double>(steps);
  }
  // With the vocabulary: a chunk's worth of rows, and as many as there are.
  const int64_t vocab = config.vocab_size, width = config.hidden_size;
  const int64_t chunk_drafts = logit_rows * drafts / (targets + drafts), chunk_targets = logit_rows - chunk_drafts;
  std::vector<float> hidden = Values(logit_rows * width), logits(static_cast<size_t>(logit_rows * vocab));
  const TensorView target_logits = FloatMatrix(logits.data(), chunk_targets, vocab);
  const TensorView draft_logits = FloatMatrix(logits.data() + chunk_targets * vocab, chunk_drafts, vocab);
  const TensorView draft_hidden = FloatMatrix(hidden.data(), chunk_drafts, width);
  const double chunks = static_cast<double>(targets + drafts) / static_cast<double>(logit_rows);
  const Aligned transposed = MakePacked(width, vocab);
  PackedMatrix lm_head_transposed;
  {
    std::vector<float> matrix = Values(vocab * width);
    lm_head_transposed = ops.PackTransposed(FloatMatrix(matrix.data(), vocab, width), transposed.get());
  }
  bound.lm_head += chunks * Milliseconds([&] {
                     harness.backend().ops()->Linear(
                         {FloatMatrix(hidden.data(), chunk_targets, width), harness.weights().lm_head, target_logits});
                   });
  bound.lm_head += chunks * Milliseconds([&] { ops.Linear({draft_hidden, harness.weights().lm_head, draft_logits}); });
  std::vector<float> back(hidden.size());
  bound.lm_head += chunks * Milliseconds([&] {
                     ops.Linear({draft_logits, lm_head_transposed, FloatMatrix(back.data(), chunk_drafts, width)});
                   });
  std::vector<LogitNormalizer> normalizers(static_cast<size_t>(logit_rows));
  std::vector<DraftLossRow> loss_rows(normalizers.size());
  std::vector<int32_t> target_rows;
  std::vector<double> weights(normalizers.size(), 1e-3);
  for (int64_t row = 0; row < chunk_drafts; ++row) target_rows.push_back(static_cast<int32_t>(row % chunk_targets));
  const DraftLossArgs loss = {DraftLoss::kEndToEndTotalVariation,
                              draft_logits,
                              target_logits,
                              normalizers.data(),
                              target_rows.data(),
                              nullptr,
                              loss_rows.data()};
  bound.losses += chunks * Milliseconds([&] { ops.Normalize(target_logits, normalizers.data()); });
  bound.losses += chunks * Milliseconds([&] { ops.DraftLossForward(loss); });
  bound.losses += chunks * Milliseconds([&] { ops.DraftLossBackward({loss, weights.data(), draft_logits}); });
  return bound;
}

void Step(State& state) {
  testing::TrainerHarness harness(FullShape(state.range(1) != 0), DType::kBFloat16, static_cast<int>(state.range(0)));
  const int64_t rows = state.range(2), length = state.range(3);
  TrainerOptions options;
  options.num_steps_ahead = static_cast<int32_t>(state.range(4));
  options.batch_tokens = rows;
  auto trainer = harness.Make(options);
  if (!trainer.ok()) return state.SkipWithError(trainer.status().ToString().c_str());
  std::vector<TrainingDocument> documents(static_cast<size_t>(rows / length));
  std::vector<const TrainingDocument*> batch;
  uint32_t token = 1;
  for (TrainingDocument& document : documents) {
    for (int64_t i = 0; i < length; ++i) {
      token = token * 1664525u + 1013904223u;
      document.token_ids.push_back(token % static_cast<uint32_t>(harness.config().vocab_size));
    }
    batch.push_back(&document);
  }
  auto report = (*trainer)->Step(batch);  // touches the pages
  double fastest = std::numeric_limits<double>::infinity();
  for ([[maybe_unused]] auto _ : state) {
    fastest = std::min(fastest, Milliseconds([&] { report = (*trainer)->Step(batch); }));
  }
  if (!report.ok()) return state.SkipWithError(report.status().ToString().c_str());
  const int64_t steps = options.num_steps_ahead, targets = rows - static_cast<int64_t>(documents.size()),
                drafts = report->terms * steps;
  const int64_t chunk = std::min<int64_t>(targets + drafts, std::max<int64_t>(64, (32 << 20) / 4 / harness.config().vocab_size));
  const Bound bound = MeasureBound(harness, rows, steps, targets, drafts, chunk);
  state.counters["step_ms"] = fastest;
  state.counters["bound_ms"] = bound.total();
  state.counters["of_bound"] = bound.total() / fastest;
  state.counters["target_ms"] = bound.target;
  state.counters["lm_head_ms"] = bound.lm_head;
  state.counters["block_ms"] = bound.block;
  state.counters["losses_ms"] = bound.losses;
  state.counters["tokens/s"] = static_cast<double>(rows) / fastest * 1e3;  // per processor
  Report(state, 3 * report->gemm_flops);
}
BENCHMARK(Step)
    ->Args({1, 0, 2048, 256, 5})
    ->Args({2, 0, 2048, 256, 5})
    ->Args({1, 1, 128, 64, 2})
    ->Iterations(1)
    ->MeasureProcessCPUTime()
    ->Unit(benchmark::kMillisecond);

void Chain(State& state) {
  ThreadPool pool(static_cast<int>(state.range(0)));
  const ModelConfig config = Shape(state.range(1) != 0);
  const int64_t rows = state.range(2), length = state.range(3), width = config.hidden_size;
  const auto steps = static_cast<int32_t>(state.range(4));
  const std::unique_ptr<DeviceMemory> memory = MakeHostMemory();
  const std::unique_ptr<TrainingOps> ops = MakeCpuTrainingOps(&pool);
  auto block = MtpBlock::Create(config, rows, steps, memory.get(), ops.get());
  if (!block.ok()) return state.SkipWithError(block.status().ToString().c_str());
  const MtpLayout& layout = (*block)->layout();
  const std::vector<float> parameters = Values(layout.total), start = Values(steps * rows * width);
  std::vector<float> table = Values(kVocab * width), target_hidden = Values(rows * width), gradients(parameters.size()), dhidden;
  const Aligned packed = MakePacked(kVocab, width);
  const PackedMatrix embedding = cpu::PackFloat(FloatMatrix(table.data(), kVocab, width), packed.get(), pool);
  std::vector<DocumentRows> documents;
  std::vector<int32_t> positions;
  for (int64_t row = 0; row < rows; row += length) documents.push_back({row, length});
  for (int64_t i = 0; i < steps * rows; ++i) positions.push_back(static_cast<int32_t>(i % rows % length + i / rows + 1));
  const std::vector<uint32_t> tokens(static_cast<size_t>(steps * rows), 3);
  const MtpBatch batch = {.documents = documents.data(),
                          .num_documents = static_cast<int32_t>(documents.size()),
                          .num_rows = rows,
                          .token_ids = tokens.data(),
                          .row_position = positions.data(),
                          .target_hidden = FloatMatrix(target_hidden.data(), rows, width),
                          .embedding = embedding};
  const auto pass = [&] {
    dhidden = start;
    (*block)->SetParameters(parameters.data());
    std::vector<TensorView> views;
    for (int32_t step = 1; step <= steps; ++step) {
      (*block)->ForwardStep(batch, step);
      views.push_back(FloatMatrix(dhidden.data() + (step - 1) * rows * width, rows, width));
    }
    (*block)->Backward(batch, steps, views.data(), gradients.data());
  };
  pass();  // touches the pages
  for ([[maybe_unused]] auto _ : state) pass();
  const int64_t weights = 2 * width * width + layout.qkv_width() * width + width * layout.query_width + 3 * layout.ffn * width;
  Report(state, 6.0 * static_cast<double>(weights * rows * steps));
}
BENCHMARK(Chain)
    ->Args({1, 0, 2048, 256, 5})
    ->Args({1, 0, 2048, 1024, 5})
    ->Args({1, 1, 512, 256, 2})
    ->Args({2, 0, 2048, 256, 5})
    ->MeasureProcessCPUTime()
    ->Unit(benchmark::kMillisecond);

// gate and up of 512 rows: y = x Wᵀ, dx = dy W, dW = dyᵀ x.
template <int kWhich>
void Product(State& state) {
  ThreadPool pool(static_cast<int>(state.range(0)));
  const ModelConfig config = Shape(state.range(1) != 0);
  const int64_t rows = 512, inputs = config.hidden_size, outputs = 2 * int64_t{config.intermediate_size};
  std::vector<float> x = Values(rows * inputs), y = Values(rows * outputs), w = Values(outputs * inputs);
  const TensorView x_view = FloatMatrix(x.data(), rows, inputs), y_view = FloatMatrix(y.data(), rows, outputs);
  const TensorView w_view = FloatMatrix(w.data(), outputs, inputs);
  const Aligned forward = MakePacked(outputs, inputs), transposed = MakePacked(inputs, outputs);
  const PackedMatrix packed = cpu::PackFloat(w_view, forward.get(), pool);
  const PackedMatrix packed_transposed = cpu::PackTransposed(w_view, transposed.get(), pool);
  cpu::LinearScratch scratch;
  cpu::LinearBackwardScratch backward_scratch;
  for ([[maybe_unused]] auto _ : state) {
    if constexpr (kWhich == 0) cpu::Linear({.x = x_view, .w = packed, .y = y_view}, scratch, pool);
    if constexpr (kWhich == 1) cpu::Linear({.x = y_view, .w = packed_transposed, .y = x_view}, scratch, pool);
    if constexpr (kWhich == 2) cpu::LinearBackwardWeight({.x = x_view, .dy = y_view, .dw = w_view}, backward_scratch, pool);
  }
  Report(state, 2.0 * static_cast<double>(rows * inputs * outputs));
}
BENCHMARK(Product<0>)->Name("Forward")->Args({1, 0})->Args({1, 1})->MeasureProcessCPUTime();
BENCHMARK(Product<1>)->Name("InputGradient")->Args({1, 0})->Args({1, 1})->MeasureProcessCPUTime();
BENCHMARK(Product<2>)->Name("WeightGradient")->Args({1, 0})->Args({1, 1})->MeasureProcessCPUTime();

}  // namespace
}  // namespace bebop

BENCHMARK_MAIN();
