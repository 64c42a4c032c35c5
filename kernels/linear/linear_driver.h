// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/common/cpu_features.h"
#include "kernels/common/thread_pool.h"
#include "kernels/linear/linear.h"

namespace bebop::cpu {

// Inside kernels/linear: y = x Wᵀ, or y += x Wᵀ with `accumulate`, where each sum goes on from what y holds.
void RunLinear(InstructionSet set, const LinearArgs& args, bool accumulate, LinearScratch& scratch, ThreadPool& pool);

}  // namespace bebop::cpu
