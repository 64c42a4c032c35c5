// SPDX-License-Identifier: Apache-2.0
#include "kernels/rms_norm/rms_norm.h"

#include <cmath>

#include "kernels/common/check.h"

namespace bebop::cpu {

void RmsNorm(const RmsNormArgs& args, ThreadPool& pool) {
  const int64_t width = args.x.cols;
  BEBOP_CHECK(args.out.rows == args.x.rows && args.out.cols == width);
  pool.ParallelFor(args.x.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* x = args.x.Row<float>(row);
      if (args.residual.data != nullptr) {
        const float* residual = args.residual.Row<float>(row);
        for (int64_t i = 0; i < width; ++i) x[i] += residual[i];
      }
      double sum = 0.0;
      for (int64_t i = 0; i < width; ++i) sum += static_cast<double>(x[i]) * x[i];
      const float scale = static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(width) + args.eps));
      float* out = args.out.Row<float>(row);
      for (int64_t i = 0; i < width; ++i) out[i] = x[i] * scale * (1.0f + args.weight[i]);
    }
  });
}

void GatedRmsNorm(const GatedRmsNormArgs& args, ThreadPool& pool) {
  const int64_t dim = args.head_dim;
  const int64_t num_heads = args.x.cols / dim;
  BEBOP_CHECK(num_heads * dim == args.x.cols && args.gate.cols == args.x.cols && args.out.cols == args.x.cols);
  pool.ParallelFor(args.x.rows * num_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / num_heads, offset = item % num_heads * dim;
      const float* x = args.x.Row<float>(row) + offset;
      const float* gate = args.gate.Row<float>(row) + offset;
      float* out = args.out.Row<float>(row) + offset;
      double sum = 0.0;
      for (int64_t i = 0; i < dim; ++i) sum += static_cast<double>(x[i]) * x[i];
      const float scale = static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(dim) + args.eps));
      for (int64_t i = 0; i < dim; ++i) out[i] = x[i] * scale * args.weight[i] * (gate[i] / (1.0f + std::exp(-gate[i])));
    }
  });
}

}  // namespace bebop::cpu
