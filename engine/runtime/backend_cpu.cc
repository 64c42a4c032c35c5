// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/backend.h"
#include "engine/runtime/model_executor.h"

namespace bebop {
namespace {

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(ThreadPool* pool) : pool_(pool), memory_(MakeHostMemory()), ops_(MakeCpuOps(pool)) {}

  const std::string& name() const override { return name_; }
  DeviceMemory* memory() override { return memory_.get(); }
  absl::StatusOr<std::unique_ptr<DeviceMemory>> NewMemory() override { return MakeHostMemory(); }
  Ops* ops() override { return ops_.get(); }
  cuda::Stream* stream() override { return nullptr; }
  DType activation_dtype(DType) const override { return DType::kFloat32; }
  absl::Status CheckShapes(const ModelConfig&, DType) const override { return absl::OkStatus(); }

  absl::StatusOr<EngineSizes> Sizes(const EngineOptions& options, const ModelConfig& config, int64_t) override {
    return ResolveSizes(options, config, memory_->available_bytes());
  }

  absl::StatusOr<std::unique_ptr<Executor>> MakeExecutor(const EngineOptions&, const ModelConfig& config, const EngineSizes& sizes, Model* model,
                                                         ModelStateStorage* storage) override {
    ModelExecutorOptions executor;
    executor.max_num_seqs = sizes.scheduler.max_num_seqs;
    executor.max_step_tokens = sizes.scheduler.max_step_tokens;
    executor.page_table_entries = sizes.page_table_entries;
    executor.max_draft_tokens = sizes.max_draft_tokens;
    return std::make_unique<ModelExecutor>(config, executor, model, storage, memory_.get(), pool_);
  }

  void EnterThread() override {}

 private:
  const std::string name_ = "cpu";
  ThreadPool* const pool_;
  const std::unique_ptr<DeviceMemory> memory_;
  const std::unique_ptr<Ops> ops_;
};

}  // namespace

std::unique_ptr<Backend> MakeCpuBackend(ThreadPool* pool) { return std::make_unique<CpuBackend>(pool); }

}  // namespace bebop
