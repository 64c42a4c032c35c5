// SPDX-License-Identifier: Apache-2.0

// Times optimizer steps of the MTP trainer on a device: dummy weights of a model's shape, random tokens. One JSON line:
//   ms            median wall time of a step; tokens_per_s: rows of the batch over it
//   bound_ms      the step's matrix products but for the target's own pass, at the matrix rate: (2 + 4K)·H·V operations of the
//                 head a chain, and 6·K a weight of the MTP layer a token
//   fraction      bound_ms / ms
//   all_bound_ms  the same with the target's pass, and all_fraction
//
//   training_cuda_bench --config DIR [--tokens N] [--length N] [--steps K] [--samples N] [--chunk-rows N]
//                       [--matrix-rate FLOP/s] [--device N]
//
// --length: tokens of a document. --matrix-rate: what ops_cuda_bench --only ceilings has measured; without it no bounds.

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/config/model_config.h"
#include "engine/runtime/backend.h"
#include "engine/training/mtp_trainer.h"
#include "engine/weights/dummy_weights.h"
#include "tests/bench/gpu/bench_device.h"

namespace bebop::bench {
namespace {

struct Options {
  std::string config;
  int64_t tokens = 8192, length = 1024, chunk_rows = 0;
  int32_t steps = 5, samples = 5, device = 0;
  double matrix_rate = 0.0;
};

template <typename T>
T Take(absl::StatusOr<T> value) {
  if (!value.ok()) {
    std::fprintf(stderr, "error: %s\n", value.status().ToString().c_str());
    std::exit(1);
  }
  return std::move(*value);
}

int Run(const Options& options) {
  const ModelConfig config = Take(LoadModelConfig(options.config));
  ThreadPool pool(static_cast<int>(std::max(1u, std::thread::hardware_concurrency())));
  EngineOptions engine;
  engine.device = absl::StrCat(CheckDeviceName("emulated").ok() ? "emulated:" : "cuda:", options.device);
  const std::unique_ptr<Backend> backend = Take(MakeBackend(engine, &pool));
  const std::unique_ptr<TrainingOps> ops = Take(MakeTrainingOps(backend.get(), &pool));
  const std::unique_ptr<ModelWeights> weights =
      Take(MakeDummyWeights(config, DType::kBFloat16, /*seed=*/1, pool, backend->memory()));

  const MtpLayout layout(config);
  std::mt19937_64 random(7);
  std::normal_distribution<float> normal(0.0f, 0.02f);
  std::vector<float> table(65536), parameters(static_cast<size_t>(layout.total), 0.0f);
  for (float& value : table) value = normal(random);
  for (const MtpTensor& tensor : layout.tensors) {
    if (tensor.is_vector) continue;  // zero-centred norms
    for (int64_t i = 0; i < tensor.size(); ++i)
      parameters[static_cast<size_t>(tensor.offset + i)] = table[random() % table.size()];
  }
  TrainerOptions trainer_options;
  trainer_options.num_steps_ahead = options.steps;
  trainer_options.batch_tokens = options.tokens;
  trainer_options.chunk_rows = options.chunk_rows;
  const std::unique_ptr<MtpTrainer> trainer =
      Take(MtpTrainer::Create(config, weights.get(), backend.get(), ops.get(), trainer_options, parameters));
  std::vector<TrainingDocument> documents(static_cast<size_t>(options.tokens / options.length));
  std::vector<const TrainingDocument*> batch;
  for (TrainingDocument& document : documents) {
    for (int64_t i = 0; i < options.length; ++i) {
      document.token_ids.push_back(static_cast<uint32_t>(random() % static_cast<uint64_t>(config.vocab_size)));
    }
    batch.push_back(&document);
  }

  std::vector<double> times;
  TrainingReport report;
  for (int32_t i = 0; i <= options.samples; ++i) {
    report = Take(trainer->Step(batch));
    if (i > 0) times.push_back(report.seconds);  // the first one makes plans
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  const double seconds = times[times.size() / 2];
  const double tokens = static_cast<double>(report.tokens), steps = options.steps, hidden = config.hidden_size;
  const double chains = static_cast<double>(report.terms);
  double layer_weights = 0.0;
  for (const MtpTensor& tensor : layout.tensors) layer_weights += tensor.is_vector ? 0.0 : static_cast<double>(tensor.size());
  const double flops =
      chains * (2 + 4 * steps) * hidden * static_cast<double>(config.vocab_size) + 6 * steps * tokens * layer_weights;
  std::printf(
      "{\"op\": \"train_step\", \"tokens\": %ld, \"length\": %ld, \"steps\": %d, \"ms\": %.2f, \"tokens_per_s\": %.0f, "
      "\"TFLOP\": %.3f, \"all_TFLOP\": %.3f, \"TFLOP_per_s\": %.1f, \"loss\": %.4f",
      static_cast<long>(report.tokens), static_cast<long>(options.length), options.steps, seconds * 1e3, tokens / seconds,
      flops * 1e-12, report.gemm_flops * 1e-12, report.gemm_flops / seconds * 1e-12, report.loss);
  if (options.matrix_rate > 0) {
    const double bound = flops / options.matrix_rate, all_bound = report.gemm_flops / options.matrix_rate;
    std::printf(", \"bound_ms\": %.2f, \"fraction\": %.3f, \"all_bound_ms\": %.2f, \"all_fraction\": %.3f", bound * 1e3,
                bound / seconds, all_bound * 1e3, all_bound / seconds);
  }
  std::printf("}\n");
  return 0;
}

int Usage() {
  std::fprintf(stderr,
               "usage: training_cuda_bench --config DIR [--tokens N] [--length N] [--steps K] [--samples N] [--chunk-rows N] "
               "[--matrix-rate FLOP/s] [--device N]\n");
  return 2;
}

int Main(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string_view name = argv[i];
    const char* const value = argv[i + 1];
    if (name == "--config") {
      options.config = value;
    } else if (name == "--tokens") {
      options.tokens = std::atoll(value);
    } else if (name == "--length") {
      options.length = std::atoll(value);
    } else if (name == "--steps") {
      options.steps = std::atoi(value);
    } else if (name == "--samples") {
      options.samples = std::atoi(value);
    } else if (name == "--chunk-rows") {
      options.chunk_rows = std::atoll(value);
    } else if (name == "--matrix-rate") {
      options.matrix_rate = std::atof(value);
    } else if (name == "--device") {
      options.device = std::atoi(value);
    } else {
      return Usage();
    }
  }
  const bool sound = options.length > options.steps && options.tokens >= options.length && options.samples >= 1;
  if (argc % 2 == 0 || options.config.empty() || !sound) return Usage();
  return Run(options);
}

}  // namespace
}  // namespace bebop::bench

int main(int argc, char** argv) { return bebop::bench::Main(argc, argv); }
