// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

// Work on streams, for the parts of the emulator that enqueue it (cuda* calls and matrix products).
namespace bebop::emulation {

// Enqueues `work` on the stream, or adds it to the graph that the stream captures. It runs on the device's thread.
cudaError_t EnqueueWork(cudaStream_t stream, std::function<void()> work);

}  // namespace bebop::emulation
