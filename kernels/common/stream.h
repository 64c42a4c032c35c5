// SPDX-License-Identifier: Apache-2.0
#pragma once

// For headers that name the device's stream without seeing CUDA: `cuda::Op(args, stream)`. Defined in kernels/common/cuda_stream.h.
namespace bebop::cuda {
class Stream;
}  // namespace bebop::cuda
