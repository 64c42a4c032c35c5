// SPDX-License-Identifier: Apache-2.0
// The draft losses against the bandwidth of memory. Arguments: V, threads; rows are as many as make 64 MB of logits on each side,
// so that nothing stays in a cache from one call to the next.
//
// Bytes are what must come from or go to memory, each array once: Normalize 4 V a row; forward 8 V (the draft's row is read
// twice, the second time from a cache); backward 12 V over the draft's logits in place (two rows read, one written). Read and
// Update are the bounds: the same bytes with next to no arithmetic (a sum of two arrays; a scaled difference stored over the
// first).
#include <algorithm>
#include <random>
#include <vector>

#include "benchmark/benchmark.h"
#include "kernels/draft_losses/draft_losses.h"

namespace bebop {
namespace {

constexpr int64_t kSideBytes = 64 << 20;
// Floats between the places of draft and target in their pages of memory: side by side, short rows (V = 4,096) took 1.4 times as
// long.
constexpr size_t kApart = 256;

struct Batch {
  explicit Batch(int64_t vocab_size, DraftLoss loss_kind, int threads)
      : pool(threads), vocab(vocab_size), num_rows(std::max<int64_t>(2, kSideBytes / 4 / vocab_size)), loss(loss_kind) {
    std::mt19937 generator(1);
    std::normal_distribution<float> normal(0.0f, 3.0f);
    // One random row, shifted for each other row: enough for kernels without branches on values.
    std::vector<float> first(static_cast<size_t>(vocab + num_rows));
    for (float& logit : first) logit = normal(generator);
    draft.resize(static_cast<size_t>(num_rows * vocab));
    target_memory.resize(draft.size() + kApart);
    target = target_memory.data() + kApart;
    for (int64_t r = 0; r < num_rows; ++r) {
      std::copy_n(first.begin() + r, vocab, target + r * vocab);
      std::transform(first.begin() + r, first.begin() + r + vocab, draft.begin() + r * vocab,
                     [](float logit) { return 0.8f * logit; });
    }
    normalizers.resize(static_cast<size_t>(num_rows));
    rows.resize(normalizers.size());
    target_rows.resize(normalizers.size());
    tokens.resize(normalizers.size(), 1);
    weights.resize(normalizers.size(), 1e-3);
    for (size_t i = 0; i < target_rows.size(); ++i) target_rows[i] = static_cast<int32_t>(i);
    cpu::Normalize(Targets(), normalizers.data(), pool);
    cpu::DraftLossForward(Args(), pool);
  }
  TensorView Targets() { return FloatMatrix(target, num_rows, vocab); }
  DraftLossArgs Args() {
    return {loss,          FloatMatrix(draft.data(), num_rows, vocab), Targets(), normalizers.data(), target_rows.data(),
            tokens.data(), rows.data()};
  }
  ThreadPool pool;
  const int64_t vocab, num_rows;
  const DraftLoss loss;
  std::vector<float> draft, target_memory;
  float* target = nullptr;
  std::vector<LogitNormalizer> normalizers;
  std::vector<DraftLossRow> rows;
  std::vector<int32_t> target_rows;
  std::vector<uint32_t> tokens;
  std::vector<double> weights;
};

template <typename Operation>
void Measure(benchmark::State& state, DraftLoss loss, int64_t bytes_per_id, Operation&& operation) {
  Batch batch(state.range(0), loss, static_cast<int>(state.range(1)));
  for (auto _ : state) {
    operation(batch);
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * batch.num_rows * batch.vocab * bytes_per_id);
}

#define BEBOP_BENCH_SIZES \
  Args({248320, 1})->Args({248320, 2})->Args({4096, 2})->Unit(benchmark::kMillisecond)->UseRealTime()

void BM_Read(benchmark::State& state) {
  Measure(state, DraftLoss::kKl, 8, [](Batch& batch) {
    batch.pool.ParallelFor(batch.num_rows, 1, [&](int64_t begin, int64_t end) {
      constexpr int kLanes = 32;
      float sums[kLanes] = {};
      const float* const draft = batch.draft.data();
      const float* const target = batch.target;
      for (int64_t i = begin * batch.vocab; i + kLanes <= end * batch.vocab; i += kLanes) {
        for (int j = 0; j < kLanes; ++j) sums[j] += draft[i + j] + target[i + j];
      }
      for (const float sum : sums) benchmark::DoNotOptimize(sum);
    });
  });
}
void BM_Update(benchmark::State& state) {
  Measure(state, DraftLoss::kKl, 12, [](Batch& batch) {
    batch.pool.ParallelFor(batch.num_rows, 1, [&](int64_t begin, int64_t end) {
      float* const draft = batch.draft.data();
      const float* const target = batch.target;
      for (int64_t i = begin * batch.vocab; i < end * batch.vocab; ++i) draft[i] = (draft[i] - target[i]) * 0.5f;
    });
  });
}
BENCHMARK(BM_Read)->BEBOP_BENCH_SIZES;
BENCHMARK(BM_Update)->BEBOP_BENCH_SIZES;

void BM_Normalize(benchmark::State& state) {
  Measure(state, DraftLoss::kKl, 4, [](Batch& batch) { cpu::Normalize(batch.Targets(), batch.normalizers.data(), batch.pool); });
}
BENCHMARK(BM_Normalize)->BEBOP_BENCH_SIZES;

void BM_Forward(benchmark::State& state) {
  Measure(state, DraftLoss::kEndToEndTotalVariation, 8, [](Batch& batch) { cpu::DraftLossForward(batch.Args(), batch.pool); });
}
BENCHMARK(BM_Forward)->BEBOP_BENCH_SIZES;

// In place, over its own last gradient after the first turn: values stay finite and the time does not depend on them.
void BM_Backward(benchmark::State& state, DraftLoss loss) {
  Measure(state, loss, 12, [](Batch& batch) {
    const DraftLossArgs args = batch.Args();
    cpu::DraftLossBackward({args, batch.weights.data(), args.draft}, batch.pool);
  });
}
BENCHMARK_CAPTURE(BM_Backward, e2e_tv, DraftLoss::kEndToEndTotalVariation)->BEBOP_BENCH_SIZES;
BENCHMARK_CAPTURE(BM_Backward, kl, DraftLoss::kKl)->BEBOP_BENCH_SIZES;
BENCHMARK_CAPTURE(BM_Backward, reverse_kl, DraftLoss::kReverseKl)->BEBOP_BENCH_SIZES;
// Reads the draft's row alone: 8 of these 12 bytes.
BENCHMARK_CAPTURE(BM_Backward, ce, DraftLoss::kCrossEntropy)->BEBOP_BENCH_SIZES;

}  // namespace
}  // namespace bebop

BENCHMARK_MAIN();
