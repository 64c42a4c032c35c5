// SPDX-License-Identifier: Apache-2.0
// Attention, delta rule and the small operators at the sizes of a 0.8B Qwen3.5 layer (8 q and 2 kv heads of 256, 16 linear heads
// of 128x128, H 1024, F 3584).
//
//   ops_bench                                    everything
//   ops_bench --benchmark_filter=Attention       one operator
//
// GB/s counts the bytes that an operator must move (keys and values, or the state read and written once) and GFLOP/s the
// arithmetic it must do, both per second of processor time of all threads, so that other load on the machine disturbs little. The
// first argument of every entry is the number of threads.
#include <benchmark/benchmark.h>

#include <vector>

#include "kernels/attention/attention.h"
#include "kernels/causal_conv/causal_conv.h"
#include "kernels/delta_rule/delta_rule.h"
#include "kernels/qk_norm_rope/qk_norm_rope.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/swiglu/swiglu.h"

namespace bebop {
namespace {

using benchmark::Counter;
using benchmark::State;

// Values in [-1, 1) of a fixed sequence.
std::vector<float> Values(int64_t count) {
  std::vector<float> out(static_cast<size_t>(count));
  uint32_t state = 1;
  for (float& value : out) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(static_cast<int32_t>(state)) * 0x1.0p-31f;
  }
  return out;
}

void Report(State& state, double bytes, double flops) {
  state.counters["GB/s"] = Counter(bytes * 1e-9, Counter::kIsIterationInvariantRate);
  state.counters["GFLOP/s"] = Counter(flops * 1e-9, Counter::kIsIterationInvariantRate);
}

// One sequence of num_rows rows, all known unless stated.
struct OneSequence {
  OneSequence(int32_t num_rows, int32_t first_position, int32_t page_tokens) {
    sequence.num_rows = sequence.num_known_rows = num_rows;
    sequence.first_position = first_position;
    sequence.state_dst = 0;
    for (int32_t i = 0; i < num_rows; ++i) {
      row_sequence.push_back(0);
      row_position.push_back(first_position + i);
    }
    for (int32_t i = 0; i <= (first_position + num_rows) / page_tokens; ++i) pages.push_back(i);
  }
  RaggedBatch View() const { return {1, sequence.num_rows, &sequence, pages.data(), row_sequence.data(), row_position.data()}; }
  SequenceRows sequence;
  std::vector<int32_t> pages, row_sequence, row_position;
};

constexpr int32_t kQHeads = 8, kKvHeads = 2, kHeadDim = 256, kPageTokens = 16;

// Arguments: threads, context, rows, bytes of an element of the pages.
void Attention(State& state) {
  ThreadPool pool(static_cast<int>(state.range(0)));
  const int32_t context = static_cast<int32_t>(state.range(1)), rows = static_cast<int32_t>(state.range(2));
  const DType dtype = state.range(3) == 4 ? DType::kFloat32 : DType::kBFloat16;
  const OneSequence one(rows, context - rows, kPageTokens);
  const int64_t num_pages = static_cast<int64_t>(one.pages.size()), count = num_pages * kPageTokens * kKvHeads * kHeadDim;
  std::vector<float> k = Values(count), v = Values(count + 1);
  std::vector<BFloat16> k_half, v_half;
  for (int64_t i = 0; i < count; ++i) {
    k_half.push_back(ToBFloat16(k[i]));
    v_half.push_back(ToBFloat16(v[i]));
  }
  std::vector<float> q = Values(rows * kQHeads * kHeadDim), gate = Values(rows * kQHeads * 2 * kHeadDim), out(q.size());
  KvPagesView pages = {k.data(), v.data(), dtype, static_cast<int32_t>(num_pages), kPageTokens, kKvHeads, kHeadDim};
  if (dtype == DType::kBFloat16) {
    pages.k = k_half.data();
    pages.v = v_half.data();
  }
  const AttentionArgs args = {.batch = one.View(),
                              .q = FloatMatrix(q.data(), rows, kQHeads * kHeadDim),
                              .q_gate = FloatMatrix(gate.data(), rows, kQHeads * 2 * kHeadDim),
                              .pages = pages,
                              .num_q_heads = kQHeads,
                              .out = FloatMatrix(out.data(), rows, kQHeads * kHeadDim)};
  for (auto _ : state) {
    cpu::Attention(args, pool);
    benchmark::ClobberMemory();
  }
  Report(state, 2.0 * context * kKvHeads * kHeadDim * static_cast<double>(ElementBytes(dtype)),
         4.0 * rows * context * kQHeads * kHeadDim);
}
BENCHMARK(Attention)
    ->ArgNames({"threads", "context", "rows", "bytes"})
    ->MeasureProcessCPUTime()
    ->Args({1, 4096, 4, 2})
    ->Args({1, 4096, 1, 2})
    ->Args({1, 4096, 4, 4})
    ->Args({2, 4096, 4, 2})
    ->Args({1, 512, 512, 2});

constexpr int32_t kHeads = 16, kLinearDim = 128, kWindow = 4, kConvWidth = 4;
constexpr int32_t kSlots = 40;  // more state than the caches hold, as the layers of a model have

struct LinearState {
  LinearState() {
    view.num_slots = kSlots;
    view.window = kWindow;
    view.num_key_heads = kHeads;
    view.num_value_heads = kHeads;
    view.key_head_dim = kLinearDim;
    view.value_head_dim = kLinearDim;
    view.conv_width = kConvWidth;
    matrix.resize(size_t{kSlots} * kHeads * kLinearDim * kLinearDim);
    conv.resize(size_t{kSlots} * (kConvWidth - 1 + kWindow) * static_cast<size_t>(view.conv_channels()));
    window_k = Values(int64_t{kSlots} * kWindow * kHeads * kLinearDim);
    window_v = window_k;
    window_gate.resize(size_t{kSlots} * kWindow * kHeads * 2, 0.1f);
    view.matrix = matrix.data();
    view.conv_inputs = conv.data();
    view.window_k = window_k.data();
    view.window_v = window_v.data();
    view.window_gate = window_gate.data();
  }
  LinearStateView view;
  std::vector<float> matrix, conv, window_k, window_v, window_gate;
};

// Arguments: threads, known rows, draft rows, replayed rows.
void DeltaRule(State& state) {
  ThreadPool pool(static_cast<int>(state.range(0)));
  LinearState linear;
  OneSequence one(static_cast<int32_t>(state.range(1) + state.range(2)), 0, 16);
  one.sequence.num_known_rows = static_cast<int32_t>(state.range(1));
  one.sequence.num_replay_rows = static_cast<int32_t>(state.range(3));
  const int64_t rows = one.sequence.num_rows, width = kHeads * kLinearDim;
  std::vector<float> qkv = Values(rows * linear.view.conv_channels()), gates = Values(rows * kHeads), a_log(kHeads),
                     out(static_cast<size_t>(rows * width));
  int32_t slot = 0;
  for (auto _ : state) {
    one.sequence.state_src = one.sequence.state_dst = slot = (slot + 1) % kSlots;
    cpu::DeltaRule({.batch = one.View(),
                    .qkv = FloatMatrix(qkv.data(), rows, linear.view.conv_channels()),
                    .a = FloatMatrix(gates.data(), rows, kHeads),
                    .b = FloatMatrix(gates.data(), rows, kHeads),
                    .a_log = a_log.data(),
                    .dt_bias = a_log.data(),
                    .state = linear.view,
                    .out = FloatMatrix(out.data(), rows, width)},
                   pool);
    benchmark::ClobberMemory();
  }
  // A token: e^g S + k δ, Sᵀk and Sᵀq, 7 operations an element.
  const double elements = 1.0 * kHeads * kLinearDim * kLinearDim;
  Report(state, 2 * 4 * elements, 7 * elements * static_cast<double>(rows + state.range(3)));
}
BENCHMARK(DeltaRule)
    ->ArgNames({"threads", "known", "drafts", "replay"})
    ->MeasureProcessCPUTime()
    ->Args({1, 1, 0, 0})
    ->Args({1, 1, 3, 2})
    ->Args({2, 1, 3, 2})
    ->Args({1, 512, 0, 0});

// Arguments: threads, rows.
void CausalConv(State& state) {
  ThreadPool pool(static_cast<int>(state.range(0)));
  LinearState linear;
  OneSequence one(static_cast<int32_t>(state.range(1)), 0, 16);
  one.sequence.state_src = 0;
  const int64_t rows = state.range(1), channels = linear.view.conv_channels();
  std::vector<float> x = Values(rows * channels), weight = Values(channels * kConvWidth), y(x.size());
  for (auto _ : state) {
    cpu::CausalConv(
        {one.View(), FloatMatrix(x.data(), rows, channels), weight.data(), linear.view, FloatMatrix(y.data(), rows, channels)},
        pool);
    benchmark::ClobberMemory();
  }
  Report(state, 4.0 * static_cast<double>((2 * rows + kConvWidth + 2 * (kConvWidth - 1)) * channels),
         2.0 * kConvWidth * static_cast<double>(rows * channels));
}
BENCHMARK(CausalConv)->ArgNames({"threads", "rows"})->MeasureProcessCPUTime()->Args({1, 1})->Args({1, 4})->Args({1, 512});

// Arguments: threads, rows.
void RmsNorm(State& state) {
  ThreadPool pool(static_cast<int>(state.range(0)));
  const int64_t rows = state.range(1), width = 1024;
  std::vector<float> x = Values(rows * width), residual(x.size()), weight = Values(width), out(x.size());
  for (auto _ : state) {
    cpu::RmsNorm({FloatMatrix(x.data(), rows, width), FloatMatrix(residual.data(), rows, width), weight.data(), 1e-6f,
                  FloatMatrix(out.data(), rows, width)},
                 pool);
    benchmark::ClobberMemory();
  }
  Report(state, 16.0 * static_cast<double>(rows * width), 6.0 * static_cast<double>(rows * width));
}
BENCHMARK(RmsNorm)->ArgNames({"threads", "rows"})->MeasureProcessCPUTime()->Args({1, 4})->Args({1, 512});

void GatedRmsNorm(State& state) {
  ThreadPool pool(static_cast<int>(state.range(0)));
  const int64_t rows = state.range(1), width = kHeads * kLinearDim;
  std::vector<float> x = Values(rows * width), gate = Values(rows * width), weight = Values(kLinearDim), out(x.size());
  for (auto _ : state) {
    cpu::GatedRmsNorm({FloatMatrix(x.data(), rows, width), FloatMatrix(gate.data(), rows, width), weight.data(), kLinearDim,
                       1e-6f, FloatMatrix(out.data(), rows, width)},
                      pool);
    benchmark::ClobberMemory();
  }
  Report(state, 12.0 * static_cast<double>(rows * width), 20.0 * static_cast<double>(rows * width));
}
BENCHMARK(GatedRmsNorm)->ArgNames({"threads", "rows"})->MeasureProcessCPUTime()->Args({1, 4})->Args({1, 512});

void SwiGlu(State& state) {
  ThreadPool pool(static_cast<int>(state.range(0)));
  const int64_t rows = state.range(1), width = 3584;
  std::vector<float> gate = Values(rows * width), up = Values(rows * width), out(gate.size());
  for (auto _ : state) {
    cpu::SwiGlu(
        {FloatMatrix(gate.data(), rows, width), FloatMatrix(up.data(), rows, width), FloatMatrix(out.data(), rows, width)}, pool);
    benchmark::ClobberMemory();
  }
  Report(state, 12.0 * static_cast<double>(rows * width), 20.0 * static_cast<double>(rows * width));
}
BENCHMARK(SwiGlu)->ArgNames({"threads", "rows"})->MeasureProcessCPUTime()->Args({1, 4})->Args({1, 512});

void QkNormRope(State& state) {
  ThreadPool pool(static_cast<int>(state.range(0)));
  const int32_t rows = static_cast<int32_t>(state.range(1));
  const OneSequence one(rows, 1000, kPageTokens);
  const int64_t num_pages = static_cast<int64_t>(one.pages.size());
  std::vector<float> q_gate = Values(rows * kQHeads * 2 * kHeadDim), kv = Values(rows * kKvHeads * kHeadDim),
                     norm = Values(kHeadDim);
  std::vector<float> q_out(static_cast<size_t>(rows * kQHeads * kHeadDim));
  std::vector<BFloat16> k(static_cast<size_t>(num_pages * kPageTokens * kKvHeads * kHeadDim)), v(k.size());
  for (auto _ : state) {
    cpu::QkNormRope(
        {.batch = one.View(),
         .q_gate = FloatMatrix(q_gate.data(), rows, kQHeads * 2 * kHeadDim),
         .k = FloatMatrix(kv.data(), rows, kKvHeads * kHeadDim),
         .v = FloatMatrix(kv.data(), rows, kKvHeads * kHeadDim),
         .q_norm = norm.data(),
         .k_norm = norm.data(),
         .num_q_heads = kQHeads,
         .num_kv_heads = kKvHeads,
         .head_dim = kHeadDim,
         .rotary_dim = 64,
         .q_out = FloatMatrix(q_out.data(), rows, kQHeads * kHeadDim),
         .pages = {k.data(), v.data(), DType::kBFloat16, static_cast<int32_t>(num_pages), kPageTokens, kKvHeads, kHeadDim},
         .dense_k = {},
         .dense_v = {}},
        pool);
    benchmark::ClobberMemory();
  }
  Report(state, 4.0 * rows * kHeadDim * (2 * kQHeads + 3 * kKvHeads), 6.0 * rows * kHeadDim * (kQHeads + kKvHeads));
}
BENCHMARK(QkNormRope)->ArgNames({"threads", "rows"})->MeasureProcessCPUTime()->Args({1, 4})->Args({1, 512});

}  // namespace
}  // namespace bebop

BENCHMARK_MAIN();
