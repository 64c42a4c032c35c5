// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/weights/weight_update.h"

namespace bebop {

// A file descriptor that is closed with its owner.
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int value) : value_(value) {}
  ~Descriptor();
  Descriptor(Descriptor&& other) noexcept : value_(std::exchange(other.value_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(value_, other.value_);
    return *this;
  }
  int value() const { return value_; }
  bool valid() const { return value_ >= 0; }

 private:
  int value_ = -1;
};

// The folder beneath which a client may name files (`--weights-root`). No path leads out of it, whatever links and renames others
// make meanwhile: the kernel resolves it beneath the folder's descriptor (openat2). On kernels without that call it is walked
// part by part, and then every symbolic link is refused. Immutable; safe to use from any thread.
class WeightRoot {
 public:
  enum class Resolver {
    kKernel,  // openat2; kWalk where the kernel has none
    kWalk,
  };
  // NOT_FOUND, PERMISSION_DENIED, FAILED_PRECONDITION (no folder).
  static absl::StatusOr<WeightRoot> Open(const std::string& path, Resolver resolver = Resolver::kKernel);

  // Opens a file or folder for reading. PERMISSION_DENIED [OUTSIDE_ROOT]: the path is absolute, has a `..`, or a link leads out;
  // INVALID_ARGUMENT: empty, or with a zero byte; otherwise as the system's error says. Messages begin with `path`, as given.
  absl::StatusOr<Descriptor> OpenBeneath(const std::string& path) const;

 private:
  Descriptor folder_;
  Resolver resolver_ = Resolver::kKernel;
};

// Feeds an open update from `path` beneath `root`: a safetensors file, or a checkpoint's folder (model.safetensors, or the shards
// that model.safetensors.index.json names). Names may be spelled as loading takes them, and types may differ from the tensors'
// forms where loading the file would give the same forms; model.visual.*, components that the update does not bring, and a copy
// of tied embeddings under lm_head.weight are skipped. All headers are checked before the first value is used. Files are read,
// not mapped: one that somebody cuts short meanwhile is an error here, not the end of the process.
//
// Errors begin with the file and are those of WriteChunk, or: NOT_FOUND, PERMISSION_DENIED, DATA_LOSS (a file ends early),
// INVALID_ARGUMENT (not in the format; [UNKNOWN_TENSOR], [DUPLICATE_TENSOR], [WRONG_DTYPE], [WRONG_SHAPE]). Tensors that were
// read before an error stay in the update.
//
// `between`, if any, is called after every few MiB: reading stops with its status unless that is OK, and it may let others use the
// update meanwhile.
absl::Status ReadWeights(const WeightRoot& root, const std::string& path, WeightUpdate& update,
                         const std::function<absl::Status()>& between = nullptr);

}  // namespace bebop
