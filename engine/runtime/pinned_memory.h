// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "kernels/common/cuda_stream.h"

namespace bebop {

// Host memory that a device can reach: copies from it are asynchronous, and kernels may write to it. Under unified addressing,
// which every 64-bit system has, the address is the same on both sides. Freed with the last reference, which must not be dropped
// while the device may still use it.
// Zeroed. RESOURCE_EXHAUSTED names `what` and the bytes; INTERNAL is a device error.
absl::StatusOr<std::shared_ptr<char>> AllocatePinned(int64_t bytes, const char* what, cuda::Stream* stream);

}  // namespace bebop
