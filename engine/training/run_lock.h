// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "engine/weights/weight_files.h"

namespace bebop {

// Keeps other processes from a name while it lives, by a lock on the file NAME.lock beside it, so that what it guards need not
// exist. The file goes with it; one that a killed process has left holds nobody up. Movable.
class RunLock {
 public:
  // FAILED_PRECONDITION: another process (or another RunLock of this one) has it. PERMISSION_DENIED, NOT_FOUND: the file cannot
  // be made. Messages begin with `path`.
  static absl::StatusOr<RunLock> Acquire(const std::string& path);
  RunLock() = default;
  ~RunLock();
  RunLock(RunLock&& other) noexcept = default;
  RunLock& operator=(RunLock&& other) noexcept;

 private:
  std::string lock_path_;
  Descriptor descriptor_;
};

}  // namespace bebop
