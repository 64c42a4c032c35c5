// SPDX-License-Identifier: Apache-2.0
#include "runtime.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "block.h"
#include "cuda_emulation_control.h"
#include "cuda_emulation_device.h"
#include "memory.h"
#include "violation.h"

// The CUDA runtime's calls. What is enqueued on streams becomes a graph of operations: each depends on the one before it on its
// stream and on events waited for. One thread of the emulator, the device, runs ready operations in a random order, so that an
// ordering which no event or stream gives is not there. Nothing waits for the host to ask.

namespace bebop::emulation {
namespace {

using Work = std::shared_ptr<const std::function<void()>>;  // null: does nothing

struct Operation {
  Work work;
  std::vector<std::shared_ptr<Operation>> successors;
  int num_predecessors = 0;  // that are not done
  bool done = false;
};
using OperationPtr = std::shared_ptr<Operation>;

struct Node {
  Work work;
  std::vector<int> predecessors;
};

}  // namespace
}  // namespace bebop::emulation

using bebop::emulation::Node;
using bebop::emulation::OperationPtr;
using bebop::emulation::Work;

struct CUgraph_st {
  std::vector<Node> nodes;
};
struct CUgraphExec_st {
  std::vector<Node> nodes;
};

namespace bebop::emulation {
namespace {

struct Capture {
  std::unique_ptr<CUgraph_st> graph = std::make_unique<CUgraph_st>();
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::thread::id thread;
  CUstream_st* origin = nullptr;
  std::vector<CUstream_st*> streams;  // that take part
  bool invalid = false;
};

}  // namespace
}  // namespace bebop::emulation

using bebop::emulation::Capture;

struct CUstream_st {
  bool blocking = true;             // ordered with the legacy default stream
  OperationPtr tail;                // the last operation; null when there was none
  std::vector<OperationPtr> waits;  // for the next operation, beside `tail`
  std::shared_ptr<Capture> capture;
  std::vector<int> capture_tail;  // nodes that the next one depends on
};

struct CUevent_st {
  bool timing = true;
  OperationPtr operation;  // null: never recorded
  std::shared_ptr<std::chrono::steady_clock::time_point> time;
  std::shared_ptr<Capture> capture;  // recorded in a capture
  std::vector<int> capture_tail;
};

namespace bebop::emulation {
namespace {

struct Device {
  std::mutex mutex;  // of everything here but `counters`
  std::condition_variable work_arrived, work_done;
  std::thread thread;
  bool started = false, stopping = false, busy = false;
  int num_waiting = 0;  // host threads
  std::vector<OperationPtr> ready;
  std::vector<CUstream_st*> streams;
  std::vector<std::shared_ptr<Capture>> captures;
  CUstream_st legacy;
  uint64_t random = 1;
  std::map<const void*, int> opted_in;  // dynamic shared bytes of kernels
  cudaError_t sticky = cudaSuccess;
  int64_t operations_until_error = -1;
  cudaError_t error_to_come = cudaSuccess;
  int device_count = 1;
};

// Never destroyed: the device's thread may outlive static objects otherwise.
Device& device = *new Device;
thread_local cudaError_t last_error = cudaSuccess;

struct {
  std::atomic<int64_t> launches, graph_launches, operations, allocations, frees, synchronizations;
} counters;

cudaError_t Return(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// What every call begins with.
cudaError_t Health() {
  if (device.sticky != cudaSuccess) return device.sticky;
  return device.device_count == 0 ? cudaErrorNoDevice : cudaSuccess;
}

uint64_t NextRandom() {
  device.random += 0x9e3779b97f4a7c15u;
  uint64_t x = device.random;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

void FinishOperation(Operation& operation) {
  operation.done = true;
  for (OperationPtr& successor : operation.successors) {
    if (--successor->num_predecessors == 0) device.ready.push_back(std::move(successor));
  }
  operation.successors.clear();
}

void DeviceMain() {
  std::unique_lock lock(device.mutex);
  while (true) {
    device.work_arrived.wait(lock, [] { return device.stopping || !device.ready.empty(); });
    if (device.stopping) return;
    // Now and then a slow device, so that the host gets ahead of it and has more than one operation to choose from.
    if (device.num_waiting == 0 && NextRandom() % 16 == 0) {
      device.work_arrived.wait_for(lock, std::chrono::microseconds(NextRandom() % 100),
                                   [] { return device.stopping || device.num_waiting > 0; });
      if (device.stopping) return;
    }
    const size_t index = NextRandom() % device.ready.size();
    std::swap(device.ready[index], device.ready.back());
    const OperationPtr operation = std::move(device.ready.back());
    device.ready.pop_back();
    if (operation->work != nullptr && device.sticky == cudaSuccess) {
      device.busy = true;
      lock.unlock();
      (*operation->work)();
      counters.operations.fetch_add(1);
      lock.lock();
      device.busy = false;
      if (device.operations_until_error > 0 && --device.operations_until_error == 0) device.sticky = device.error_to_come;
    }
    operation->work = nullptr;
    FinishOperation(*operation);
    device.work_done.notify_all();
  }
}

void StopDevice() {
  {
    std::lock_guard lock(device.mutex);
    device.stopping = true;
  }
  device.work_arrived.notify_all();
  if (device.thread.joinable()) device.thread.join();
}

// A child of fork() (gtest's death tests) has no thread but its own: it starts a device of its own when it needs one.
void BeforeFork() {
  std::unique_lock lock(device.mutex);
  ++device.num_waiting;
  device.work_arrived.notify_all();
  device.work_done.wait(lock, [] { return !device.busy && device.ready.empty(); });
  --device.num_waiting;
  lock.release();
}
void AfterForkInParent() { device.mutex.unlock(); }
void AfterForkInChild() {
  device.mutex.unlock();
  // The thread's object and the conditions may think of threads that are not here: begin with new ones, leaking the old.
  new (&device.thread) std::thread;
  new (&device.work_arrived) std::condition_variable;
  new (&device.work_done) std::condition_variable;
  device.started = false;
}

void StartDevice() {
  if (device.started) return;
  device.started = true;
  static const bool once = [] {
    device.random = Seed();
    pthread_atfork(BeforeFork, AfterForkInParent, AfterForkInChild);
    std::atexit(StopDevice);
    return true;
  }();
  (void)once;
  device.thread = std::thread(DeviceMain);
}

// ---- Adding operations; the mutex is held ----

OperationPtr AddOperation(Work work, const std::vector<OperationPtr>& predecessors) {
  StartDevice();
  auto operation = std::make_shared<Operation>();
  operation->work = std::move(work);
  for (const OperationPtr& predecessor : predecessors) {
    if (predecessor == nullptr || predecessor->done) continue;
    predecessor->successors.push_back(operation);
    ++operation->num_predecessors;
  }
  if (operation->num_predecessors == 0) {
    device.ready.push_back(operation);
    device.work_arrived.notify_one();
  }
  return operation;
}

// What the next operation of a stream waits for.
std::vector<OperationPtr> TakePredecessors(CUstream_st& stream) {
  std::vector<OperationPtr> predecessors = std::move(stream.waits);
  stream.waits.clear();
  predecessors.push_back(stream.tail);
  if (&stream == &device.legacy) {
    for (const CUstream_st* other : device.streams) {
      if (other->blocking) predecessors.push_back(other->tail);
    }
  } else if (stream.blocking) {
    predecessors.push_back(device.legacy.tail);
  }
  return predecessors;
}

bool IsStream(const CUstream_st* stream) {
  return std::find(device.streams.begin(), device.streams.end(), stream) != device.streams.end();
}

CUstream_st* Resolve(cudaStream_t stream) {
  if (stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread) return &device.legacy;
  return IsStream(stream) ? stream : nullptr;
}

cudaError_t EnqueueLocked(CUstream_st& stream, Work work) {
  if (stream.capture != nullptr) {
    Capture& capture = *stream.capture;
    if (capture.invalid) return cudaErrorStreamCaptureInvalidated;
    capture.graph->nodes.push_back({.work = std::move(work), .predecessors = stream.capture_tail});
    stream.capture_tail = {static_cast<int>(capture.graph->nodes.size()) - 1};
    return cudaSuccess;
  }
  if (&stream == &device.legacy) {
    // The legacy stream would wait for the capturing one.
    for (const auto& capture : device.captures) {
      if (capture->mode != cudaStreamCaptureModeRelaxed &&
          std::any_of(capture->streams.begin(), capture->streams.end(), [](auto* s) { return s->blocking; })) {
        capture->invalid = true;
        return cudaErrorStreamCaptureImplicit;
      }
    }
  }
  stream.tail = AddOperation(std::move(work), TakePredecessors(stream));
  return cudaSuccess;
}

void WaitFor(std::unique_lock<std::mutex>& lock, const std::vector<OperationPtr>& operations) {
  counters.synchronizations.fetch_add(1);
  ++device.num_waiting;
  device.work_arrived.notify_all();
  for (const OperationPtr& operation : operations) {
    device.work_done.wait(lock, [&] { return operation == nullptr || operation->done; });
  }
  --device.num_waiting;
}

std::vector<OperationPtr> AllTails() {
  std::vector<OperationPtr> tails = {device.legacy.tail};
  for (const CUstream_st* stream : device.streams) tails.push_back(stream->tail);
  return tails;
}

// Calls that a capture forbids (they may wait for the device). In mode "thread local" other threads may make them.
cudaError_t ForbiddenInCapture() {
  for (const auto& capture : device.captures) {
    if (capture->mode == cudaStreamCaptureModeGlobal ||
        (capture->mode == cudaStreamCaptureModeThreadLocal && capture->thread == std::this_thread::get_id())) {
      capture->invalid = true;
      return cudaErrorStreamCaptureUnsupported;
    }
  }
  return cudaSuccess;
}

Work MakeWork(std::function<void()> work) { return std::make_shared<const std::function<void()>>(std::move(work)); }

// ---- Copies ----

// The living allocation that holds all the bytes, or null.
const Allocation* Owner(const void* pointer, size_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const Allocation* const allocation = FindAllocation(address);
  if (allocation == nullptr || allocation->freed || address < allocation->begin || address + bytes > allocation->end)
    return nullptr;
  return allocation;
}
bool InArena(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) - arena_begin < kArenaBytes; }

void CheckAlive(const void* pointer, size_t bytes, const char* what) {
  if (InArena(pointer) && Owner(pointer, bytes) == nullptr) {
    Violation(std::string(what) + " runs on memory that was freed while it was in its queue, at " + Hex(pointer));
  }
}

struct CopyRows {
  void* target;
  size_t target_pitch;
  const void* source;
  size_t source_pitch;
  size_t width;
  size_t height;
  size_t TargetBytes() const { return height == 0 ? 0 : (height - 1) * target_pitch + width; }
  size_t SourceBytes() const { return height == 0 ? 0 : (height - 1) * source_pitch + width; }
  void Run() const {
    CheckAlive(target, TargetBytes(), "a copy");
    CheckAlive(source, SourceBytes(), "a copy");
    for (size_t row = 0; row < height; ++row) {
      std::memmove(static_cast<char*>(target) + row * target_pitch, static_cast<const char*>(source) + row * source_pitch, width);
    }
  }
};

enum class Place : uint8_t { kDevice, kPinned, kPageable };

// What CUDA can tell of a range; false when it belongs to the device's addresses but to no allocation.
bool PlaceOf(const void* pointer, size_t bytes, Place* place) {
  if (!InArena(pointer)) {
    *place = Place::kPageable;
    return pointer != nullptr || bytes == 0;
  }
  const Allocation* const allocation = Owner(pointer, bytes);
  if (allocation == nullptr) return false;
  *place = allocation->kind == MemoryKind::kDevice ? Place::kDevice : Place::kPinned;
  return true;
}

cudaError_t CopyMemory(const CopyRows& rows, cudaMemcpyKind kind, cudaStream_t stream_handle, bool wait) {
  std::unique_lock lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  CUstream_st* const stream = Resolve(stream_handle);
  if (stream == nullptr) return Return(cudaErrorInvalidResourceHandle);
  if (rows.width == 0 || rows.height == 0) return cudaSuccess;
  Place target, source;
  if (!PlaceOf(rows.target, rows.TargetBytes(), &target) || !PlaceOf(rows.source, rows.SourceBytes(), &source))
    return Return(cudaErrorInvalidValue);
  const bool from_device = source == Place::kDevice, to_device = target == Place::kDevice;
  if ((kind == cudaMemcpyHostToDevice && (from_device || target == Place::kPageable)) ||
      (kind == cudaMemcpyDeviceToHost && (to_device || source == Place::kPageable)) ||
      (kind == cudaMemcpyDeviceToDevice && (target == Place::kPageable || source == Place::kPageable)) ||
      (kind == cudaMemcpyHostToHost && (from_device || to_device))) {
    return Return(cudaErrorInvalidValue);
  }
  const bool pageable = source == Place::kPageable || target == Place::kPageable;
  if (wait || pageable) {
    if (stream->capture != nullptr) {
      stream->capture->invalid = true;
      return Return(cudaErrorStreamCaptureUnsupported);
    }
    if (wait) {
      if (const cudaError_t error = ForbiddenInCapture(); error != cudaSuccess) return Return(error);
    }
  }
  if (source == Place::kPageable && !wait) {
    // Read before the call returns, as CUDA stages it.
    auto staged = std::make_shared<std::vector<char>>(rows.width * rows.height);
    CopyRows{staged->data(), rows.width, rows.source, rows.source_pitch, rows.width, rows.height}.Run();
    return Return(EnqueueLocked(*stream, MakeWork([rows, staged] {
      CopyRows{rows.target, rows.target_pitch, staged->data(), rows.width, rows.width, rows.height}.Run();
    })));
  }
  const cudaError_t error = EnqueueLocked(*stream, MakeWork([rows] { rows.Run(); }));
  if (error != cudaSuccess) return Return(error);
  if (wait || pageable) WaitFor(lock, {stream->tail});
  return Return(device.sticky);
}

// `height` rows of `width` bytes, `pitch` apart.
cudaError_t FillMemory(void* target, size_t pitch, int value, size_t width, size_t height, cudaStream_t stream_handle,
                       bool wait) {
  std::unique_lock lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  CUstream_st* const stream = Resolve(stream_handle);
  if (stream == nullptr) return Return(cudaErrorInvalidResourceHandle);
  if (width == 0 || height == 0) return cudaSuccess;
  const size_t bytes = (height - 1) * pitch + width;
  if ((height > 1 && pitch < width) || Owner(target, bytes) == nullptr) return Return(cudaErrorInvalidValue);
  if (wait) {
    if (const cudaError_t error = ForbiddenInCapture(); error != cudaSuccess) return Return(error);
  }
  const cudaError_t error = EnqueueLocked(*stream, MakeWork([target, pitch, value, width, height, bytes] {
    CheckAlive(target, bytes, "a fill");
    for (size_t row = 0; row < height; ++row) std::memset(static_cast<char*>(target) + row * pitch, value, width);
  }));
  if (error != cudaSuccess) return Return(error);
  if (wait) WaitFor(lock, {stream->tail});
  return Return(device.sticky);
}

cudaError_t Allocate(void** pointer, size_t bytes, MemoryKind kind) {
  counters.allocations.fetch_add(1);
  std::unique_lock lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  if (pointer == nullptr) return Return(cudaErrorInvalidValue);
  *pointer = nullptr;
  if (const cudaError_t error = ForbiddenInCapture(); error != cudaSuccess) return Return(error);
  if (bytes == 0) return cudaSuccess;
  *pointer = AllocateMemory(bytes, kind);
  return Return(*pointer == nullptr ? cudaErrorMemoryAllocation : cudaSuccess);
}

cudaError_t Release(void* pointer, MemoryKind kind) {
  if (pointer == nullptr) return cudaSuccess;
  counters.frees.fetch_add(1);
  std::unique_lock lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  if (const cudaError_t error = ForbiddenInCapture(); error != cudaSuccess) return Return(error);
  WaitFor(lock, AllTails());  // as CUDA does
  return Return(ReleaseMemory(pointer, kind) ? cudaSuccess : cudaErrorInvalidValue);
}

}  // namespace

// ---- For the emulator's other parts ----

cudaError_t EnqueueWork(cudaStream_t stream_handle, std::function<void()> work) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  CUstream_st* const stream = Resolve(stream_handle);
  if (stream == nullptr) return Return(cudaErrorInvalidResourceHandle);
  return Return(EnqueueLocked(*stream, MakeWork(std::move(work))));
}

cudaError_t Enqueue(std::shared_ptr<const KernelCall> call, dim3 grid, dim3 block, size_t shared_bytes,
                    cudaStream_t stream_handle) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  CUstream_st* const stream = Resolve(stream_handle);
  if (stream == nullptr) return Return(cudaErrorInvalidResourceHandle);
  const bool empty = grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.y == 0 || block.z == 0;
  if (empty || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || block.x > 1024 || block.y > 1024 || block.z > 64 ||
      uint64_t{block.x} * block.y * block.z > static_cast<uint64_t>(kMaxThreads)) {
    return Return(cudaErrorInvalidConfiguration);
  }
  const auto opted_in = device.opted_in.find(call->function());
  // Who has not opted in gets 48 KiB, static shared memory included; who has, what the device has.
  const bool opted = opted_in != device.opted_in.end() && shared_bytes <= static_cast<size_t>(opted_in->second);
  if (!opted && shared_bytes > kMaxStaticSharedBytes) return Return(cudaErrorInvalidValue);
  const size_t shared_limit = opted ? kMaxSharedBytes : kMaxStaticSharedBytes;
  return Return(EnqueueLocked(*stream, MakeWork([call = std::move(call), grid, block, shared_bytes, shared_limit] {
    counters.launches.fetch_add(1);
    RunKernel(*call, grid, block, shared_bytes, shared_limit);
  })));
}

Counters GetCounters() {
  return {.launches = counters.launches,
          .graph_launches = counters.graph_launches,
          .operations = counters.operations,
          .allocations = counters.allocations,
          .frees = counters.frees,
          .synchronizations = counters.synchronizations};
}

void SetDeviceCount(int count) {
  std::lock_guard lock(device.mutex);
  device.device_count = count;
}

void InjectStickyError(cudaError_t error) {
  std::lock_guard lock(device.mutex);
  device.sticky = error;
  device.operations_until_error = -1;
}

void InjectStickyErrorAfter(int64_t operations, cudaError_t error) {
  std::lock_guard lock(device.mutex);
  device.operations_until_error = operations;
  device.error_to_come = error;
}

}  // namespace bebop::emulation

// ---- The runtime's calls ----

using namespace bebop::emulation;  // of this file's own names, for the C functions below

extern "C" {

cudaError_t cudaMalloc(void** pointer, size_t bytes) { return Allocate(pointer, bytes, MemoryKind::kDevice); }
cudaError_t cudaFree(void* pointer) { return Release(pointer, MemoryKind::kDevice); }
cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return Allocate(pointer, bytes, MemoryKind::kPinned); }
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) { return Allocate(pointer, bytes, MemoryKind::kPinned); }
cudaError_t cudaFreeHost(void* pointer) { return Release(pointer, MemoryKind::kPinned); }

cudaError_t cudaHostGetDevicePointer(void** device_pointer, void* host_pointer, unsigned flags) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  const Allocation* const allocation = Owner(host_pointer, 1);
  if (flags != 0 || allocation == nullptr || allocation->kind != MemoryKind::kPinned) return Return(cudaErrorInvalidValue);
  *device_pointer = host_pointer;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  *attributes = {};
  const Allocation* const allocation = Owner(pointer, 1);
  attributes->type = allocation == nullptr                     ? cudaMemoryTypeUnregistered
                     : allocation->kind == MemoryKind::kDevice ? cudaMemoryTypeDevice
                                                               : cudaMemoryTypeHost;
  attributes->devicePointer = allocation == nullptr ? nullptr : const_cast<void*>(pointer);
  attributes->hostPointer = attributes->type == cudaMemoryTypeHost ? const_cast<void*>(pointer) : nullptr;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  *total_bytes = DeviceMemoryBytes();
  *free_bytes = *total_bytes - DeviceMemoryUsed();
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind kind) {
  return CopyMemory({target, bytes, source, bytes, bytes, 1}, kind, nullptr, true);
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return CopyMemory({target, bytes, source, bytes, bytes, 1}, kind, stream, false);
}
cudaError_t cudaMemcpy2D(void* target, size_t target_pitch, const void* source, size_t source_pitch, size_t width, size_t height,
                         cudaMemcpyKind kind) {
  return CopyMemory({target, target_pitch, source, source_pitch, width, height}, kind, nullptr, true);
}
cudaError_t cudaMemcpy2DAsync(void* target, size_t target_pitch, const void* source, size_t source_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  return CopyMemory({target, target_pitch, source, source_pitch, width, height}, kind, stream, false);
}
cudaError_t cudaMemset(void* target, int value, size_t bytes) {
  return FillMemory(target, bytes, value, bytes, 1, nullptr, true);
}
cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t stream) {
  return FillMemory(target, bytes, value, bytes, 1, stream, false);
}
cudaError_t cudaMemset2DAsync(void* target, size_t pitch, int value, size_t width, size_t height, cudaStream_t stream) {
  return FillMemory(target, pitch, value, width, height, stream, false);
}

cudaError_t cudaGetDeviceCount(int* count) {
  std::lock_guard lock(device.mutex);
  *count = device.device_count;
  return Return(Health());
}
cudaError_t cudaSetDevice(int index) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  return Return(index == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaGetDevice(int* index) {
  std::lock_guard lock(device.mutex);
  *index = 0;
  return Return(Health());
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  if (index != 0) return Return(cudaErrorInvalidDevice);
  *properties = {};
  std::strncpy(properties->name, "bebop emulated device", sizeof(properties->name) - 1);
  properties->totalGlobalMem = DeviceMemoryBytes();
  properties->major = 9;
  properties->minor = 0;
  properties->multiProcessorCount = 4;
  properties->warpSize = kWarpLanes;
  properties->maxThreadsPerBlock = kMaxThreads;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->sharedMemPerBlock = kMaxStaticSharedBytes;
  properties->sharedMemPerBlockOptin = kMaxSharedBytes;
  properties->sharedMemPerMultiprocessor = kMaxSharedBytes + 1024;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 0x7fffffff;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->l2CacheSize = 50 << 20;
  properties->unifiedAddressing = properties->canMapHostMemory = properties->concurrentKernels = 1;
  properties->asyncEngineCount = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  cudaDeviceProp properties;
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, index); error != cudaSuccess) return error;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = properties.maxThreadsPerBlock;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(properties.sharedMemPerBlock);
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(properties.sharedMemPerBlockOptin);
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(properties.sharedMemPerMultiprocessor);
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = properties.maxThreadsPerMultiProcessor;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = properties.multiProcessorCount;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = properties.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = properties.minor;
      break;
    case cudaDevAttrWarpSize:
      *value = properties.warpSize;
      break;
    case cudaDevAttrL2CacheSize:
      *value = properties.l2CacheSize;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
      *value = properties.regsPerBlock;
      break;
    case cudaDevAttrUnifiedAddressing:
      *value = properties.unifiedAddressing;
      break;
    case cudaDevAttrCanMapHostMemory:
      *value = properties.canMapHostMemory;
      break;
    case cudaDevAttrMaxGridDimX:
      *value = properties.maxGridSize[0];
      break;
    case cudaDevAttrMaxGridDimY:
      *value = properties.maxGridSize[1];
      break;
    case cudaDevAttrMaxGridDimZ:
      *value = properties.maxGridSize[2];
      break;
    case cudaDevAttrIntegrated:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrCooperativeLaunch:
      *value = 0;
      break;
    // Add what is asked for; a wrong zero would be worse.
    default:
      Fatal("cudaDeviceGetAttribute: attribute " + std::to_string(attribute) + " is not in the emulated device yet (runtime.cc)");
  }
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  std::unique_lock lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  if (const cudaError_t error = ForbiddenInCapture(); error != cudaSuccess) return Return(error);
  WaitFor(lock, AllTails());
  return Return(device.sticky);
}

// ---- Streams ----

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  if (stream == nullptr || (flags & ~unsigned{cudaStreamNonBlocking}) != 0) return Return(cudaErrorInvalidValue);
  *stream = new CUstream_st;
  (*stream)->blocking = (flags & cudaStreamNonBlocking) == 0;
  device.streams.push_back(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  if (!IsStream(stream)) return Return(cudaErrorInvalidResourceHandle);
  std::erase(device.streams, stream);
  delete stream;  // what it has enqueued runs all the same
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream_handle) {
  std::unique_lock lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  CUstream_st* const stream = Resolve(stream_handle);
  if (stream == nullptr) return Return(cudaErrorInvalidResourceHandle);
  if (stream->capture != nullptr) {
    stream->capture->invalid = true;
    return Return(cudaErrorStreamCaptureUnsupported);
  }
  std::vector<OperationPtr> operations = stream->waits;
  operations.push_back(stream->tail);
  WaitFor(lock, operations);
  return Return(device.sticky);
}

cudaError_t cudaStreamQuery(cudaStream_t stream_handle) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  const CUstream_st* const stream = Resolve(stream_handle);
  if (stream == nullptr) return Return(cudaErrorInvalidResourceHandle);
  if (stream->capture != nullptr) {
    stream->capture->invalid = true;
    return Return(cudaErrorStreamCaptureUnsupported);
  }
  // Not an error to remember, as with CUDA.
  return stream->tail == nullptr || stream->tail->done ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream_handle, cudaEvent_t event, unsigned) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  CUstream_st* const stream = Resolve(stream_handle);
  if (stream == nullptr || event == nullptr) return Return(cudaErrorInvalidResourceHandle);
  if (event->capture != nullptr) {
    if (stream->capture != nullptr && stream->capture != event->capture) return Return(cudaErrorStreamCaptureMerge);
    if (stream->capture == nullptr) {
      if (stream == &device.legacy) return Return(cudaErrorStreamCaptureImplicit);
      stream->capture = event->capture;
      stream->capture->streams.push_back(stream);
      stream->capture_tail.clear();
    }
    for (const int node : event->capture_tail) {
      if (std::find(stream->capture_tail.begin(), stream->capture_tail.end(), node) == stream->capture_tail.end())
        stream->capture_tail.push_back(node);
    }
    return cudaSuccess;
  }
  if (stream->capture != nullptr) {
    stream->capture->invalid = true;
    return Return(cudaErrorStreamCaptureIsolation);
  }
  if (event->operation != nullptr && !event->operation->done) stream->waits.push_back(event->operation);
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return EnqueueWork(stream, [function, data] { function(data); });
}

// ---- Events ----

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  *event = new CUevent_st;
  (*event)->timing = (flags & cudaEventDisableTiming) == 0;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  if (event == nullptr) return Return(cudaErrorInvalidResourceHandle);
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream_handle) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  CUstream_st* const stream = Resolve(stream_handle);
  if (stream == nullptr || event == nullptr) return Return(cudaErrorInvalidResourceHandle);
  if (stream->capture != nullptr) {
    event->capture = stream->capture;
    event->capture_tail = stream->capture_tail;
    return cudaSuccess;
  }
  event->capture = nullptr;
  event->time = std::make_shared<std::chrono::steady_clock::time_point>();
  const cudaError_t error = EnqueueLocked(*stream, MakeWork([time = event->time] { *time = std::chrono::steady_clock::now(); }));
  event->operation = stream->tail;
  return Return(error);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  if (event == nullptr) return Return(cudaErrorInvalidResourceHandle);
  if (event->capture != nullptr) return Return(cudaErrorCapturedEvent);
  return event->operation == nullptr || event->operation->done ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  std::unique_lock lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  if (event == nullptr) return Return(cudaErrorInvalidResourceHandle);
  if (event->capture != nullptr) return Return(cudaErrorCapturedEvent);
  WaitFor(lock, {event->operation});
  return Return(device.sticky);
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  if (start == nullptr || end == nullptr || !start->timing || !end->timing || start->operation == nullptr ||
      end->operation == nullptr) {
    return Return(cudaErrorInvalidResourceHandle);
  }
  if (!start->operation->done || !end->operation->done) return cudaErrorNotReady;
  *milliseconds = std::chrono::duration<float, std::milli>(*end->time - *start->time).count();
  return cudaSuccess;
}

// ---- Graphs ----

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  if (stream == nullptr) return Return(cudaErrorStreamCaptureUnsupported);  // the legacy stream cannot be captured
  if (!IsStream(stream)) return Return(cudaErrorInvalidResourceHandle);
  if (stream->capture != nullptr) return Return(cudaErrorIllegalState);
  stream->capture = std::make_shared<Capture>();
  stream->capture->mode = mode;
  stream->capture->thread = std::this_thread::get_id();
  stream->capture->origin = stream;
  stream->capture->streams = {stream};
  stream->capture_tail.clear();
  device.captures.push_back(stream->capture);
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  if (graph != nullptr) *graph = nullptr;
  if (stream == nullptr || !IsStream(stream) || stream->capture == nullptr) return Return(cudaErrorIllegalState);
  const std::shared_ptr<Capture> capture = stream->capture;
  if (capture->origin != stream) return Return(cudaErrorStreamCaptureUnmatched);
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id()) {
    return Return(cudaErrorStreamCaptureWrongThread);
  }
  // Every node must lead to the origin's last ones.
  std::vector<Node>& nodes = capture->graph->nodes;
  std::vector<bool> joined(nodes.size(), false);
  for (const int node : stream->capture_tail) joined[static_cast<size_t>(node)] = true;
  for (size_t node = nodes.size(); node-- > 0;) {
    if (!joined[node]) continue;
    for (const int predecessor : nodes[node].predecessors) joined[static_cast<size_t>(predecessor)] = true;
  }
  const bool all_joined = std::find(joined.begin(), joined.end(), false) == joined.end();
  for (CUstream_st* member : capture->streams) {
    if (!IsStream(member)) continue;
    member->capture = nullptr;
    member->capture_tail.clear();
  }
  std::erase(device.captures, capture);
  if (capture->invalid) return Return(cudaErrorStreamCaptureInvalidated);
  if (!all_joined) return Return(cudaErrorStreamCaptureUnjoined);
  *graph = capture->graph.release();
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream_handle, cudaStreamCaptureStatus* status) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  const CUstream_st* const stream = Resolve(stream_handle);
  if (stream == nullptr) return Return(cudaErrorInvalidResourceHandle);
  *status = stream->capture == nullptr ? cudaStreamCaptureStatusNone
            : stream->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                       : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* num_nodes) {
  std::lock_guard lock(device.mutex);
  if (graph == nullptr || nodes != nullptr) return Return(cudaErrorInvalidValue);  // counting is all that is offered
  *num_nodes = graph->nodes.size();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  if (graph == nullptr || exec == nullptr) return Return(cudaErrorInvalidValue);
  *exec = new CUgraphExec_st{graph->nodes};
  return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t stream) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  if (exec == nullptr || Resolve(stream) == nullptr) return Return(cudaErrorInvalidValue);
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream_handle) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  CUstream_st* const stream = Resolve(stream_handle);
  if (stream == nullptr) return Return(cudaErrorInvalidResourceHandle);
  if (exec == nullptr) return Return(cudaErrorInvalidValue);
  if (stream->capture != nullptr) Fatal("a graph inside a graph is not in the emulated device");
  counters.graph_launches.fetch_add(1);
  // All nodes that depend on none wait for the stream; the stream goes on behind all of them.
  const OperationPtr begin = AddOperation(nullptr, TakePredecessors(*stream));
  std::vector<OperationPtr> operations;
  for (const Node& node : exec->nodes) {
    std::vector<OperationPtr> predecessors = {begin};
    for (const int predecessor : node.predecessors) predecessors.push_back(operations[static_cast<size_t>(predecessor)]);
    operations.push_back(AddOperation(node.work, predecessors));
  }
  operations.push_back(begin);
  stream->tail = AddOperation(nullptr, operations);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  delete exec;  // launches in queues own their work
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  delete graph;
  return cudaSuccess;
}

// ---- Kernels' attributes ----

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  std::lock_guard lock(device.mutex);
  if (const cudaError_t health = Health(); health != cudaSuccess) return Return(health);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || static_cast<size_t>(value) > kMaxSharedBytes) return Return(cudaErrorInvalidValue);
    device.opted_in[function] = value;
  }
  return cudaSuccess;
}

// ---- Errors ----

cudaError_t cudaGetLastError() {
  std::lock_guard lock(device.mutex);
  if (device.sticky != cudaSuccess) return device.sticky;
  return std::exchange(last_error, cudaSuccess);
}
cudaError_t cudaPeekAtLastError() {
  std::lock_guard lock(device.mutex);
  return device.sticky != cudaSuccess ? device.sticky : last_error;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define BEBOP_ERROR(name) \
  case name:              \
    return #name;
    BEBOP_ERROR(cudaSuccess)
    BEBOP_ERROR(cudaErrorInvalidValue)
    BEBOP_ERROR(cudaErrorMemoryAllocation)
    BEBOP_ERROR(cudaErrorInvalidConfiguration)
    BEBOP_ERROR(cudaErrorInvalidDevice)
    BEBOP_ERROR(cudaErrorNoDevice)
    BEBOP_ERROR(cudaErrorInvalidResourceHandle)
    BEBOP_ERROR(cudaErrorNotReady)
    BEBOP_ERROR(cudaErrorIllegalState)
    BEBOP_ERROR(cudaErrorIllegalAddress)
    BEBOP_ERROR(cudaErrorLaunchFailure)
    BEBOP_ERROR(cudaErrorLaunchOutOfResources)
    BEBOP_ERROR(cudaErrorLaunchTimeout)
    BEBOP_ERROR(cudaErrorECCUncorrectable)
    BEBOP_ERROR(cudaErrorCapturedEvent)
    BEBOP_ERROR(cudaErrorStreamCaptureUnsupported)
    BEBOP_ERROR(cudaErrorStreamCaptureInvalidated)
    BEBOP_ERROR(cudaErrorStreamCaptureMerge)
    BEBOP_ERROR(cudaErrorStreamCaptureUnmatched)
    BEBOP_ERROR(cudaErrorStreamCaptureUnjoined)
    BEBOP_ERROR(cudaErrorStreamCaptureIsolation)
    BEBOP_ERROR(cudaErrorStreamCaptureImplicit)
    BEBOP_ERROR(cudaErrorStreamCaptureWrongThread)
#undef BEBOP_ERROR
    default:
      return "unrecognized error code";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorECCUncorrectable:
      return "uncorrectable ECC error encountered";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    default:
      return cudaGetErrorName(error);
  }
}

}  // extern "C"
