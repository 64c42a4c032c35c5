// SPDX-License-Identifier: Apache-2.0
// The backends of a build with CUDA.
#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "engine/base/status_macros.h"
#include "engine/runtime/backend.h"
#include "engine/runtime/cuda_executor.h"
#include "engine/runtime/iteration_graphs.h"
#include "engine/runtime/scorer.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/decode/decode.h"

namespace bebop {
namespace {

// The names under which this build knows its devices: an emulated device is never passed off as a real one.
#if defined(BEBOP_CUDA_EMULATION)
constexpr char kDeviceKind[] = "emulated";
#else
constexpr char kDeviceKind[] = "cuda";
#endif

// Captured iterations: an estimate of 4 MiB each (some hundred kernels with their arguments), not measured yet.
constexpr int64_t kGraphBytes = int64_t{IterationGraphs::kMaxGraphs} * (4 << 20);

// The number in "cuda:3"; 0 for "cuda". -1: not such a name.
int DeviceNumber(const std::string& device) {
  if (device == kDeviceKind) return 0;
  absl::string_view rest = device;
  int number = 0;
  if (!absl::ConsumePrefix(&rest, absl::StrCat(kDeviceKind, ":")) || !absl::SimpleAtoi(rest, &number) || number < 0) return -1;
  return number;
}

// What the device's kernels need of a size: whole 16-byte loads of bf16, and limits of threads and registers.
absl::Status CheckSize(const char* key, int64_t value, int64_t multiple_of, int64_t most) {
  if (value % multiple_of == 0 && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("config.json: ", key, ": ", value, ", but on a device it must be a multiple of ", multiple_of,
                                                 " and at most ", most, "; --device cpu takes it"));
}

CudaExecutorOptions ExecutorOptions(const EngineOptions& options, const EngineSizes& sizes) {
  CudaExecutorOptions executor;
  executor.max_num_seqs = sizes.scheduler.max_num_seqs;
  executor.max_step_tokens = sizes.scheduler.max_step_tokens;
  executor.page_table_entries = sizes.page_table_entries;
  executor.max_draft_tokens = sizes.max_draft_tokens;
  executor.page_tokens = sizes.scheduler.page_tokens;
  executor.max_model_len = sizes.scheduler.max_model_len;
  executor.graphs = options.cuda_graphs;
  return executor;
}

class CudaBackend final : public Backend {
 public:
  static absl::StatusOr<std::unique_ptr<Backend>> Create(const EngineOptions& options, ThreadPool* pool) {
    const int number = DeviceNumber(options.device);
    int count = 0;
    const cudaError_t result = cudaGetDeviceCount(&count);
    if (result != cudaSuccess) {
      return absl::InvalidArgumentError(absl::StrCat("device: ", options.device, ": this machine has none: ", cudaGetErrorString(result)));
    }
    if (number >= count) {
      return absl::InvalidArgumentError(absl::StrCat("device: ", options.device, " is not in this machine; it has ", count, ", numbered from 0"));
    }
    const cuda::StreamOptions stream_options{.device = number, .batch_invariant = options.batch_invariant};
    size_t free_bytes = 0, total_bytes = 0;
    if (cudaSetDevice(number) == cudaSuccess && cudaMemGetInfo(&free_bytes, &total_bytes) == cudaSuccess &&
        static_cast<int64_t>(free_bytes) < stream_options.workspace_bytes) {
      return absl::ResourceExhaustedError(absl::StrCat("device: ", options.device, ": ", free_bytes, " of ", total_bytes,
                                                       " bytes are free, and the workspace alone takes ", stream_options.workspace_bytes));
    }
    auto stream = std::make_unique<cuda::Stream>(stream_options);
    cudaDeviceProp properties{};
    BEBOP_CUDA_TRY(*stream, cudaGetDeviceProperties(&properties, number));
    if (!stream->ok()) return absl::InternalError(absl::StrCat("device error: ", stream->error()));
    return std::unique_ptr<Backend>(new CudaBackend(std::move(stream), pool, absl::StrCat(kDeviceKind, ":", number, " (", properties.name, ")")));
  }

  const std::string& name() const override { return name_; }
  DeviceMemory* memory() override { return memory_.get(); }

  absl::StatusOr<std::unique_ptr<DeviceMemory>> NewMemory() override {
    // Copies need no workspace.
    auto stream = std::make_unique<cuda::Stream>(cuda::StreamOptions{.device = stream_->device(), .workspace_bytes = 0});
    if (!stream->ok()) return absl::InternalError(absl::StrCat("device error: ", stream->error()));
    return MakeCudaMemory(std::move(stream));
  }

  Ops* ops() override { return ops_.get(); }
  cuda::Stream* stream() override { return stream_.get(); }
  DType activation_dtype(DType weight_dtype) const override { return weight_dtype; }

  absl::Status CheckShapes(const ModelConfig& config, DType dtype) const override {
    BEBOP_RETURN_IF_ERROR(CheckSize("hidden_size", config.hidden_size, 8, 32768));
    BEBOP_RETURN_IF_ERROR(CheckSize("vocab_size", config.vocab_size, 1, kMaxDecodeVocabSize));
    BEBOP_RETURN_IF_ERROR(CheckSize("intermediate_size", config.intermediate_size, 8, 1 << 30));
    BEBOP_RETURN_IF_ERROR(CheckSize("head_dim", config.head_dim, dtype == DType::kBFloat16 ? 16 : 8, 256));
    BEBOP_RETURN_IF_ERROR(CheckSize("linear_key_head_dim", config.linear_key_head_dim, 8, 256));
    BEBOP_RETURN_IF_ERROR(CheckSize("linear_value_head_dim", config.linear_value_head_dim, 8, 256));
    return CheckSize("linear_conv_kernel_dim", config.linear_conv_kernel_dim, 1, 8);
  }

  absl::StatusOr<EngineSizes> Sizes(const EngineOptions& options, const ModelConfig& config, int64_t weight_bytes) override {
    DeviceBudget budget;
    budget.free_bytes = free_bytes_;
    budget.weight_bytes = weight_bytes;
    budget.staging_bytes = StagingBytes(options, weight_bytes);
    budget.workspace_bytes = stream_->workspace_bytes();
    budget.graph_bytes = options.cuda_graphs ? kGraphBytes : 0;
    budget.lookahead_tokens = CudaLookaheadTokens(config.num_mtp_layers > 0 ? options.max_draft_tokens : 0);
    budget.activation_dtype = activation_dtype(options.dtype);
    budget.executor_bytes = [&](const EngineSizes& sizes) { return CudaExecutorBytes(config, ExecutorOptions(options, sizes)); };
    BEBOP_ASSIGN_OR_RETURN(EngineSizes sizes, ResolveDeviceSizes(options, config, budget));
    BEBOP_RETURN_IF_ERROR(CheckCudaExecutorOptions(config, ExecutorOptions(options, sizes), stream_->workspace_bytes()));
    return sizes;
  }

  absl::StatusOr<std::unique_ptr<Executor>> MakeExecutor(const EngineOptions& options, const ModelConfig& config, const EngineSizes& sizes,
                                                         Model* model, ModelStateStorage* storage) override {
    CudaExecutorOptions executor = ExecutorOptions(options, sizes);
    executor.pool = pool_;
    return MakeCudaExecutor(config, executor, model, storage, memory_.get(), stream_.get());
  }

  void EnterThread() override { BEBOP_CUDA_TRY(*stream_, cudaSetDevice(stream_->device())); }

 private:
  CudaBackend(std::unique_ptr<cuda::Stream> stream, ThreadPool* pool, std::string name)
      : name_(std::move(name)),
        pool_(pool),
        stream_(std::move(stream)),
        memory_(MakeCudaMemory(stream_.get())),
        ops_(MakeCudaOps(stream_.get())),
        free_bytes_(memory_->available_bytes() + stream_->workspace_bytes()) {}

  const std::string name_;
  ThreadPool* const pool_;  // for the host's part of scoring
  const std::unique_ptr<cuda::Stream> stream_;
  const std::unique_ptr<DeviceMemory> memory_;
  const std::unique_ptr<Ops> ops_;
  const int64_t free_bytes_;  // before the engine took anything
};

}  // namespace

absl::Status CheckDeviceName(const std::string& device) {
  if (device == "cpu" || DeviceNumber(device) >= 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("device: ", device, " is not in this build; it has: cpu, ", kDeviceKind, ", ", kDeviceKind, ":N"));
}

absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const EngineOptions& options, ThreadPool* pool) {
  BEBOP_RETURN_IF_ERROR(CheckDeviceName(options.device));
  if (options.device == "cpu") return MakeCpuBackend(pool);
  return CudaBackend::Create(options, pool);
}

}  // namespace bebop
