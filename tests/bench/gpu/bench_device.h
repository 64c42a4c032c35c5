// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/common/dtype.h"
#include "kernels/common/tensor_view.h"

// What the device benchmarks share: memory with random contents, and timing by graph replay.
namespace bebop::bench {

inline void CheckCuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "error: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Device memory filled with random values (never zeros: they run faster than data). The values repeat after 16 MiB.
class DeviceBlock {
 public:
  enum class Fill { kBFloat16, kFloat32, kNone };
  DeviceBlock(int64_t bytes, Fill fill, float scale = 1.0f) : bytes_(bytes) {
    CheckCuda(cudaMalloc(&data_, static_cast<size_t>(std::max<int64_t>(bytes, 256))), "cudaMalloc");
    if (fill == Fill::kNone) {
      CheckCuda(cudaMemset(data_, 0, static_cast<size_t>(bytes)), "cudaMemset");
      return;
    }
    const int64_t chunk = std::min<int64_t>(bytes, 16 << 20);
    std::vector<char> host(static_cast<size_t>(chunk));
    std::mt19937_64 random(7);
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float> table(4096);
    for (float& value : table) value = normal(random);
    const int64_t width = fill == Fill::kFloat32 ? 4 : 2;
    for (int64_t i = 0; i + width <= chunk; i += width) {
      const float value = table[random() % table.size()];
      if (fill == Fill::kFloat32) {
        *reinterpret_cast<float*>(host.data() + i) = value;
      } else {
        *reinterpret_cast<BFloat16*>(host.data() + i) = ToBFloat16(value);
      }
    }
    for (int64_t at = 0; at < bytes; at += chunk) {
      CheckCuda(cudaMemcpy(static_cast<char*>(data_) + at, host.data(), static_cast<size_t>(std::min(chunk, bytes - at)),
                           cudaMemcpyHostToDevice), "cudaMemcpy");
    }
  }
  template <typename T>
  explicit DeviceBlock(const std::vector<T>& values) : DeviceBlock(static_cast<int64_t>(values.size() * sizeof(T)), Fill::kNone) {
    CheckCuda(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  ~DeviceBlock() { (void)cudaFree(data_); }
  DeviceBlock(const DeviceBlock&) = delete;
  DeviceBlock& operator=(const DeviceBlock&) = delete;

  template <typename T>
  T* as() const { return static_cast<T*>(data_); }
  int64_t bytes() const { return bytes_; }
  TensorView Matrix(DType dtype, int64_t rows, int64_t cols) const { return {data_, dtype, rows, cols, cols}; }

 private:
  const int64_t bytes_;
  void* data_ = nullptr;
};

// Seconds of one call: `calls[i]` enqueue the same operator on buffers of their own (together a multiple of the L2 cache, so that every call finds it
// cold); they are captured as one graph, replayed `samples` times, and the median is divided by their number.
inline double SecondsPerCall(cuda::Stream& stream, const std::vector<std::function<void()>>& calls, int samples) {
  for (const auto& call : calls) call();  // plans and attributes are made now
  CheckCuda(cudaStreamSynchronize(stream.handle()), "warm-up");
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CheckCuda(cudaStreamBeginCapture(stream.handle(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  for (const auto& call : calls) call();
  CheckCuda(cudaStreamEndCapture(stream.handle(), &graph), "cudaStreamEndCapture");
  CheckCuda(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  cudaEvent_t begin, end;
  CheckCuda(cudaEventCreate(&begin), "cudaEventCreate");
  CheckCuda(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> times;
  for (int i = 0; i < samples + 3; ++i) {
    CheckCuda(cudaEventRecord(begin, stream.handle()), "cudaEventRecord");
    CheckCuda(cudaGraphLaunch(exec, stream.handle()), "cudaGraphLaunch");
    CheckCuda(cudaEventRecord(end, stream.handle()), "cudaEventRecord");
    CheckCuda(cudaEventSynchronize(end), "cudaEventSynchronize");
    float ms = 0.0f;
    CheckCuda(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    if (i >= 3) times.push_back(ms);
  }
  (void)cudaEventDestroy(begin);
  (void)cudaEventDestroy(end);
  (void)cudaGraphExecDestroy(exec);
  (void)cudaGraphDestroy(graph);
  if (!stream.ok()) {
    std::fprintf(stderr, "error: %s\n", stream.error().c_str());
    std::exit(1);
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2] * 1e-3 / static_cast<double>(calls.size());
}

}  // namespace bebop::bench
