// SPDX-License-Identifier: Apache-2.0
#include "kernels/common/cuda_stream.h"

namespace bebop::cuda {

Stream::Stream(const StreamOptions& options) : options_(options) {
  int multiprocessors = 0, shared_bytes = 0;
  BEBOP_CUDA_TRY(*this, cudaSetDevice(options.device));
  BEBOP_CUDA_TRY(*this, cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, options.device));
  BEBOP_CUDA_TRY(*this, cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, options.device));
  BEBOP_CUDA_TRY(*this, cudaStreamCreateWithFlags(&handle_, cudaStreamNonBlocking));
  if (options.workspace_bytes > 0) BEBOP_CUDA_TRY(*this, cudaMalloc(&workspace_, static_cast<size_t>(options.workspace_bytes)));
  num_multiprocessors_ = multiprocessors;
  max_shared_bytes_ = shared_bytes;
}

Stream::~Stream() {
  // Errors of tear-down have nobody to go to, and after a sticky error every call fails.
  if (handle_ != nullptr) (void)cudaStreamSynchronize(handle_);
  if (workspace_ != nullptr) (void)cudaFree(workspace_);
  if (handle_ != nullptr) (void)cudaStreamDestroy(handle_);
}

void Stream::Note(cudaError_t result, const char* call, const char* file, int line) {
  if (result == cudaSuccess || !error_.empty()) return;
  error_ = std::string(call) + " at " + file + ":" + std::to_string(line) + ": " + cudaGetErrorString(result);
}

void Stream::Fail(const std::string& words) {
  if (error_.empty()) error_ = words;
}

}  // namespace bebop::cuda
