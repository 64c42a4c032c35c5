// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "absl/strings/str_cat.h"
#include "engine/training/training_ops.h"
#include "kernels/common/check.h"

namespace bebop {
namespace {

class CpuTrainingOps final : public TrainingOps {
 public:
  explicit CpuTrainingOps(ThreadPool* pool) : pool_(*pool) {}

  absl::Status CheckModel(const ModelConfig& config, DType) const override {
    if (config.head_dim % 16 == 0) return absl::OkStatus();
    return absl::UnimplementedError(absl::StrCat("training: head_dim: ", config.head_dim, ", but it must be a multiple of 16"));
  }

  absl::Status ReserveOperands(int64_t values) override {
    linear_scratch_.Reserve(1, values);
    return absl::OkStatus();
  }
  int64_t OperandBytes(int64_t values) const override { return values * ElementBytes(DType::kFloat32); }

  int64_t PackedMatrixBytes(int64_t rows, int64_t cols) const override { return PackedBytes(DType::kFloat32, rows, cols); }
  PackedMatrix Pack(const TensorView& w, void* destination) override {
    return cpu::PackFloat(w, static_cast<float*>(destination), pool_);
  }
  PackedMatrix PackTransposed(const TensorView& w, void* destination) override {
    return cpu::PackTransposed(w, static_cast<float*>(destination), pool_);
  }
  void Linear(const LinearArgs& args) override { cpu::Linear(args, linear_scratch_, pool_); }
  void LinearBackwardWeight(const LinearBackwardWeightArgs& args) override {
    cpu::LinearBackwardWeight(args, backward_scratch_, pool_);
  }

  void Embedding(const EmbeddingArgs& args) override { cpu::Embedding(args, pool_); }
  void RmsNorm(const RmsNormArgs& args) override { cpu::RmsNorm(args, pool_); }
  void RmsNormBackward(const RmsNormBackwardArgs& args) override { cpu::RmsNormBackward(args, pool_); }
  void SwiGlu(const SwiGluArgs& args) override { cpu::SwiGlu(args, pool_); }
  void SwiGluBackward(const SwiGluBackwardArgs& args) override { cpu::SwiGluBackward(args, pool_); }
  void QkNormRope(const QkNormRopeArgs& args) override { cpu::QkNormRope(args, pool_); }
  void QkNormRopeBackward(const QkNormRopeBackwardArgs& args) override { cpu::QkNormRopeBackward(args, pool_); }
  void ChainAttention(const ChainAttentionArgs& args) override { cpu::ChainAttention(args, pool_); }
  void ChainAttentionBackward(const ChainAttentionBackwardArgs& args) override { cpu::ChainAttentionBackward(args, pool_); }
  void Copy(const TensorView& from, const TensorView& to) override {
    BEBOP_CHECK(from.rows == to.rows && from.cols == to.cols && from.dtype == DType::kFloat32 && to.dtype == DType::kFloat32);
    pool_.ParallelFor(from.rows, kRowsOfARange, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        std::memcpy(to.Row<float>(row), from.Row<float>(row), static_cast<size_t>(from.cols) * sizeof(float));
      }
    });
  }
  void Clear(const TensorView& view) override {
    pool_.ParallelFor(view.rows, kRowsOfARange, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        std::memset(view.Row<char>(row * ElementBytes(view.dtype)), 0, static_cast<size_t>(view.cols * ElementBytes(view.dtype)));
      }
    });
  }

  DType logits_dtype() const override { return DType::kFloat32; }
  void Normalize(const TensorView& logits, LogitNormalizer* normalizers) override { cpu::Normalize(logits, normalizers, pool_); }
  void DraftLossForward(const DraftLossArgs& args) override { cpu::DraftLossForward(args, pool_); }
  void DraftLossBackward(const DraftLossGradientArgs& args) override { cpu::DraftLossBackward(args, pool_); }
  ChainLossResult BatchLoss(const ChainLossArgs& args) override { return ChainLoss(args); }

  double SquaredNorm(const float* values, int64_t count) override { return cpu::SquaredNorm(values, count, pool_); }
  void AdamWUpdate(const AdamWArgs& args) override { cpu::AdamWUpdate(args, pool_); }

 private:
  static constexpr int64_t kRowsOfARange = 64;

  ThreadPool& pool_;
  cpu::LinearScratch linear_scratch_;
  cpu::LinearBackwardScratch backward_scratch_;
};

}  // namespace

std::unique_ptr<TrainingOps> MakeCpuTrainingOps(ThreadPool* pool) { return std::make_unique<CpuTrainingOps>(pool); }

}  // namespace bebop
