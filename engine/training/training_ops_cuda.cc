// SPDX-License-Identifier: Apache-2.0
// The operators of training on a device, and their choice in a build with CUDA.
#include <limits>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/memory/device_memory.h"
#include "engine/training/training_ops.h"
#include "kernels/common/cuda_stream.h"

namespace bebop {
namespace {

// A failed device stays failed: what waits then returns a result that is not finite, and DeviceMemory::status() says why.
class CudaTrainingOps final : public TrainingOps {
 public:
  static absl::StatusOr<std::unique_ptr<TrainingOps>> Create(cuda::Stream* stream) {
    std::unique_ptr<CudaTrainingOps> ops(new CudaTrainingOps(stream));
    BEBOP_ASSIGN_OR_RETURN(ops->storage_, ops->memory_->Allocate(sizeof(Results), "training results"));
    ops->results_ = static_cast<Results*>(ops->storage_.get());
    return ops;
  }

  absl::Status CheckModel(const ModelConfig& config, DType weight_dtype) const override {
    if (weight_dtype != DType::kBFloat16) {
      return absl::UnimplementedError(
          absl::StrCat("training: dtype: ", DTypeName(weight_dtype),
                       ", but a device's products are bfloat16; --dtype bfloat16 or --device cpu takes it"));
    }
    const auto check = [](const char* key, int64_t value, int64_t multiple_of, int64_t most) {
      if (value % multiple_of == 0 && value <= most) return absl::OkStatus();
      return absl::UnimplementedError(absl::StrCat("training: ", key, ": ", value, ", but on a device it must be a multiple of ",
                                                   multiple_of, " and at most ", most, "; --device cpu takes it"));
    };
    // Whole 16-byte loads of bf16, the columns that the attention's tiles hold, and 64 KiB of shared memory for the gradient of a
    // norm.
    for (const absl::Status& status :
         {check("vocab_size", config.vocab_size, 8, std::numeric_limits<int32_t>::max()),
          check("hidden_size", config.hidden_size, 8, 16384), check("intermediate_size", config.intermediate_size, 8, 1 << 24),
          check("head_dim", config.head_dim, 16, 256),
          check("num_attention_heads / num_key_value_heads", config.num_attention_heads / config.num_key_value_heads, 1, 32)}) {
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  // What a row takes of the workspace in ChainAttention and its backward: two row numbers, and a float a head.
  int64_t MaxRows(const ModelConfig& config) const override {
    return stream_.workspace_bytes() / (8 + 4 * int64_t{config.num_attention_heads});
  }

  absl::Status ReserveOperands(int64_t values) override {
    const int64_t bytes = OperandBytes(values) / 2;
    if (bytes <= scratch_.bytes) return absl::OkStatus();
    scratch_ = {};
    operands_.reset();  // waits for what may use it
    BEBOP_ASSIGN_OR_RETURN(operands_, memory_->Allocate(2 * bytes, "operands in bf16"));
    scratch_ = {.operands = {operands_.get(), static_cast<char*>(operands_.get()) + bytes}, .bytes = bytes};
    return absl::OkStatus();
  }
  int64_t OperandBytes(int64_t values) const override { return 2 * RoundUp(values * ElementBytes(DType::kBFloat16), 256); }

  int64_t PackedMatrixBytes(int64_t rows, int64_t cols) const override { return rows * cols * ElementBytes(DType::kBFloat16); }
  PackedMatrix Pack(const TensorView& w, void* destination) override { return cuda::PackBf16(w, destination, stream_); }
  PackedMatrix PackTransposed(const TensorView& w, void* destination) override {
    return cuda::PackBf16Transposed(w, destination, stream_);
  }
  bool reads_columns() const override { return true; }
  void Linear(const LinearArgs& args) override { cuda::LinearRounded(args, plans_, scratch_, stream_); }
  void LinearBackwardWeight(const LinearBackwardWeightArgs& args) override {
    cuda::LinearBackwardWeight(args, plans_, scratch_, stream_);
  }

  void Embedding(const EmbeddingArgs& args) override { cuda::Embedding(args, stream_); }
  void RmsNorm(const RmsNormArgs& args) override { cuda::RmsNorm(args, stream_); }
  void RmsNormBackward(const RmsNormBackwardArgs& args) override { cuda::RmsNormBackward(args, stream_); }
  void SwiGlu(const SwiGluArgs& args) override { cuda::SwiGlu(args, stream_); }
  void SwiGluBackward(const SwiGluBackwardArgs& args) override { cuda::SwiGluBackward(args, stream_); }
  void QkNormRope(const QkNormRopeArgs& args) override { cuda::QkNormRope(args, stream_); }
  void QkNormRopeBackward(const QkNormRopeBackwardArgs& args) override { cuda::QkNormRopeBackward(args, stream_); }
  void ChainAttention(const ChainAttentionArgs& args) override { cuda::ChainAttention(args, stream_); }
  void ChainAttentionBackward(const ChainAttentionBackwardArgs& args) override { cuda::ChainAttentionBackward(args, stream_); }
  void Copy(const TensorView& from, const TensorView& to) override { cuda::Convert(from, to, stream_); }
  void Clear(const TensorView& view) override { cuda::Clear(view, stream_); }

  DType logits_dtype() const override { return DType::kBFloat16; }
  void Normalize(const TensorView& logits, LogitNormalizer* normalizers) override {
    cuda::Normalize(logits, normalizers, stream_);
  }
  void DraftLossForward(const DraftLossArgs& args) override { cuda::DraftLossForward(args, stream_); }
  void DraftLossBackward(const DraftLossGradientArgs& args) override { cuda::DraftLossBackward(args, stream_); }
  ChainLossResult BatchLoss(const ChainLossArgs& args) override {
    cuda::ChainLoss(args, &results_->loss, stream_);
    return Read(&results_->loss, {.loss = std::numeric_limits<double>::quiet_NaN(), .finite = false});
  }

  double SquaredNorm(const float* values, int64_t count) override {
    cuda::SquaredNorm(values, count, &results_->squared_norm, stream_);
    return Read(&results_->squared_norm, std::numeric_limits<double>::quiet_NaN());
  }
  void AdamWUpdate(const AdamWArgs& args) override { cuda::AdamWUpdate(args, stream_); }

 private:
  struct Results {
    ChainLossResult loss;
    double squared_norm;
  };

  explicit CudaTrainingOps(cuda::Stream* stream) : stream_(*stream), memory_(MakeCudaMemory(stream)), plans_(stream) {}

  // Waits for *value; `failed` when the device has.
  template <typename T>
  T Read(const T* value, const T& failed) {
    T host = failed;
    memory_->CopyOut(&host, value, sizeof(T));
    return memory_->status().ok() ? host : failed;
  }

  cuda::Stream& stream_;
  const std::unique_ptr<DeviceMemory> memory_;
  cuda::LinearPlans plans_;
  std::shared_ptr<void> storage_, operands_;
  Results* results_ = nullptr;  // device memory
  cuda::LinearBackwardScratch scratch_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<TrainingOps>> MakeCudaTrainingOps(cuda::Stream* stream) { return CudaTrainingOps::Create(stream); }

absl::StatusOr<std::unique_ptr<TrainingOps>> MakeTrainingOps(Backend* backend, ThreadPool* pool) {
  if (backend->stream() == nullptr) return MakeCpuTrainingOps(pool);
  return MakeCudaTrainingOps(backend->stream());
}

}  // namespace bebop
