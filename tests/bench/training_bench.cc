// SPDX-License-Identifier: Apache-2.0
// The MTP layer's training pass (forward and backward of the recurrent chain, without the vocabulary) and its three matrix
// products, at the sizes of the bundled model and of a 0.8B model.
//
// GFLOP/s counts the matrix products alone, per second of processor time of all threads: the pass over the products is its
// fraction of the GEMM bound. Arguments of every entry: threads, then 0 (bundled) or 1 (0.8B); of Chain also rows, rows of a
// document, steps.
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <memory>
#include <vector>

#include "engine/training/mtp_block.h"

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
