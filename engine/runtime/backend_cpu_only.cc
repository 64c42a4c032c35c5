// SPDX-License-Identifier: Apache-2.0
// The backends of a build without CUDA.
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/runtime/backend.h"

namespace bebop {

absl::Status CheckDeviceName(const std::string& device) {
  if (device == "cpu") return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("device: ", device, " is not in this build; it has: cpu"));
}

absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const EngineOptions& options, ThreadPool* pool) {
  BEBOP_RETURN_IF_ERROR(CheckDeviceName(options.device));
  return MakeCpuBackend(pool);
}

}  // namespace bebop
