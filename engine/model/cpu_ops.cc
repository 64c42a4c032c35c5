// SPDX-License-Identifier: Apache-2.0
#include "engine/model/ops.h"

namespace bebop {
namespace {

class CpuOps final : public Ops {
 public:
  explicit CpuOps(ThreadPool* pool) : pool_(*pool) {}

  void Embedding(const EmbeddingArgs& args) override { cpu::Embedding(args, pool_); }
  void RmsNorm(const RmsNormArgs& args) override { cpu::RmsNorm(args, pool_); }
  void GatedRmsNorm(const GatedRmsNormArgs& args) override { cpu::GatedRmsNorm(args, pool_); }
  void Linear(const LinearArgs& args) override { cpu::Linear(args, linear_scratch_, pool_); }
  void SwiGlu(const SwiGluArgs& args) override { cpu::SwiGlu(args, pool_); }
  void QkNormRope(const QkNormRopeArgs& args) override { cpu::QkNormRope(args, pool_); }
  void Attention(const AttentionArgs& args) override { cpu::Attention(args, pool_); }
  void CausalConv(const CausalConvArgs& args) override { cpu::CausalConv(args, pool_); }
  void DeltaRule(const DeltaRuleArgs& args) override { cpu::DeltaRule(args, pool_); }
  void ReserveLinear(int64_t rows, int64_t cols) override { linear_scratch_.Reserve(rows, cols); }

 private:
  ThreadPool& pool_;
  cpu::LinearScratch linear_scratch_;
};

}  // namespace

std::unique_ptr<Ops> MakeCpuOps(ThreadPool* pool) { return std::make_unique<CpuOps>(pool); }

}  // namespace bebop
