// SPDX-License-Identifier: Apache-2.0
#include "kernels/embedding/embedding.h"

#include "kernels/common/check.h"

namespace bebop::cpu {

void Embedding(const EmbeddingArgs& args, ThreadPool& pool) {
  BEBOP_CHECK(args.out.cols == args.table.cols && args.out.dtype == DType::kFloat32);
  // Unpacking a row gathers from every cache line of its panel: a few rows are worth a thread.
  pool.ParallelFor(args.out.rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = args.token_ids[row];
      BEBOP_DCHECK(token < args.table.rows);
      UnpackRow(args.table, token, args.out.Row<float>(row));
    }
  });
}

}  // namespace bebop::cpu
