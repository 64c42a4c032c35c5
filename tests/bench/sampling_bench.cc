// SPDX-License-Identifier: Apache-2.0
// Transform, samplers and verification of one row or sequence on one thread. Bytes per second count each [V] array that the
// operation must touch once: 8 V for the transform (logits in, weights out), 8 V for two-row reductions, 4 V for one-row ones.
#include <random>
#include <vector>

#include "benchmark/benchmark.h"
#include "engine/speculative/verify.h"
#include "kernels/sampling/sampling.h"

namespace bebop {
namespace {

struct Row {
  Row(int32_t vocab_size, uint32_t seed)
      : logits(static_cast<size_t>(vocab_size)), weight(logits.size()), scratch(logits.size()) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal(0.0f, 3.0f);
    for (float& logit : logits) logit = normal(generator);
    block_sum.resize(static_cast<size_t>(NumSamplingBlocks(vocab_size)));
    args.logits = logits.data();
    args.vocab_size = vocab_size;
    args.scratch = scratch.data();
    out.weight = weight.data();
    out.block_sum = block_sum.data();
    cpu::Transform(args, &out);
  }
  Row(const Row&) = delete;
  Row& operator=(const Row&) = delete;
  std::vector<float> logits, weight, scratch;
  std::vector<double> block_sum;
  TransformArgs args;
  TokenDistribution out;
};

void SetBytes(benchmark::State& state, int64_t bytes_per_id) {
  state.SetBytesProcessed(state.iterations() * state.range(0) * bytes_per_id);
}

void BM_Transform(benchmark::State& state, float temperature, int32_t top_k, float top_p, float min_p) {
  Row row(static_cast<int32_t>(state.range(0)), 1);
  row.args.temperature = temperature;
  row.args.top_k = top_k;
  row.args.top_p = top_p;
  row.args.min_p = min_p;
  for (auto _ : state) {
    cpu::Transform(row.args, &row.out);
    benchmark::DoNotOptimize(row.out.total);
  }
  SetBytes(state, 8);
}
#define BEBOP_BENCH_SIZES Arg(248320)->Arg(1024)->Unit(benchmark::kMicrosecond)
BENCHMARK_CAPTURE(BM_Transform, untruncated, 1.0f, 0, 1.0f, 0.0f)->BEBOP_BENCH_SIZES;
BENCHMARK_CAPTURE(BM_Transform, top_k_20, 1.0f, 20, 1.0f, 0.0f)->BEBOP_BENCH_SIZES;
BENCHMARK_CAPTURE(BM_Transform, top_p_95, 1.0f, 0, 0.95f, 0.0f)->BEBOP_BENCH_SIZES;
BENCHMARK_CAPTURE(BM_Transform, top_k_20_top_p_95, 0.6f, 20, 0.95f, 0.0f)->BEBOP_BENCH_SIZES;
BENCHMARK_CAPTURE(BM_Transform, min_p_5, 1.0f, 0, 1.0f, 0.05f)->BEBOP_BENCH_SIZES;
BENCHMARK_CAPTURE(BM_Transform, greedy, 0.0f, 0, 1.0f, 0.0f)->BEBOP_BENCH_SIZES;

template <typename Operation>
void RunPair(benchmark::State& state, int64_t bytes_per_id, Operation&& operation) {
  const int32_t vocab_size = static_cast<int32_t>(state.range(0));
  const Row target(vocab_size, 1), draft(vocab_size, 2);
  uint32_t position = 0;
  for (auto _ : state) benchmark::DoNotOptimize(operation(target.out, draft.out, ++position));
  SetBytes(state, bytes_per_id);
}

using Distribution = const TokenDistribution&;
void BM_SampleInverseCdf(benchmark::State& state) {
  RunPair(state, 0, [](Distribution target, Distribution, uint32_t) { return cpu::SampleInverseCdf(target, 0.5, 0.5); });
}
void BM_SampleResidual(benchmark::State& state) {
  RunPair(state, 8,
          [](Distribution target, Distribution draft, uint32_t) { return cpu::SampleResidual(target, draft, 0.5, 0.5); });
}
void BM_SampleGumbel(benchmark::State& state) {
  RunPair(state, 4,
          [](Distribution target, Distribution, uint32_t position) { return cpu::SampleGumbel(target, {1, 2, position}); });
}
void BM_Entropy(benchmark::State& state) {
  RunPair(state, 4, [](Distribution target, Distribution, uint32_t) { return cpu::Entropy(target); });
}
void BM_Overlap(benchmark::State& state) {
  RunPair(state, 8, [](Distribution target, Distribution draft, uint32_t) { return cpu::Overlap(target, draft); });
}
void BM_CoupledOverlap(benchmark::State& state) {
  RunPair(state, 8, [](Distribution target, Distribution draft, uint32_t) { return cpu::CoupledOverlap(target, draft); });
}
BENCHMARK(BM_SampleInverseCdf)->BEBOP_BENCH_SIZES;
BENCHMARK(BM_SampleResidual)->BEBOP_BENCH_SIZES;
BENCHMARK(BM_SampleGumbel)->BEBOP_BENCH_SIZES;
BENCHMARK(BM_Entropy)->BEBOP_BENCH_SIZES;
BENCHMARK(BM_Overlap)->BEBOP_BENCH_SIZES;
BENCHMARK(BM_CoupledOverlap)->BEBOP_BENCH_SIZES;

void BM_Summarize(benchmark::State& state) {
  const Row row(static_cast<int32_t>(state.range(0)), 1);
  for (auto _ : state) benchmark::DoNotOptimize(cpu::Summarize(row.logits.data(), row.args.vocab_size, 0.8f, true).entropy);
  SetBytes(state, 4);
}
BENCHMARK(BM_Summarize)->BEBOP_BENCH_SIZES;

// Three drafts drawn and verified: the sampling cost of one decoding iteration of a sequence, without the transforms.
void BM_DraftAndVerify(benchmark::State& state, SpeculationMode mode) {
  const int32_t vocab_size = static_cast<int32_t>(state.range(0));
  const Row target(vocab_size, 1), draft(vocab_size, 2);
  const std::vector<TokenDistribution> target_rows(4, target.out), draft_rows(3, draft.out);
  uint32_t position = 0;
  int64_t accepted = 0;
  for (auto _ : state) {
    PhiloxDraws draws({7, 0, position += 4});
    uint32_t drafts[3];
    for (int32_t i = 0; i < 3; ++i) drafts[i] = DrawDraft(mode, false, draft_rows[i], i, draws);
    VerifyArgs args;
    args.mode = mode;
    args.drafts = drafts;
    args.target = target_rows;
    args.draft = draft_rows;
    accepted += Verify(args, draws).num_accepted;
  }
  state.counters["accepted"] = static_cast<double>(accepted) / static_cast<double>(state.iterations());
}
BENCHMARK_CAPTURE(BM_DraftAndVerify, target_only, SpeculationMode::kTargetOnly)->BEBOP_BENCH_SIZES;
BENCHMARK_CAPTURE(BM_DraftAndVerify, rejection, SpeculationMode::kRejection)->BEBOP_BENCH_SIZES;
BENCHMARK_CAPTURE(BM_DraftAndVerify, coupled, SpeculationMode::kCoupled)->BEBOP_BENCH_SIZES;

}  // namespace
}  // namespace bebop

BENCHMARK_MAIN();
