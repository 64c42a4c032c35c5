// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "kernels/attention/attention.h"
#include "kernels/causal_conv/causal_conv.h"
#include "kernels/common/stream.h"
#include "kernels/common/thread_pool.h"
#include "kernels/delta_rule/delta_rule.h"
#include "kernels/embedding/embedding.h"
#include "kernels/linear/linear.h"
#include "kernels/qk_norm_rope/qk_norm_rope.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/swiglu/swiglu.h"

namespace bebop {

// The operators of a forward pass on one backend: the one place where a backend is chosen. The arguments' contracts are those of the kernels'
// headers; on a device a call enqueues and returns. One caller at a time (the engine thread).
class Ops {
 public:
  virtual ~Ops() = default;
  virtual void Embedding(const EmbeddingArgs& args) = 0;
  virtual void RmsNorm(const RmsNormArgs& args) = 0;
  virtual void GatedRmsNorm(const GatedRmsNormArgs& args) = 0;
  virtual void Linear(const LinearArgs& args) = 0;
  virtual void SwiGlu(const SwiGluArgs& args) = 0;
  virtual void QkNormRope(const QkNormRopeArgs& args) = 0;
  virtual void Attention(const AttentionArgs& args) = 0;
  virtual void CausalConv(const CausalConvArgs& args) = 0;
  virtual void DeltaRule(const DeltaRuleArgs& args) = 0;
  // Makes room for products of `rows` rows by `cols` columns, so that later calls allocate nothing.
  virtual void ReserveLinear(int64_t rows, int64_t cols) = 0;
};

// `pool` must outlive it.
std::unique_ptr<Ops> MakeCpuOps(ThreadPool* pool);
// `stream` must outlive it. Only in builds with CUDA (engine/model/cuda_ops.cc, which needs no CUDA header).
std::unique_ptr<Ops> MakeCudaOps(cuda::Stream* stream);

}  // namespace bebop
