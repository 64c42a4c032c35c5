// SPDX-License-Identifier: Apache-2.0
// The choice of operators in a build without CUDA.
#include "engine/training/training_ops.h"

namespace bebop {

absl::StatusOr<std::unique_ptr<TrainingOps>> MakeTrainingOps(Backend*, ThreadPool* pool) { return MakeCpuTrainingOps(pool); }

}  // namespace bebop
