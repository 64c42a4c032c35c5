// SPDX-License-Identifier: Apache-2.0
#include "block.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <boost/context/detail/fcontext.hpp>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

#include "checks.h"
#include "cuda_emulation_device.h"
#include "violation.h"

// What kernels read as constants (cuda_emulation.h declares them so).
uint3 threadIdx;
uint3 blockIdx;
uint3 blockDim;
uint3 gridDim;

namespace bebop::emulation {

using boost::context::detail::fcontext_t;
using boost::context::detail::jump_fcontext;
using boost::context::detail::make_fcontext;
using boost::context::detail::transfer_t;

Running running;
constinit thread_local bool in_kernel = false;

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kGuardBytes = 4096;
constexpr int kStackOffsets = 127;
constexpr size_t kStackOffsetBytes = 448;
constexpr uint32_t kAllLanes = 0xffffffffu;

enum class State : uint8_t { kNew, kRunnable, kAtBarrier, kInWarp, kDone };

struct Copy {
  void* shared;
  const void* global;
  bool valid;
  int group;
};

struct Thread {
  fcontext_t context = nullptr;
  int stack = -1;
  State state = State::kNew;
  int line = 0;  // where it waits
  WarpOperation operation = WarpOperation::kSync;
  uint32_t mask = 0;
  // Operands of the warp operation it waits in, and its result.
  uint64_t value = 0;
  uint64_t result = 0;
  int source = 0;
  uint32_t* registers = nullptr;
  const void* row = nullptr;
  float* d = nullptr;
  const uint32_t* a = nullptr;
  const uint32_t* b = nullptr;
  // Asynchronous copies that no wait has completed, in order.
  std::vector<Copy> copies;
  int num_commits = 0;
};

// Lanes that wait for each other.
struct Meeting {
  uint32_t mask;
  uint32_t arrived;
  int line;
  WarpOperation operation;
};

struct Warp {
  uint32_t lanes = 0;  // that exist
  uint32_t exited = 0;
  int num_meetings = 0;
  Meeting meetings[kWarpLanes];
};

enum class Policy : uint8_t { kUniform, kRunAhead };

struct Block {
  const KernelCall* call = nullptr;
  int num_threads = 0;
  int num_finished = 0;
  // The barrier that threads have come to.
  int num_at_barrier = 0;
  int barrier_line = 0;
  BarrierKind barrier_kind = BarrierKind::kPlain;
  int barrier_sum = 0;
  int barrier_result = 0;

  fcontext_t main = nullptr;
  Thread threads[kMaxThreads];
  uint3 indices[kMaxThreads];
  Warp warps[kMaxThreads / kWarpLanes];
  uint16_t runnable[kMaxThreads];
  int num_runnable = 0;
  Policy policy = Policy::kUniform;
  uint64_t random = 0;

  uintptr_t stacks = 0;
  int num_stacks = 0;
  std::vector<int> free_stacks;
  unsigned char* shared = nullptr;
  uint64_t num_launches = 0;
  int64_t num_sleeps = 0;  // since a thread ended or threads met
  std::chrono::steady_clock::time_point sleeping_since;
};

// Used by the device's thread alone.
Block block;

std::atomic<uint64_t> seed{0};
std::atomic<bool> seed_set{false};
std::atomic<double> spin_limit{60.0};

uint64_t Mix(uint64_t x) {  // splitmix64's finalizer
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

uint32_t Random(uint32_t bound) {  // xorshift64*; the bias of the multiplication does not matter here
  block.random ^= block.random >> 12;
  block.random ^= block.random << 25;
  block.random ^= block.random >> 27;
  return static_cast<uint32_t>((static_cast<uint64_t>(static_cast<uint32_t>(block.random * 0x2545f4914f6cdd1du >> 32)) * bound) >>
                               32);
}

void FiberMain(transfer_t transfer);

void SetCurrent(int thread) {
  running.thread = thread;
  threadIdx = block.indices[thread];
}

void MakeRunnable(int thread) {
  block.threads[thread].state = State::kRunnable;
  block.runnable[block.num_runnable++] = static_cast<uint16_t>(thread);
}

std::string WaitingThreads() {
  std::string text;
  int listed = 0;
  for (int t = 0; t < block.num_threads && listed < 8; ++t) {
    const Thread& thread = block.threads[t];
    if (thread.state == State::kAtBarrier) {
      text += "\n  thread " + ThreadName(t) + " waits at the barrier of line " + std::to_string(thread.line);
      ++listed;
    } else if (thread.state == State::kInWarp) {
      text += "\n  thread " + ThreadName(t) + " waits in " + WarpOperationName(thread.operation) + " of line " +
              std::to_string(thread.line) + " with mask " + Hex(uintptr_t{thread.mask});
      ++listed;
    }
  }
  return text;
}

int TakeNext() {
  if (block.num_runnable == 0) Violation("deadlock: every thread of the block waits for another" + WaitingThreads());
  const int index = block.policy == Policy::kUniform ? static_cast<int>(Random(static_cast<uint32_t>(block.num_runnable)))
                                                     : block.num_runnable - 1;
  const int thread = block.runnable[index];
  block.runnable[index] = block.runnable[--block.num_runnable];
  return thread;
}

int TakeStack() {
  if (!block.free_stacks.empty()) {
    const int stack = block.free_stacks.back();
    block.free_stacks.pop_back();
    return stack;
  }
  const int stack = block.num_stacks++;
  mprotect(reinterpret_cast<void*>(block.stacks + stack * kStackBytes), kGuardBytes, PROT_NONE);
  return stack;
}

// Goes on as another thread. `save` keeps where the present one is, or is null when it has ended.
void JumpTo(int next, fcontext_t* save) {
  Thread& thread = block.threads[next];
  if (thread.state == State::kNew) {
    thread.stack = TakeStack();
    // Stacks begin at different distances from their ends, or all of them would share a few lines of the cache.
    const size_t offset = static_cast<size_t>(thread.stack % kStackOffsets) * kStackOffsetBytes;
    thread.context =
        make_fcontext(reinterpret_cast<void*>(block.stacks + static_cast<size_t>(thread.stack + 1) * kStackBytes - offset),
                      kStackBytes - kGuardBytes - offset, FiberMain);
    thread.state = State::kRunnable;
  }
  SetCurrent(next);
  const transfer_t transfer = jump_fcontext(thread.context, save);
  if (transfer.data != nullptr) *static_cast<fcontext_t*>(transfer.data) = transfer.fctx;
}

void SwitchAway() {
  const int self = running.thread;
  const int next = TakeNext();
  if (next != self) JumpTo(next, &block.threads[self].context);
}

void EndThread() {
  const int self = running.thread;
  Thread& thread = block.threads[self];
  thread.state = State::kDone;
  thread.copies.clear();
  block.num_sleeps = 0;
  ++block.num_finished;
  Warp& warp = block.warps[self / kWarpLanes];
  const uint32_t bit = 1u << (self % kWarpLanes);
  warp.exited |= bit;
  if (block.num_at_barrier > 0) Violation("the thread returned while others wait at a barrier" + WaitingThreads());
  for (int m = 0; m < warp.num_meetings; ++m) {
    if (warp.meetings[m].mask & bit) Violation("the thread returned while lanes of its warp wait for it" + WaitingThreads());
  }
}

void FiberMain(transfer_t transfer) {
  if (transfer.data != nullptr) *static_cast<fcontext_t*>(transfer.data) = transfer.fctx;
  const int stack = block.threads[running.thread].stack;
  while (true) {
    block.call->RunThread();
    EndThread();
    if (block.num_finished == block.num_threads) break;
    const int next = TakeNext();
    if (block.threads[next].state != State::kNew) {
      block.free_stacks.push_back(stack);
      JumpTo(next, nullptr);  // does not return: nobody knows this fiber any more
    }
    // A thread that has not begun begins on this stack.
    block.threads[next].stack = stack;
    block.threads[next].state = State::kRunnable;
    SetCurrent(next);
  }
  block.free_stacks.push_back(stack);
  jump_fcontext(block.main, nullptr);
}

void RunBlock() {
  block.num_finished = 0;
  block.num_at_barrier = 0;
  block.num_sleeps = 0;
  const int num_warps = (block.num_threads + kWarpLanes - 1) / kWarpLanes;
  for (int w = 0; w < num_warps; ++w) {
    const int lanes = std::min(kWarpLanes, block.num_threads - w * kWarpLanes);
    Warp& warp = block.warps[w];
    warp.lanes = lanes == kWarpLanes ? kAllLanes : (1u << lanes) - 1;
    warp.exited = 0;
    warp.num_meetings = 0;
  }
  // Half of the blocks mix their threads evenly; the others let each run as far as it gets, in the threads' order or in a random
  // one.
  const uint32_t choice = Random(4);
  block.policy = choice < 2 ? Policy::kUniform : Policy::kRunAhead;
  block.num_runnable = block.num_threads;
  for (int t = 0; t < block.num_threads; ++t) {
    block.threads[t].state = State::kNew;
    block.threads[t].num_commits = 0;
    block.runnable[t] = static_cast<uint16_t>(block.num_threads - 1 - t);
  }
  if (choice == 2) {
    for (int t = block.num_threads - 1; t > 0; --t)
      std::swap(block.runnable[t], block.runnable[Random(static_cast<uint32_t>(t + 1))]);
  }
  CheckStartBlock();
  in_kernel = true;
  JumpTo(TakeNext(), &block.main);
  in_kernel = false;
}

void Initialize() {
  if (block.stacks != 0) return;
  const size_t bytes = kMaxThreads * kStackBytes;
  void* const stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  // 16 bytes off a multiple of 128: dynamic shared memory follows static shared memory on a device, and no more than 16 is
  // promised.
  void* const shared = mmap(nullptr, kMaxSharedBytes + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stacks == MAP_FAILED || shared == MAP_FAILED) Fatal("no memory for the threads of a block");
  block.stacks = reinterpret_cast<uintptr_t>(stacks);
  block.shared = static_cast<unsigned char*>(shared) + 16;
  running.stacks_begin = block.stacks;
  running.stacks_bytes = bytes;
}

}  // namespace

void SetSpinLimit(double seconds) { spin_limit.store(seconds); }

void SetSeed(uint64_t value) {
  seed.store(value);
  seed_set.store(true);
}

uint64_t Seed() {
  if (!seed_set.load()) {
    const char* text = std::getenv("BEBOP_EMULATION_SEED");
    SetSeed(text != nullptr ? std::strtoull(text, nullptr, 10) : 1);
  }
  return seed.load();
}

void RunKernel(const KernelCall& call, dim3 grid, dim3 threads, size_t shared_bytes, size_t shared_limit) {
  Initialize();
  block.call = &call;
  block.random = Mix(Seed() ^ Mix(block.num_launches++)) | 1;
  const int num_threads = static_cast<int>(threads.x * threads.y * threads.z);
  if (num_threads != block.num_threads || blockDim.x != threads.x || blockDim.y != threads.y) {
    block.num_threads = num_threads;
    for (int t = 0; t < num_threads; ++t) {
      const unsigned index = static_cast<unsigned>(t);
      block.indices[t] = {index % threads.x, index / threads.x % threads.y, index / threads.x / threads.y};
    }
  }
  blockDim = {threads.x, threads.y, threads.z};
  gridDim = {grid.x, grid.y, grid.z};
  running.shared_begin = reinterpret_cast<uintptr_t>(block.shared);
  running.shared_bytes = shared_bytes;
  running.shared_limit = shared_limit;
  CheckStartKernel();
  // A random walk through all blocks: step and number of blocks have no common divisor.
  const uint64_t num_blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  uint64_t step = 1 + Random(static_cast<uint32_t>(std::min<uint64_t>(num_blocks, 0xffffffffu)));
  while (std::gcd(step, num_blocks) != 1) ++step;
  uint64_t at = Random(static_cast<uint32_t>(std::min<uint64_t>(num_blocks, 0xffffffffu)));
  for (uint64_t i = 0; i < num_blocks; ++i) {
    blockIdx = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                static_cast<unsigned>(at / grid.x / grid.y)};
    // Poison: values of an earlier block are no values.
    std::memset(block.shared, 0xff, shared_bytes);
    RunBlock();
    at = (at + step) % num_blocks;
  }
}

std::string ThreadName(int thread) {
  const uint3& index = block.indices[thread];
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

std::string CurrentThread() {
  if (!in_kernel) return "";
  return "kernel " + NameOfCode(block.call->function()) + "\n  block (" + std::to_string(blockIdx.x) + "," +
         std::to_string(blockIdx.y) + "," + std::to_string(blockIdx.z) + "), thread " + ThreadName(running.thread) + ", seed " +
         std::to_string(Seed());
}

// ---- Barriers ----

int Barrier(BarrierKind kind, int predicate, int line) {
  const int self = running.thread;
  if (block.num_finished > 0)
    Violation("a barrier (line " + std::to_string(line) + ") after other threads of the block have returned");
  if (block.num_at_barrier == 0) {
    block.barrier_line = line;
    block.barrier_kind = kind;
    block.barrier_sum = 0;
  } else if (block.barrier_line != line || block.barrier_kind != kind) {
    Violation("divergent barriers: the thread came to the one of line " + std::to_string(line) + WaitingThreads());
  }
  ++block.num_at_barrier;
  block.num_sleeps = 0;
  block.barrier_sum += predicate != 0;
  if (block.num_at_barrier < block.num_threads) {
    block.threads[self].state = State::kAtBarrier;
    block.threads[self].line = line;
    SwitchAway();
    return block.barrier_result;
  }
  switch (kind) {
    case BarrierKind::kPlain:
      block.barrier_result = 0;
      break;
    case BarrierKind::kCount:
      block.barrier_result = block.barrier_sum;
      break;
    case BarrierKind::kAnd:
      block.barrier_result = block.barrier_sum == block.num_threads;
      break;
    case BarrierKind::kOr:
      block.barrier_result = block.barrier_sum > 0;
      break;
  }
  block.num_at_barrier = 0;
  CheckBarrier();
  // Also the last to come may be overtaken from here on. Nobody reads barrier_result late: the next barrier needs all threads.
  for (int t = 0; t < block.num_threads; ++t) MakeRunnable(t);
  SwitchAway();
  return block.barrier_result;
}

void Sleep() {
  if (block.num_sleeps++ == 0) block.sleeping_since = std::chrono::steady_clock::now();
  if (block.num_sleeps > 2 * block.num_runnable) {
    // Every thread that can run sleeps: only the host can end this.
    if (std::chrono::duration<double>(std::chrono::steady_clock::now() - block.sleeping_since).count() > spin_limit.load()) {
      Violation("the block spins: nothing has changed for " + std::to_string(spin_limit.load()) + " seconds");
    }
    std::this_thread::yield();
  }
  // Below all others, which therefore run first even when the newest is preferred.
  std::memmove(block.runnable + 1, block.runnable, static_cast<size_t>(block.num_runnable) * sizeof(block.runnable[0]));
  block.runnable[0] = static_cast<uint16_t>(running.thread);
  ++block.num_runnable;
  SwitchAway();
}

void Trap(int line) { Violation("__trap() of line " + std::to_string(line)); }

// ---- Warps ----

int LaneOfThread() { return running.thread % kWarpLanes; }

const char* WarpOperationName(WarpOperation operation) {
  switch (operation) {
    case WarpOperation::kSync:
      return "__syncwarp";
    case WarpOperation::kShuffle:
      return "__shfl_sync";
    case WarpOperation::kBallot:
      return "__ballot_sync";
    case WarpOperation::kAny:
      return "__any_sync";
    case WarpOperation::kAll:
      return "__all_sync";
    case WarpOperation::kMatchAny:
      return "__match_any_sync";
    case WarpOperation::kLoadMatrix:
      return "LdMatrix";
    case WarpOperation::kMmaBf16:
      return "MmaBf16";
    case WarpOperation::kMmaTf32:
      return "MmaTf32";
    default:
      return "__reduce_sync";
  }
}

namespace {

float Bf16(uint32_t pair, int half) { return std::bit_cast<float>(half == 0 ? pair << 16 : pair & 0xffff0000u); }
float Tf32(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }

// The fragments of the PTX manual for mma.m16n8k16 and mma.m16n8k8: lane l holds row l / 4 (and that plus 8) and, of each group
// of eight columns of b16 or four of b32, the pair or the one at l % 4. `kHalves` values a register.
template <int kDepth, int kHalves>
void ComputeMma(Thread* lanes) {
  float a[16][kDepth], b[kDepth][8];
  for (int l = 0; l < kWarpLanes; ++l) {
    const int row = l / 4, column = l % 4 * kHalves;
    for (int r = 0; r < 4; ++r) {
      for (int h = 0; h < kHalves; ++h) {
        a[row + r % 2 * 8][column + h + r / 2 * 4 * kHalves] = kHalves == 2 ? Bf16(lanes[l].a[r], h) : Tf32(lanes[l].a[r]);
      }
    }
    for (int r = 0; r < 2; ++r) {
      for (int h = 0; h < kHalves; ++h) {
        b[column + h + r * 4 * kHalves][row] = kHalves == 2 ? Bf16(lanes[l].b[r], h) : Tf32(lanes[l].b[r]);
      }
    }
  }
  float sums[16][8];
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) sums[m][n] = 0.0f;
    for (int k = 0; k < kDepth; ++k) {
      for (int n = 0; n < 8; ++n) sums[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int l = 0; l < kWarpLanes; ++l) {
    for (int r = 0; r < 4; ++r) lanes[l].d[r] += sums[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2];
  }
}

// Lane l receives of matrix m the pair at row l / 4, columns 2 * (l % 4) and the next; of the transposed matrix with `transpose`.
void ComputeLoadMatrix(Thread* lanes, int matrices, bool transpose) {
  uint16_t values[4][8][8];
  for (int m = 0; m < matrices; ++m) {
    for (int row = 0; row < 8; ++row) std::memcpy(values[m][row], lanes[m * 8 + row].row, 16);
  }
  for (int l = 0; l < kWarpLanes; ++l) {
    for (int m = 0; m < matrices; ++m) {
      const int i = l / 4, j = l % 4 * 2;
      const uint32_t low = transpose ? values[m][j][i] : values[m][i][j];
      const uint32_t high = transpose ? values[m][j + 1][i] : values[m][i][j + 1];
      lanes[l].registers[m] = low | high << 16;
    }
  }
}

uint64_t Reduce(WarpOperation operation, const Thread* lanes, uint32_t mask) {
  const uint32_t first = static_cast<uint32_t>(lanes[std::countr_zero(mask)].value);
  uint32_t result = first;
  for (uint32_t rest = mask & (mask - 1); rest != 0; rest &= rest - 1) {
    const uint32_t value = static_cast<uint32_t>(lanes[std::countr_zero(rest)].value);
    const int32_t signed_value = static_cast<int32_t>(value), signed_result = static_cast<int32_t>(result);
    switch (operation) {
      case WarpOperation::kAddUnsigned:
        result += value;
        break;
      case WarpOperation::kMinUnsigned:
        result = std::min(result, value);
        break;
      case WarpOperation::kMaxUnsigned:
        result = std::max(result, value);
        break;
      case WarpOperation::kMinSigned:
        result = static_cast<uint32_t>(std::min(signed_result, signed_value));
        break;
      case WarpOperation::kMaxSigned:
        result = static_cast<uint32_t>(std::max(signed_result, signed_value));
        break;
      case WarpOperation::kAndBits:
        result &= value;
        break;
      case WarpOperation::kOrBits:
        result |= value;
        break;
      default:
        result ^= value;
        break;
    }
  }
  return result;
}

void Complete(WarpOperation operation, int warp, uint32_t mask) {
  Thread* const lanes = block.threads + warp * kWarpLanes;
  const auto each_lane = [mask](auto&& action) {
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) action(std::countr_zero(rest));
  };
  switch (operation) {
    case WarpOperation::kSync:
      CheckSyncWarp(warp, mask);
      break;
    case WarpOperation::kShuffle:
      each_lane([&](int lane) {
        const int source = lanes[lane].source;
        if (source < 0 || source >= kWarpLanes || (mask >> source & 1u) == 0) {
          Violation("__shfl_sync of line " + std::to_string(lanes[lane].line) + ": lane " + std::to_string(lane) +
                    " reads lane " + std::to_string(source) + ", which is not in the mask " + Hex(uintptr_t{mask}));
        }
        lanes[lane].result = lanes[source].value;
      });
      break;
    case WarpOperation::kBallot:
    case WarpOperation::kAny:
    case WarpOperation::kAll: {
      uint32_t votes = 0;
      each_lane([&](int lane) { votes |= static_cast<uint32_t>(lanes[lane].value) << lane; });
      const uint64_t result = operation == WarpOperation::kBallot ? votes
                              : operation == WarpOperation::kAny  ? votes != 0
                                                                  : votes == mask;
      each_lane([&](int lane) { lanes[lane].result = result; });
      break;
    }
    case WarpOperation::kMatchAny:
      each_lane([&](int lane) {
        uint32_t same = 0;
        each_lane([&](int other) { same |= static_cast<uint32_t>(lanes[other].value == lanes[lane].value) << other; });
        lanes[lane].result = same;
      });
      break;
    case WarpOperation::kLoadMatrix:
      ComputeLoadMatrix(lanes, static_cast<int>(lanes[0].value & 0xf), (lanes[0].value & 0x10) != 0);
      break;
    case WarpOperation::kMmaBf16:
      ComputeMma<16, 2>(lanes);
      break;
    case WarpOperation::kMmaTf32:
      ComputeMma<8, 1>(lanes);
      break;
    default: {
      const uint64_t result = Reduce(operation, lanes, mask);
      each_lane([&](int lane) { lanes[lane].result = result; });
    }
  }
}

}  // namespace

uint64_t MeetWarp(WarpOperation operation, uint32_t mask, int line, uint64_t value, int source) {
  const int self = running.thread;
  const int warp_index = self / kWarpLanes;
  Thread& thread = block.threads[self];
  Warp& warp = block.warps[warp_index];
  const uint32_t bit = 1u << (self % kWarpLanes);
  const auto complaint = [&](const char* what) {
    Violation(std::string(WarpOperationName(operation)) + " of line " + std::to_string(line) + " with mask " +
              Hex(uintptr_t{mask}) + ": " + what + WaitingThreads());
  };
  if ((mask & bit) == 0) complaint("the lane is not in its own mask");
  if ((mask & ~warp.lanes) != 0) complaint("the mask names lanes that the block does not have");
  if ((mask & warp.exited) != 0) complaint("the mask names lanes that have returned");
  Meeting* meeting = nullptr;
  for (int m = 0; m < warp.num_meetings; ++m) {
    Meeting& other = warp.meetings[m];
    if (other.mask == mask) meeting = &other;
    // Lanes of the mask may be in a meeting that will end without this one; not in one that waits for it.
    if (other.mask != mask && (other.mask & bit) != 0 && (other.arrived & mask) != 0)
      complaint("lanes of the mask wait in another operation");
  }
  if (meeting == nullptr) {
    meeting = &warp.meetings[warp.num_meetings++];
    *meeting = {.mask = mask, .arrived = 0, .line = line, .operation = operation};
  } else if (meeting->operation != operation || meeting->line != line) {
    complaint("lanes of the mask wait in another operation");
  }
  thread.operation = operation;
  thread.mask = mask;
  thread.line = line;
  thread.value = value;
  thread.source = source;
  meeting->arrived |= bit;
  block.num_sleeps = 0;
  if (meeting->arrived != mask) {
    thread.state = State::kInWarp;
    SwitchAway();
    return thread.result;
  }
  Complete(operation, warp_index, mask);
  *meeting = warp.meetings[--warp.num_meetings];
  for (uint32_t rest = mask & ~bit; rest != 0; rest &= rest - 1) MakeRunnable(warp_index * kWarpLanes + std::countr_zero(rest));
  return thread.result;
}

void LoadMatrix(uint32_t* registers, int matrices, bool transpose, const void* row, int line) {
  Thread& thread = block.threads[running.thread];
  thread.registers = registers;
  thread.row = row;
  if (LaneOfThread() < matrices * 8) {
    CheckAligned(row, 16, "ldmatrix");
    CheckShared(row, "ldmatrix");
    CheckAccess(row, 16, Access::kRead);
  }
  MeetWarp(WarpOperation::kLoadMatrix, kAllLanes, line, static_cast<uint64_t>(matrices) | (transpose ? 0x10u : 0u));
}

void MultiplyAdd(WarpOperation operation, float* d, const uint32_t* a, const uint32_t* b, int line) {
  Thread& thread = block.threads[running.thread];
  thread.d = d;
  thread.a = a;
  thread.b = b;
  MeetWarp(operation, kAllLanes, line);
}

// ---- Shared memory and asynchronous copies ----

void* DynamicShared() { return block.shared; }

void CopyAsync16(void* shared, const void* global, bool valid) {
  Thread& thread = block.threads[running.thread];
  CheckAligned(shared, 16, "the destination of CpAsync16");
  CheckShared(shared, "the destination of CpAsync16");
  if (valid) {
    CheckAligned(global, 16, "the source of CpAsync16");
    CheckGlobal(global, "the source of CpAsync16");
    CheckAccess(global, 16, Access::kRead);
  }
  CheckCopyStart(shared);
  thread.copies.push_back({.shared = shared, .global = global, .valid = valid, .group = thread.num_commits});
}

void CommitCopies() { ++block.threads[running.thread].num_commits; }

void WaitCopies(int pending) {
  // Copies come into effect as late as they may.
  Thread& thread = block.threads[running.thread];
  const int complete = thread.num_commits - pending;
  size_t done = 0;
  for (; done < thread.copies.size() && thread.copies[done].group < complete; ++done) {
    const Copy& copy = thread.copies[done];
    if (copy.valid) {
      std::memcpy(copy.shared, copy.global, 16);
    } else {
      std::memset(copy.shared, 0, 16);
    }
    CheckCopyEnd(copy.shared);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace bebop::emulation
