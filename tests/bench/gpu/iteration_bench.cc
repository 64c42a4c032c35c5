// SPDX-License-Identifier: Apache-2.0

// Times whole draft-verify iterations of the CUDA executor, without server, scheduler or network: dummy weights, caches filled with random values at
// the given context, and a synthetic acceptance. Steps are planned here, as the scheduler would for sequences that only decode. One JSON line a
// cell:
//   ms            wall time of all measured iterations over their number: what the executor and this planning make of it together
//   execute_ms    median time inside Execute
//   starved       share of the steps that found the device with nothing left to do when they began: with the iteration that runs ahead, none should
//   host_gap      idle time of the device before those steps began, over the wall time. A lower bound: the device goes on waiting until the step
//                 has launched its iteration
//
//   iteration_bench --config DIR [--batch B]... [--gamma G]... [--accept-length A]... [--context L] [--iterations N] [--warmup N] [--graphs on|off]
//                   [--device N] [--memory-fraction F]
//
// A cell that does not fit runs at the largest context that does; "context" in its line says which.

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <string_view>
#include <thread>

#include "absl/strings/str_cat.h"
#include "engine/config/model_config.h"
#include "engine/memory/device_memory.h"
#include "engine/memory/model_state.h"
#include "engine/model/ops.h"
#include "engine/runtime/cuda_executor.h"
#include "engine/weights/dummy_weights.h"
#include "tests/bench/gpu/bench_device.h"

namespace bebop::bench {
namespace {

struct Options {
  std::string config;
  std::vector<int32_t> batches, gammas;
  std::vector<double> accept_lengths;
  int32_t context = 4096, iterations = 64, warmup = 16, device = 0;
  double memory_fraction = 0.92;
  bool graphs = true;
};

constexpr int32_t kPageTokens = 64;

template <typename T>
T Take(absl::StatusOr<T> value) {
  if (!value.ok()) {
    std::fprintf(stderr, "error: %s\n", value.status().ToString().c_str());
    std::exit(1);
  }
  return std::move(*value);
}

// Chance with which each reached draft must be accepted: Σ a^i, i = 0..γ, = length.
double SyntheticAcceptance(double length, int32_t gamma) {
  double low = 0.0, high = 1.0;
  for (int i = 0; i < 60; ++i) {
    const double middle = (low + high) / 2;
    double sum = 0.0;
    for (int32_t j = 0; j <= gamma; ++j) sum += std::pow(middle, j);
    (sum < length ? low : high) = middle;
  }
  return low;
}

// A sequence that decodes for ever, advanced by what each step returns.
struct Decoding {
  std::vector<int32_t> pages;
  uint32_t last_token = 1;
  int32_t num_computed = 0, num_replay = 0, num_drafts = 0, num_output = 0;
};

class IterationBench {
 public:
  explicit IterationBench(const Options& options)
      : options_(options),
        pool_(std::max(1u, std::thread::hardware_concurrency())),
        config_(Take(LoadModelConfig(options.config))),
        stream_({.device = options.device}) {
    if (!stream_.ok()) {
      std::fprintf(stderr, "error: %s\n", stream_.error().c_str());
      std::exit(1);
    }
    memory_ = MakeCudaMemory(&stream_);
    ops_ = MakeCudaOps(&stream_);
    weights_ = Take(MakeDummyWeights(config_, DType::kBFloat16, 1, pool_, memory_.get()));
  }

  void Run() {
    for (const int32_t batch : options_.batches) {
      for (const int32_t gamma : options_.gammas) RunShape(batch, gamma);
    }
  }

 private:
  void RunShape(int32_t batch, int32_t gamma) {
    const int32_t steps = options_.iterations + options_.warmup + 8;
    const int32_t spare = steps * (gamma + 1) + 4 * (gamma + 1);
    ModelStateOptions state;
    state.kv_dtype = DType::kBFloat16;
    state.input_dtype = DType::kBFloat16;
    state.page_tokens = kPageTokens;
    state.num_slots = batch;
    state.window = gamma;
    CudaExecutorOptions executor_options;
    executor_options.max_num_seqs = batch;
    executor_options.max_step_tokens = std::max(batch * (gamma + 1), 64);
    executor_options.max_draft_tokens = gamma;
    executor_options.page_tokens = kPageTokens;
    executor_options.graphs = options_.graphs;

    // The largest context that fits.
    state.num_pages = 1;
    const int64_t fixed = CudaExecutorBytes(config_, executor_options) + SlotBytes(config_, state) * batch +
                          Model::ActivationBytes(config_, executor_options.max_step_tokens, DType::kBFloat16);
    const int64_t room = static_cast<int64_t>(static_cast<double>(memory_->available_bytes()) * options_.memory_fraction) - fixed;
    const int64_t pages_per_sequence = room / batch / std::max<int64_t>(1, PageBytes(config_, state));
    int32_t context = options_.context;
    const auto pages_for = [&](int32_t tokens) { return (tokens + spare + kPageTokens - 1) / kPageTokens; };
    while (context > 0 && pages_for(context) > pages_per_sequence) context -= 256;
    if (context <= 0) {
      std::printf("{\"batch\": %d, \"gamma\": %d, \"error\": \"does not fit: %lld bytes left for KV\"}\n", batch, gamma, static_cast<long long>(room));
      return;
    }
    executor_options.max_model_len = context + spare;
    executor_options.page_table_entries = int64_t{batch} * pages_for(context);
    state.num_pages = batch * pages_for(context);
    const auto storage = Take(ModelStateStorage::Create(config_, state, memory_.get()));
    FillCaches(storage->state());
    const auto model = Take(Model::Create(config_, executor_options.max_step_tokens, DType::kBFloat16, ops_.get(), memory_.get()));
    model->SetWeights(weights_.get());
    const std::unique_ptr<Executor> executor =
        Take(MakeCudaExecutor(config_, executor_options, model.get(), storage.get(), memory_.get(), &stream_));
    for (const double length : gamma > 0 ? options_.accept_lengths : std::vector<double>{1.0}) {
      if (length > gamma + 1) continue;
      RunCell(*executor, batch, gamma, length, context, pages_for(context));
    }
  }

  // Random values, so that no product runs on zeros.
  void FillCaches(const ModelState& state) {
    const DeviceBlock values(64 << 20, DeviceBlock::Fill::kBFloat16);
    const auto fill = [&](void* data, int64_t bytes) {
      for (int64_t at = 0; at < bytes; at += values.bytes()) {
        memory_->Copy(static_cast<char*>(data) + at, values.as<void>(), std::min(values.bytes(), bytes - at));
      }
    };
    const auto fill_pages = [&](const KvPagesView& pages) {
      const int64_t bytes = int64_t{pages.num_pages} * pages.num_kv_heads * pages.page_tokens * pages.head_dim * ElementBytes(pages.dtype);
      fill(pages.k, bytes);
      fill(pages.v, bytes);
    };
    for (const KvPagesView& pages : state.kv) fill_pages(pages);
    if (state.mtp_kv.num_pages > 0) fill_pages(state.mtp_kv);
    CheckCuda(cudaStreamSynchronize(stream_.handle()), "filling the caches");
  }

  void RunCell(Executor& executor, int32_t batch, int32_t gamma, double length, int32_t context, int32_t pages_per_sequence) {
    GenerateRequest request;
    request.sampling.seed = 5;
    request.stopping.max_new_tokens = 1 << 24;
    request.output.logprobs = true;
    if (gamma > 0) {
      request.speculation.mode = SpeculationMode::kRejection;
      request.speculation.num_draft_tokens = gamma;
      request.speculation.synthetic_acceptance = SyntheticAcceptance(length, gamma);
    } else {
      request.speculation.mode = SpeculationMode::kOff;
    }
    std::vector<Decoding> sequences(batch);
    for (int32_t b = 0; b < batch; ++b) {
      sequences[b].num_computed = context;
      for (int32_t page = 0; page < pages_per_sequence; ++page) sequences[b].pages.push_back(page * batch + b);  // apart, as after a while
    }
    const uint64_t first_residency = next_residency_;
    next_residency_ += batch;
    std::vector<double> inside;
    int32_t num_starved = 0;
    std::chrono::steady_clock::time_point first;
    int64_t tokens = 0;
    StepPlan plan;
    StepResult result;
    // In the stream a step's work lies between its two marks, so the time from one step's `after` to the next one's `before` is idle time.
    struct Marks {
      cudaEvent_t before, after;
    };
    std::vector<Marks> marks(options_.warmup + options_.iterations);
    for (Marks& mark : marks) {
      CheckCuda(cudaEventCreate(&mark.before), "cudaEventCreate");
      CheckCuda(cudaEventCreate(&mark.after), "cudaEventCreate");
    }
    for (int32_t step = 0; step < options_.warmup + options_.iterations; ++step) {
      plan.sequences.clear();
      for (int32_t b = 0; b < batch; ++b) {
        Decoding& sequence = sequences[b];
        SequencePlan& out = plan.sequences.emplace_back();
        out.slot = b;
        out.residency = first_residency + b;
        out.known_tokens = {&sequence.last_token, 1};
        out.num_computed = sequence.num_computed;
        out.num_replay = sequence.num_replay;
        out.num_drafts = sequence.num_drafts;
        out.sample = true;
        out.num_drafts_next = gamma;
        out.keep_mtp = gamma > 0;
        out.pages = sequence.pages;
        out.state_src = step == 0 ? -1 : b;
        out.state_dst = b;
        out.num_output = sequence.num_output;
        out.request = &request;
        out.seed = request.sampling.seed;
        out.sample_index = static_cast<uint32_t>(b);
      }
      if (step == options_.warmup) first = std::chrono::steady_clock::now();
      if (step >= options_.warmup && cudaStreamQuery(stream_.handle()) == cudaSuccess) ++num_starved;
      CheckCuda(cudaEventRecord(marks[step].before, stream_.handle()), "cudaEventRecord");
      const auto begin = std::chrono::steady_clock::now();
      const absl::Status status = executor.Execute(plan, &result);
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      CheckCuda(cudaEventRecord(marks[step].after, stream_.handle()), "cudaEventRecord");
      if (!status.ok()) {
        std::fprintf(stderr, "error: %s\n", status.ToString().c_str());
        std::exit(1);
      }
      for (int32_t b = 0; b < batch; ++b) {
        const SequenceOutcome& outcome = result.sequences[b];
        Decoding& sequence = sequences[b];
        sequence.num_computed += 1 + outcome.num_accepted;
        sequence.num_replay = outcome.num_accepted;
        sequence.num_drafts = outcome.num_drafts_made;
        sequence.num_output += outcome.num_emitted;
        sequence.last_token = outcome.tokens[outcome.num_emitted - 1];
        if (step >= options_.warmup) tokens += outcome.num_emitted;
      }
      if (step >= options_.warmup) inside.push_back(seconds);
    }
    const double span = std::chrono::duration<double>(std::chrono::steady_clock::now() - first).count();
    CheckCuda(cudaStreamSynchronize(stream_.handle()), "the last iteration");
    double gap_ms = 0.0;
    for (size_t i = 1; i < marks.size(); ++i) {
      float ms = 0.0f;
      CheckCuda(cudaEventElapsedTime(&ms, marks[i - 1].after, marks[i].before), "cudaEventElapsedTime");
      if (static_cast<int32_t>(i) >= options_.warmup) gap_ms += ms;
    }
    for (const Marks& mark : marks) {
      (void)cudaEventDestroy(mark.before);
      (void)cudaEventDestroy(mark.after);
    }
    std::sort(inside.begin(), inside.end());
    std::printf("{\"batch\": %d, \"gamma\": %d, \"context\": %d, \"accept_length\": %.3f, \"ms\": %.4f, \"execute_ms\": %.4f, "
                "\"starved\": %.3f, \"host_gap\": %.4f, \"iterations_per_s\": %.2f, \"tokens_per_s\": %.1f, \"graphs\": %s}\n",
                batch, gamma, context, static_cast<double>(tokens) / options_.iterations / batch, span / options_.iterations * 1e3,
                inside[inside.size() / 2] * 1e3, static_cast<double>(num_starved) / options_.iterations, gap_ms * 1e-3 / span,
                options_.iterations / span, static_cast<double>(tokens) / span, options_.graphs ? "true" : "false");
    std::fflush(stdout);
  }

  const Options options_;
  ThreadPool pool_;
  const ModelConfig config_;
  cuda::Stream stream_;
  std::unique_ptr<DeviceMemory> memory_;
  std::unique_ptr<Ops> ops_;
  std::unique_ptr<ModelWeights> weights_;
  uint64_t next_residency_ = 1;
};

Options Parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; i += 2) {
    const std::string_view arg = argv[i];
    if (i + 1 >= argc) {
      std::fprintf(stderr, "error: %s needs a value\n", argv[i]);
      std::exit(2);
    }
    const char* const value = argv[i + 1];
    if (arg == "--config") options.config = value;
    else if (arg == "--batch") options.batches.push_back(std::atoi(value));
    else if (arg == "--gamma") options.gammas.push_back(std::atoi(value));
    else if (arg == "--accept-length") options.accept_lengths.push_back(std::atof(value));
    else if (arg == "--context") options.context = std::atoi(value);
    else if (arg == "--iterations") options.iterations = std::atoi(value);
    else if (arg == "--warmup") options.warmup = std::atoi(value);
    else if (arg == "--device") options.device = std::atoi(value);
    else if (arg == "--memory-fraction") options.memory_fraction = std::atof(value);
    else if (arg == "--graphs") options.graphs = std::string_view(value) != "off";
    else {
      std::fprintf(stderr, "error: unknown argument '%s' (the head of iteration_bench.cc lists them)\n", argv[i]);
      std::exit(2);
    }
  }
  if (options.config.empty()) {
    std::fprintf(stderr, "error: --config DIR is missing\n");
    std::exit(2);
  }
  if (options.batches.empty()) options.batches = {1, 8, 32, 128, 256};
  if (options.gammas.empty()) options.gammas = {0, 1, 3, 5};
  if (options.accept_lengths.empty()) options.accept_lengths = {1.0, 2.5, 3.5};
  return options;
}

}  // namespace
}  // namespace bebop::bench

int main(int argc, char** argv) {
  bebop::bench::IterationBench(bebop::bench::Parse(argc, argv)).Run();
  return 0;
}
