// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>

#include "kernels/common/stream.h"

// BEBOP_CUDA_TRY(stream, call): runs a CUDA runtime call unless the stream has failed before; remembers the first failure with its place.
// Every CUDA call of the engine goes through it (or through Stream's own members). It never aborts: the executor asks `stream.ok()` after
// a step, fails what is in flight and ends the process (a device error is sticky; nothing can be had from this process's context again).
#define BEBOP_CUDA_TRY(stream, call)                                                     \
  do {                                                                                   \
    if ((stream).ok()) (stream).Note((call), #call, __FILE__, __LINE__);                 \
  } while (false)

namespace bebop::cuda {

struct StreamOptions {
  int device = 0;
  bool batch_invariant = false;         // kernels choose tiles and splits that do not depend on the batch (model.md section 5)
  int64_t workspace_bytes = 256 << 20;  // partial results of split operators
};

// One in-order queue of device work with what its launches share: device properties, a workspace, and the first error. All operators of an
// engine run on one stream, so that they may all use the same workspace. Owned by the executor's thread (the engine thread).
class Stream {
 public:
  // On failure the stream is not ok() and says why; nothing else may be called on it then.
  explicit Stream(const StreamOptions& options);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  cudaStream_t handle() const { return handle_; }
  int device() const { return options_.device; }
  bool batch_invariant() const { return options_.batch_invariant; }
  int num_multiprocessors() const { return num_multiprocessors_; }
  int64_t max_shared_bytes() const { return max_shared_bytes_; }  // a block's opt-in limit
  // Device memory for the operator that is being enqueued; the next one may overwrite it. REQUIRES: bytes <= workspace_bytes().
  void* workspace() const { return workspace_; }
  int64_t workspace_bytes() const { return options_.workspace_bytes; }

  bool ok() const { return error_.empty(); }
  const std::string& error() const { return error_; }  // "<call> at <file>:<line>: <CUDA's words>"
  void Note(cudaError_t result, const char* call, const char* file, int line);
  // The same for a library that has its own codes (cuBLASLt): `words` say what went wrong.
  void Fail(const std::string& words);

 private:
  const StreamOptions options_;
  cudaStream_t handle_ = nullptr;
  void* workspace_ = nullptr;
  int num_multiprocessors_ = 0;
  int64_t max_shared_bytes_ = 0;
  std::string error_;
};

}  // namespace bebop::cuda
