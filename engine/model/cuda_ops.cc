// SPDX-License-Identifier: Apache-2.0
#include "engine/model/ops.h"

namespace bebop {
namespace {

class CudaOps final : public Ops {
 public:
  explicit CudaOps(cuda::Stream* stream) : stream_(*stream), linear_plans_(stream) {}

  void Embedding(const EmbeddingArgs& args) override { cuda::Embedding(args, stream_); }
  void RmsNorm(const RmsNormArgs& args) override { cuda::RmsNorm(args, stream_); }
  void GatedRmsNorm(const GatedRmsNormArgs& args) override { cuda::GatedRmsNorm(args, stream_); }
  void Linear(const LinearArgs& args) override { cuda::Linear(args, linear_plans_, stream_); }
  void SwiGlu(const SwiGluArgs& args) override { cuda::SwiGlu(args, stream_); }
  void QkNormRope(const QkNormRopeArgs& args) override { cuda::QkNormRope(args, stream_); }
  void Attention(const AttentionArgs& args) override { cuda::Attention(args, stream_); }
  void CausalConv(const CausalConvArgs& args) override { cuda::CausalConv(args, stream_); }
  void DeltaRule(const DeltaRuleArgs& args) override { cuda::DeltaRule(args, stream_); }
  // Nothing grows with the rows: partial results live in the stream's workspace, and plans are made at the first use of a shape.
  void ReserveLinear(int64_t, int64_t) override {}

 private:
  cuda::Stream& stream_;
  cuda::LinearPlans linear_plans_;
};

}  // namespace

std::unique_ptr<Ops> MakeCudaOps(cuda::Stream* stream) { return std::make_unique<CudaOps>(stream); }

}  // namespace bebop
