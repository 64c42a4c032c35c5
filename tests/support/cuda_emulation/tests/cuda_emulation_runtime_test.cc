// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <thread>
#include <vector>

#include "cuda_emulation_control.h"
#include "device_array.h"
#include "good_kernels.h"

// Streams, events, graphs, memory and errors of the emulated device behave as CUDA's documentation has them.
namespace bebop::emulation_tests {
namespace {

constexpr int kSize = 100;

class Stream {
 public:
  explicit Stream(unsigned flags = cudaStreamNonBlocking) { EXPECT_EQ(cudaStreamCreateWithFlags(&handle_, flags), cudaSuccess); }
  ~Stream() { EXPECT_EQ(cudaStreamDestroy(handle_), cudaSuccess); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return handle_; }

 private:
  cudaStream_t handle_ = nullptr;
};

class Event {
 public:
  Event() { EXPECT_EQ(cudaEventCreate(&handle_), cudaSuccess); }
  ~Event() { EXPECT_EQ(cudaEventDestroy(handle_), cudaSuccess); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return handle_; }

 private:
  cudaEvent_t handle_ = nullptr;
};

// Keeps the device busy until released, so that everything enqueued meanwhile waits. REQUIRES: the device is idle.
class Busy {
 public:
  Busy() {
    EXPECT_EQ(cudaMallocHost(reinterpret_cast<void**>(&words_), 2 * sizeof(int)), cudaSuccess);
    volatile int* const words = words_;
    words[0] = 0;
    words[1] = 0;
    const int64_t launches = emulation::GetCounters().launches;
    EXPECT_EQ(AnswerHost(words, words + 1, stream_.get()), cudaSuccess);
    while (emulation::GetCounters().launches == launches) std::this_thread::yield();
  }
  void Release() {
    volatile int* const words = words_;
    words[0] = 1;
  }
  ~Busy() {
    Release();
    EXPECT_EQ(cudaFreeHost(words_), cudaSuccess);
  }
  Busy(const Busy&) = delete;
  Busy& operator=(const Busy&) = delete;

 private:
  Stream stream_;
  int* words_ = nullptr;
};

std::vector<float> All(float value) { return std::vector<float>(kSize, value); }

// ---- Streams and events ----

TEST(Streams, KeepTheirOrder) {
  const Stream stream;
  const DeviceArray<float> data(kSize);
  for (int i = 0; i < 20; ++i) {
    ASSERT_EQ(Fill(data.data(), kSize, 1.0f, stream.get()), cudaSuccess);
    for (int j = 0; j < 5; ++j) ASSERT_EQ(Scale(data.data(), kSize, 2.0f, 1.0f, stream.get()), cudaSuccess);
  }
  ASSERT_EQ(cudaStreamSynchronize(stream.get()), cudaSuccess);
  EXPECT_EQ(data.Read(), All(63.0f));
}

// How often one stream's use of another's result saw that result, of 40 times.
int TimesInOrder(bool wait) {
  const Stream first, second;
  const Event event;
  int in_order = 0;
  for (int i = 0; i < 40; ++i) {
    const DeviceArray<float> data(All(0.0f));
    Busy busy;
    EXPECT_EQ(Fill(data.data(), kSize, 10.0f, first.get()), cudaSuccess);
    if (wait) {
      EXPECT_EQ(cudaEventRecord(event.get(), first.get()), cudaSuccess);
      EXPECT_EQ(cudaStreamWaitEvent(second.get(), event.get(), 0), cudaSuccess);
    }
    EXPECT_EQ(Scale(data.data(), kSize, 1.0f, 1.0f, second.get()), cudaSuccess);
    busy.Release();
    in_order += data.Read() == All(11.0f);
  }
  return in_order;
}

TEST(Streams, AMissingWaitShows) {
  EXPECT_EQ(TimesInOrder(true), 40);
  const int by_luck = TimesInOrder(false);
  EXPECT_GT(by_luck, 0);
  EXPECT_LT(by_luck, 40);
}

TEST(Streams, LegacyStreamWaitsForBlockingStreamsAlone) {
  const Stream blocking(cudaStreamDefault);
  for (int i = 0; i < 20; ++i) {
    const DeviceArray<float> data(All(0.0f));
    Busy busy;
    ASSERT_EQ(Fill(data.data(), kSize, 10.0f, blocking.get()), cudaSuccess);
    ASSERT_EQ(Scale(data.data(), kSize, 1.0f, 1.0f, nullptr), cudaSuccess);
    ASSERT_EQ(Scale(data.data(), kSize, 2.0f, 0.0f, blocking.get()), cudaSuccess);
    busy.Release();
    EXPECT_EQ(data.Read(), All(22.0f));
  }
}

TEST(Streams, QueriesDoNotWait) {
  const Stream stream;
  const Event event;
  EXPECT_EQ(cudaEventQuery(event.get()), cudaSuccess);  // never recorded
  Busy busy;
  ASSERT_EQ(Nothing(1, 32, 0, stream.get()), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(event.get(), stream.get()), cudaSuccess);
  EXPECT_EQ(cudaStreamQuery(stream.get()), cudaErrorNotReady);
  EXPECT_EQ(cudaEventQuery(event.get()), cudaErrorNotReady);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  busy.Release();
  EXPECT_EQ(cudaEventSynchronize(event.get()), cudaSuccess);
  EXPECT_EQ(cudaEventQuery(event.get()), cudaSuccess);
  EXPECT_EQ(cudaStreamQuery(stream.get()), cudaSuccess);
}

TEST(Streams, EventsMeasureTime) {
  const Stream stream;
  const Event start, end;
  float milliseconds = -1.0f;
  EXPECT_EQ(cudaEventElapsedTime(&milliseconds, start.get(), end.get()), cudaErrorInvalidResourceHandle);
  ASSERT_EQ(cudaEventRecord(start.get(), stream.get()), cudaSuccess);
  ASSERT_EQ(cudaLaunchHostFunc(
                stream.get(), [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(3)); }, nullptr),
            cudaSuccess);
  ASSERT_EQ(cudaEventRecord(end.get(), stream.get()), cudaSuccess);
  ASSERT_EQ(cudaEventSynchronize(end.get()), cudaSuccess);
  ASSERT_EQ(cudaEventElapsedTime(&milliseconds, start.get(), end.get()), cudaSuccess);
  EXPECT_GE(milliseconds, 3.0f);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidResourceHandle);
}

// ---- Copies ----

TEST(Copies, PageableSourcesAreReadAtOnceAndPinnedOnesLate) {
  const Stream stream;
  const DeviceArray<float> data(kSize);
  std::vector<float> pageable = All(1.0f);
  float* pinned = nullptr;
  ASSERT_EQ(cudaMallocHost(reinterpret_cast<void**>(&pinned), kSize * sizeof(float)), cudaSuccess);
  std::fill_n(pinned, kSize, 1.0f);
  {
    Busy busy;
    ASSERT_EQ(cudaMemcpyAsync(data.data(), pageable.data(), kSize * sizeof(float), cudaMemcpyHostToDevice, stream.get()),
              cudaSuccess);
    pageable = All(2.0f);
  }
  EXPECT_EQ(data.Read(), All(1.0f));
  {
    Busy busy;
    ASSERT_EQ(cudaMemcpyAsync(data.data(), pinned, kSize * sizeof(float), cudaMemcpyHostToDevice, stream.get()), cudaSuccess);
    std::fill_n(pinned, kSize, 3.0f);  // a mistake, which must show
  }
  EXPECT_EQ(data.Read(), All(3.0f));
  EXPECT_EQ(cudaFreeHost(pinned), cudaSuccess);
}

TEST(Copies, RowsWithPitches) {
  std::vector<float> values(60);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  const DeviceArray<float> data(std::vector<float>(40, -1.0f));
  ASSERT_EQ(cudaMemcpy2D(data.data(), 8 * sizeof(float), values.data(), 12 * sizeof(float), 5 * sizeof(float), 5,
                         cudaMemcpyHostToDevice),
            cudaSuccess);
  const std::vector<float> read = data.Read();
  for (size_t row = 0; row < 5; ++row) {
    for (size_t col = 0; col < 8; ++col) EXPECT_EQ(read[row * 8 + col], col < 5 ? static_cast<float>(row * 12 + col) : -1.0f);
  }
}

TEST(Copies, WrongRangesAndKindsAreRefused) {
  const DeviceArray<float> data(kSize);
  std::vector<float> host(kSize + 1);
  EXPECT_EQ(cudaMemcpy(data.data(), host.data(), (kSize + 1) * sizeof(float), cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(data.data(), host.data(), sizeof(float), cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(host.data(), data.data() + kSize, sizeof(float), cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemset(data.data(), 0, (kSize + 1) * sizeof(float)), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemset(host.data(), 0, 4), cudaErrorInvalidValue);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidValue);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

// ---- Memory ----

TEST(Memory, IsFreshlyNaNAndLimited) {
  const DeviceArray<float> data(kSize);
  for (const float value : data.Read()) EXPECT_TRUE(std::isnan(value));
  size_t free_before = 0, total = 0, free_bytes = 0;
  ASSERT_EQ(cudaMemGetInfo(&free_before, &total), cudaSuccess);
  emulation::SetDeviceMemoryBytes(total - free_before + 5000);
  void* first = nullptr;
  void* second = nullptr;
  EXPECT_EQ(cudaMalloc(&first, 4000), cudaSuccess);
  EXPECT_EQ(cudaMalloc(&second, 1001), cudaErrorMemoryAllocation);
  EXPECT_EQ(second, nullptr);
  EXPECT_EQ(cudaGetLastError(), cudaErrorMemoryAllocation);
  ASSERT_EQ(cudaMemGetInfo(&free_bytes, &total), cudaSuccess);
  EXPECT_EQ(free_bytes, 1000u);
  EXPECT_EQ(cudaFree(first), cudaSuccess);
  EXPECT_EQ(cudaFree(first), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMalloc(&second, 5000), cudaSuccess);
  EXPECT_EQ(cudaFree(second), cudaSuccess);
  emulation::SetDeviceMemoryBytes(size_t{16} << 30);
  (void)cudaGetLastError();
}

TEST(Memory, FreeingWaitsForTheDevice) {
  const Stream stream;
  float* data = nullptr;
  ASSERT_EQ(cudaMalloc(reinterpret_cast<void**>(&data), kSize * sizeof(float)), cudaSuccess);
  for (int i = 0; i < 50; ++i) ASSERT_EQ(Fill(data, kSize, 1.0f, stream.get()), cudaSuccess);
  EXPECT_EQ(cudaFree(data), cudaSuccess);  // the launches still find their memory
  EXPECT_EQ(cudaStreamQuery(stream.get()), cudaSuccess);
}

// ---- Launches ----

TEST(Launches, LimitsOfTheDevice) {
  EXPECT_EQ(Nothing(1, 1024, 0, nullptr), cudaSuccess);
  EXPECT_EQ(Nothing(1, 1025, 0, nullptr), cudaErrorInvalidConfiguration);
  EXPECT_EQ(Nothing(1, dim3(32, 33), 0, nullptr), cudaErrorInvalidConfiguration);
  EXPECT_EQ(Nothing(1, dim3(1, 1, 65), 0, nullptr), cudaErrorInvalidConfiguration);
  EXPECT_EQ(Nothing(0, 32, 0, nullptr), cudaErrorInvalidConfiguration);
  EXPECT_EQ(Nothing(dim3(1, 65536), 32, 0, nullptr), cudaErrorInvalidConfiguration);
  EXPECT_EQ(Nothing(1, 32, 227 * 1024, nullptr), cudaSuccess);
  EXPECT_EQ(Nothing(1, 32, 227 * 1024 + 1, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(NothingOptIn(228 * 1024), cudaErrorInvalidValue);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  (void)cudaGetLastError();
}

TEST(Launches, AttributesOfTheDevice) {
  int value = 0;
  EXPECT_EQ(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), cudaSuccess);
  EXPECT_EQ(value, 227 * 1024);
  EXPECT_EQ(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0), cudaSuccess);
  EXPECT_GT(value, 0);
  EXPECT_EQ(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 1), cudaErrorInvalidDevice);
  EXPECT_EQ(cudaSetDevice(1), cudaErrorInvalidDevice);
  (void)cudaGetLastError();
}

// ---- Graphs ----

TEST(Graphs, ReplayWhatWasCaptured) {
  const Stream stream;
  const DeviceArray<float> data(All(0.0f));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  ASSERT_EQ(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal), cudaSuccess);
  float summand = 3.0f;
  ASSERT_EQ(Scale(data.data(), kSize, 2.0f, summand, stream.get()), cudaSuccess);
  summand = 100.0f;
  cudaStreamCaptureStatus status;
  ASSERT_EQ(cudaStreamIsCapturing(stream.get(), &status), cudaSuccess);
  EXPECT_EQ(status, cudaStreamCaptureStatusActive);
  ASSERT_EQ(cudaStreamEndCapture(stream.get(), &graph), cudaSuccess);
  size_t num_nodes = 0;
  ASSERT_EQ(cudaGraphGetNodes(graph, nullptr, &num_nodes), cudaSuccess);
  EXPECT_EQ(num_nodes, 1u);
  ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
  ASSERT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  EXPECT_EQ(data.Read(), All(0.0f));  // captured, not run
  const int64_t launches = emulation::GetCounters().launches;
  for (int i = 0; i < 3; ++i) ASSERT_EQ(cudaGraphLaunch(exec, stream.get()), cudaSuccess);
  ASSERT_EQ(cudaGraphExecDestroy(exec), cudaSuccess);
  EXPECT_EQ(data.Read(), All(21.0f));
  EXPECT_EQ(emulation::GetCounters().launches - launches, 3);
}

TEST(Graphs, ForkAndJoinThroughEvents) {
  for (int i = 0; i < 20; ++i) {
    const Stream stream, side;
    const Event fork, join;
    const DeviceArray<float> data(All(1.0f)), other(All(1.0f));
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    ASSERT_EQ(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal), cudaSuccess);
    ASSERT_EQ(Fill(data.data(), kSize, 5.0f, stream.get()), cudaSuccess);
    ASSERT_EQ(cudaEventRecord(fork.get(), stream.get()), cudaSuccess);
    ASSERT_EQ(cudaStreamWaitEvent(side.get(), fork.get(), 0), cudaSuccess);
    ASSERT_EQ(cudaMemcpyAsync(other.data(), data.data(), kSize * sizeof(float), cudaMemcpyDeviceToDevice, side.get()),
              cudaSuccess);
    ASSERT_EQ(Scale(other.data(), kSize, 2.0f, 0.0f, side.get()), cudaSuccess);
    ASSERT_EQ(cudaEventRecord(join.get(), side.get()), cudaSuccess);
    ASSERT_EQ(cudaStreamWaitEvent(stream.get(), join.get(), 0), cudaSuccess);
    ASSERT_EQ(Scale(other.data(), kSize, 1.0f, 1.0f, stream.get()), cudaSuccess);
    ASSERT_EQ(cudaStreamEndCapture(stream.get(), &graph), cudaSuccess);
    ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    ASSERT_EQ(cudaGraphLaunch(exec, stream.get()), cudaSuccess);
    EXPECT_EQ(other.Read(), All(11.0f));
    EXPECT_EQ(cudaGraphExecDestroy(exec), cudaSuccess);
    EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  }
}

// What a capture does not allow gives its error, and spoils the capture.
TEST(Graphs, ForbiddenCallsSpoilTheCapture) {
  const Stream stream, side;
  const Event event;
  const DeviceArray<float> data(kSize);
  std::vector<float> pageable(kSize);
  void* memory = nullptr;
  const auto spoiled_by = [&](auto&& call, cudaError_t expected) {
    ASSERT_EQ(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal), cudaSuccess);
    ASSERT_EQ(Nothing(1, 32, 0, stream.get()), cudaSuccess);
    EXPECT_EQ(call(), expected);
    cudaGraph_t graph = nullptr;
    EXPECT_EQ(cudaStreamEndCapture(stream.get(), &graph), cudaErrorStreamCaptureInvalidated);
    EXPECT_EQ(graph, nullptr);
  };
  spoiled_by([&] { return cudaStreamSynchronize(stream.get()); }, cudaErrorStreamCaptureUnsupported);
  spoiled_by([&] { return cudaStreamQuery(stream.get()); }, cudaErrorStreamCaptureUnsupported);
  spoiled_by([&] { return cudaDeviceSynchronize(); }, cudaErrorStreamCaptureUnsupported);
  spoiled_by([&] { return cudaMalloc(&memory, 100); }, cudaErrorStreamCaptureUnsupported);
  spoiled_by([&] { return cudaMemcpyAsync(data.data(), pageable.data(), 4, cudaMemcpyHostToDevice, stream.get()); },
             cudaErrorStreamCaptureUnsupported);
  ASSERT_EQ(cudaEventRecord(event.get(), side.get()), cudaSuccess);
  spoiled_by([&] { return cudaStreamWaitEvent(stream.get(), event.get(), 0); }, cudaErrorStreamCaptureIsolation);

  ASSERT_EQ(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(event.get(), stream.get()), cudaSuccess);
  ASSERT_EQ(cudaStreamWaitEvent(side.get(), event.get(), 0), cudaSuccess);
  ASSERT_EQ(Nothing(1, 32, 0, side.get()), cudaSuccess);
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaStreamEndCapture(stream.get(), &graph), cudaErrorStreamCaptureUnjoined);
  EXPECT_EQ(cudaStreamEndCapture(stream.get(), &graph), cudaErrorIllegalState);
  (void)cudaGetLastError();
}

TEST(Graphs, OtherThreadsMayAllocateInAThreadsOwnCapture) {
  const Stream stream;
  for (const cudaStreamCaptureMode mode : {cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeGlobal}) {
    ASSERT_EQ(cudaStreamBeginCapture(stream.get(), mode), cudaSuccess);
    cudaError_t error = cudaSuccess;
    void* memory = nullptr;
    std::thread other([&] { error = cudaMalloc(&memory, 100); });
    other.join();
    cudaGraph_t graph = nullptr;
    const bool allowed = mode == cudaStreamCaptureModeThreadLocal;
    EXPECT_EQ(error, allowed ? cudaSuccess : cudaErrorStreamCaptureUnsupported);
    EXPECT_EQ(cudaStreamEndCapture(stream.get(), &graph), allowed ? cudaSuccess : cudaErrorStreamCaptureInvalidated);
    EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
    EXPECT_EQ(cudaFree(memory), cudaSuccess);
  }
  (void)cudaGetLastError();
}

// ---- The test's own controls ----

TEST(Control, CountersTellASteadyStep) {
  const Stream stream;
  const Event event;
  const DeviceArray<float> data(kSize);
  float* pinned = nullptr;
  ASSERT_EQ(cudaMallocHost(reinterpret_cast<void**>(&pinned), sizeof(float)), cudaSuccess);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  emulation::Counters before = emulation::GetCounters();
  ASSERT_EQ(Fill(data.data(), kSize, 1.0f, stream.get()), cudaSuccess);
  ASSERT_EQ(cudaMemcpyAsync(pinned, data.data(), sizeof(float), cudaMemcpyDeviceToHost, stream.get()), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(event.get(), stream.get()), cudaSuccess);
  while (cudaEventQuery(event.get()) != cudaSuccess) std::this_thread::yield();
  emulation::Counters after = emulation::GetCounters();
  EXPECT_EQ(after.launches - before.launches, 1);
  EXPECT_EQ(after.operations - before.operations, 3);
  EXPECT_EQ(after.allocations, before.allocations);
  EXPECT_EQ(after.synchronizations, before.synchronizations);

  const auto synchronizations_of = [&](auto&& call) {
    const int64_t count = emulation::GetCounters().synchronizations;
    EXPECT_EQ(call(), cudaSuccess);
    return emulation::GetCounters().synchronizations - count;
  };
  EXPECT_EQ(synchronizations_of([&] { return cudaStreamSynchronize(stream.get()); }), 1);
  EXPECT_EQ(synchronizations_of([&] { return cudaEventSynchronize(event.get()); }), 1);
  EXPECT_EQ(synchronizations_of([&] { return cudaMemcpy(pinned, data.data(), 4, cudaMemcpyDeviceToHost); }), 1);
  std::vector<float> pageable(1);
  EXPECT_EQ(
      synchronizations_of([&] { return cudaMemcpyAsync(pageable.data(), data.data(), 4, cudaMemcpyDeviceToHost, stream.get()); }),
      1);
  EXPECT_EQ(synchronizations_of([&] { return cudaFreeHost(pinned); }), 1);
  EXPECT_EQ(emulation::GetCounters().allocations, before.allocations);
}

TEST(Control, StickyErrorsStick) {
  const Stream stream;
  const DeviceArray<float> data(All(1.0f));
  std::vector<float> host(kSize);
  emulation::InjectStickyError(cudaErrorIllegalAddress);
  EXPECT_EQ(Fill(data.data(), kSize, 1.0f, stream.get()), cudaErrorIllegalAddress);
  EXPECT_EQ(cudaStreamSynchronize(stream.get()), cudaErrorIllegalAddress);
  EXPECT_EQ(cudaMemcpy(host.data(), data.data(), 4, cudaMemcpyDeviceToHost), cudaErrorIllegalAddress);
  void* memory = nullptr;
  EXPECT_EQ(cudaMalloc(&memory, 4), cudaErrorIllegalAddress);
  EXPECT_EQ(cudaGetLastError(), cudaErrorIllegalAddress);
  EXPECT_EQ(cudaGetLastError(), cudaErrorIllegalAddress);
  EXPECT_STREQ(cudaGetErrorString(cudaErrorIllegalAddress), "an illegal memory access was encountered");
  emulation::InjectStickyError(cudaSuccess);

  // In the middle of a queue: what was before has run, what is behind is dropped, and waiting tells.
  emulation::InjectStickyErrorAfter(2, cudaErrorLaunchFailure);
  {
    Busy busy;  // the first operation
    ASSERT_EQ(Fill(data.data(), kSize, 5.0f, stream.get()), cudaSuccess);
    ASSERT_EQ(Fill(data.data(), kSize, 6.0f, stream.get()), cudaSuccess);
    busy.Release();
    EXPECT_EQ(cudaStreamSynchronize(stream.get()), cudaErrorLaunchFailure);
    emulation::InjectStickyError(cudaSuccess);
  }
  EXPECT_EQ(data.Read(), All(5.0f));
  (void)cudaGetLastError();
}

TEST(Control, AMachineWithoutDevice) {
  emulation::SetDeviceCount(0);
  int count = -1;
  EXPECT_EQ(cudaGetDeviceCount(&count), cudaErrorNoDevice);
  EXPECT_EQ(count, 0);
  cudaStream_t stream = nullptr;
  EXPECT_EQ(cudaSetDevice(0), cudaErrorNoDevice);
  EXPECT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaErrorNoDevice);
  emulation::SetDeviceCount(1);
  EXPECT_EQ(cudaGetDeviceCount(&count), cudaSuccess);
  EXPECT_EQ(count, 1);
  (void)cudaGetLastError();
}

}  // namespace
}  // namespace bebop::emulation_tests
