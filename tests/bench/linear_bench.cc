// SPDX-License-Identifier: Apache-2.0
// The linear kernel on matrices of a 0.8B Qwen3.5 (H 1024, F 3584, V 248320) against what the machine's memory can deliver.
//
//   linear_bench                                   everything
//   linear_bench --benchmark_filter=Decode/bf16    decode shapes
//
// All weights together are about 1.2 GB in bf16, far more than any cache, and a pass reads each once, as a decode step does. Every
// decode entry measures the plain read bandwidth in turn with the passes, so that `of_read` (its share of that bandwidth) compares
// like with like on a machine whose speed changes under other load. Where other programs take processor time as well, see the
// counters per second of processor time: core_GB/s and core_GFLOP/s (all threads' time together), of_read_cpu.
#include <benchmark/benchmark.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/linear/linear.h"

namespace bebop {
namespace {

// Processor time of all threads so far.
double CpuNow() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Pages of the largest size that the system gives, as the engine's weights have.
class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_(static_cast<size_t>(RoundUp(bytes, 2 << 20))) {
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    BEBOP_CHECK(data_ != MAP_FAILED);
    madvise(data_, bytes_, MADV_HUGEPAGE);
    std::memset(data_, 0, bytes_);
  }
  ~Memory() { munmap(data_, bytes_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  size_t bytes_;
  void* data_ = nullptr;
};

int NumThreads() { return static_cast<int>(std::max(1u, std::thread::hardware_concurrency())); }

struct Shape {
  const char* name;
  int64_t rows, cols;
};
constexpr int64_t kHidden = 1024, kFfn = 3584, kVocab = 248320;
// One layer's products with linear attention; lm_head.
constexpr Shape kLayerShapes[] = {
    {"in", 6144 + 2048 + 32, kHidden}, {"out", kHidden, 2048}, {"gate_up", 2 * kFfn, kHidden}, {"down", kHidden, kFfn}};
constexpr Shape kHeadShape = {"lm_head", kVocab, kHidden};
constexpr int kLayers = 16;

// The weights: 16 layers (0.69 GB in bf16) and lm_head (0.51 GB), with small values that keep every sum finite.
struct Network {
  explicit Network(DType dtype) : memory(Bytes(dtype)) {
    char* next = memory.data();
    const auto add = [&](const Shape& shape) {
      matrices.push_back({next, dtype, shape.rows, shape.cols});
      next += PackedBytes(dtype, shape.rows, shape.cols);
    };
    for (int layer = 0; layer < kLayers; ++layer) {
      for (const Shape& shape : kLayerShapes) add(shape);
    }
    layer_bytes = next - memory.data();
    add(kHeadShape);
    total_bytes = next - memory.data();
    uint32_t state = 1;
    const auto value = [&] { return static_cast<float>((state = state * 1664525u + 1013904223u) >> 16) * 0x1.0p-22f - 0x1.0p-7f; };
    for (int64_t i = 0; i < total_bytes / ElementBytes(dtype); ++i) {
      if (dtype == DType::kBFloat16) {
        reinterpret_cast<BFloat16*>(memory.data())[i] = ToBFloat16(value());
      } else {
        reinterpret_cast<float*>(memory.data())[i] = value();
      }
    }
  }
  static int64_t Bytes(DType dtype) {
    int64_t bytes = 0;
    for (const Shape& shape : kLayerShapes) bytes += kLayers * PackedBytes(dtype, shape.rows, shape.cols);
    return bytes + PackedBytes(dtype, kHeadShape.rows, kHeadShape.cols);
  }

  Memory memory;
  std::vector<PackedMatrix> matrices;
  int64_t layer_bytes = 0, total_bytes = 0;
};

// Kept between the entries of one dtype; only one at a time is in memory.
const Network& GetNetwork(DType dtype) {
  static std::unique_ptr<Network> network;
  if (network == nullptr || network->matrices[0].dtype != dtype) {
    network.reset();
    network = std::make_unique<Network>(dtype);
  }
  return *network;
}

// Activations for up to `rows` rows.
struct Activations {
  explicit Activations(int64_t rows)
      : x(static_cast<size_t>(rows * kFfn), 0.5f), y(rows * kVocab * 4), pool(NumThreads()) {
    scratch.Reserve(rows, kFfn);
  }
  void Run(cpu::InstructionSet set, const PackedMatrix& w, int64_t rows) {
    LinearArgs args;
    args.x = FloatMatrix(x.data(), rows, w.cols);
    args.w = w;
    args.y = FloatMatrix(reinterpret_cast<float*>(y.data()), rows, w.rows);
    cpu::LinearWith(set, args, scratch, pool);
  }
  std::vector<float> x;
  Memory y;
  cpu::LinearScratch scratch;
  ThreadPool pool;
};

// Reads `bytes` with all threads, each a share of its own from front to back. Vectors of 64 bytes of the compiler's, prefetched
// ahead: the fastest of the ways to read that we tried.
using Vector = uint64_t __attribute__((vector_size(64)));
#if defined(__x86_64__)
__attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#endif
uint64_t ReadRange(const char* data, int64_t bytes, int64_t prefetch) {
  Vector sum[4] = {};
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
    for (int64_t line = 0; line < 4; ++line) {
      if (prefetch > 0) __builtin_prefetch(data + i + line * 64 + prefetch);
      sum[line] ^= *reinterpret_cast<const Vector*>(data + i + line * 64);
    }
  }
  const Vector all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
  return all[0] ^ all[1] ^ all[2] ^ all[3] ^ all[4] ^ all[5] ^ all[6] ^ all[7];
}

// Bytes per second of reading [data, data + bytes) once.
double ReadBandwidth(const char* data, int64_t bytes, int64_t prefetch, ThreadPool& pool) {
  const double start = Now();
  pool.ParallelFor(bytes, 4096, [&](int64_t begin, int64_t end) {
    benchmark::DoNotOptimize(ReadRange(data + begin, end - begin, prefetch));
  });
  return static_cast<double>(bytes) / (Now() - start);
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values.empty() ? 0.0 : values[values.size() / 2];
}

void BM_Read(benchmark::State& state) {
  const Network& network = GetNetwork(DType::kBFloat16);
  ThreadPool pool(static_cast<int>(state.range(1)));
  std::vector<double> bandwidth;
  for (auto _ : state) {
    bandwidth.push_back(ReadBandwidth(network.memory.data(), network.total_bytes, state.range(0), pool));
  }
  state.counters["GB/s"] = Median(bandwidth) * 1e-9;
  state.counters["best_GB/s"] = *std::max_element(bandwidth.begin(), bandwidth.end()) * 1e-9;
}

// One pass over all weights with `rows` rows, as a decode step makes; in turn with a plain read of the same bytes.
void BM_Decode(benchmark::State& state, cpu::InstructionSet set, DType dtype, bool layers, bool head) {
  const int64_t rows = state.range(0);
  const Network& network = GetNetwork(dtype);
  Activations activations(rows);
  std::vector<double> bandwidth, read, share, core_bandwidth, cpu_share;
  for (auto _ : state) {
    const double read_cpu_start = CpuNow();
    // The better of two ways to read: which one that is depends on the processor's own prefetchers.
    read.push_back(std::max(ReadBandwidth(network.memory.data(), network.total_bytes, 0, activations.pool),
                            ReadBandwidth(network.memory.data(), network.total_bytes, 2048, activations.pool)));
    int64_t bytes = 0;
    const double cpu_start = CpuNow(), start = Now();
    for (const PackedMatrix& w : network.matrices) {
      if (!(w.rows == kVocab ? head : layers)) continue;
      activations.Run(set, w, rows);
      bytes += PackedBytes(dtype, w.rows, w.cols);
    }
    const double seconds = Now() - start;
    state.SetIterationTime(seconds);
    bandwidth.push_back(static_cast<double>(bytes) / seconds);
    share.push_back(bandwidth.back() / read.back());
    core_bandwidth.push_back(static_cast<double>(bytes) / (CpuNow() - cpu_start));
    cpu_share.push_back(core_bandwidth.back() / (2.0 * static_cast<double>(network.total_bytes) / (cpu_start - read_cpu_start)));
  }
  state.counters["GB/s"] = Median(bandwidth) * 1e-9;
  state.counters["read_GB/s"] = Median(read) * 1e-9;
  state.counters["of_read"] = Median(share);
  state.counters["core_GB/s"] = Median(core_bandwidth) * 1e-9;
  state.counters["of_read_cpu"] = Median(cpu_share);
}

// Prompt rows through one layer's matrices.
void BM_Prefill(benchmark::State& state, cpu::InstructionSet set, DType dtype) {
  const int64_t rows = state.range(0);
  const Network& network = GetNetwork(dtype);
  Activations activations(rows);
  std::vector<double> rate, core_rate;
  for (auto _ : state) {
    double flops = 0;
    const double cpu_start = CpuNow(), start = Now();
    for (size_t i = 0; i < std::size(kLayerShapes); ++i) {
      const PackedMatrix& w = network.matrices[i];
      activations.Run(set, w, rows);
      flops += 2.0 * static_cast<double>(w.rows * w.cols * rows);
    }
    const double seconds = Now() - start;
    state.SetIterationTime(seconds);
    rate.push_back(flops / seconds);
    core_rate.push_back(flops / (CpuNow() - cpu_start));
  }
  state.counters["GFLOP/s"] = Median(rate) * 1e-9;
  state.counters["core_GFLOP/s"] = Median(core_rate) * 1e-9;
  state.counters["best_GFLOP/s"] = *std::max_element(rate.begin(), rate.end()) * 1e-9;
}

void Register() {
  for (int threads : {1, NumThreads()}) {
    for (int64_t prefetch : {0, 1024, 2048, 4096}) {
      benchmark::RegisterBenchmark("Read/prefetch/threads", BM_Read)->Args({prefetch, threads})->Iterations(5)->UseRealTime();
    }
  }
  for (DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (int i = static_cast<int>(cpu::DetectInstructionSet()); i >= 0; --i) {
      const auto set = static_cast<cpu::InstructionSet>(i);
      const std::string suffix = std::string("/") + DTypeName(dtype) + "/" + cpu::InstructionSetName(set);
      for (int64_t rows : {1, 2, 4, 8, 16}) {
        for (const auto& [name, layers, head] : {std::tuple{"step", true, true}, {"layers", true, false}, {"lm_head", false, true}}) {
          benchmark::RegisterBenchmark(("Decode" + suffix + "/" + name).c_str(), BM_Decode, set, dtype, layers, head)
              ->Arg(rows)->Iterations(9)->UseManualTime()->Unit(benchmark::kMillisecond);
        }
      }
      for (int64_t rows : {17, 32, 64, 128, 512}) {
        benchmark::RegisterBenchmark(("Prefill" + suffix).c_str(), BM_Prefill, set, dtype)
            ->Arg(rows)->Iterations(9)->UseManualTime()->Unit(benchmark::kMillisecond);
      }
    }
  }
}

}  // namespace
}  // namespace bebop

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  bebop::Register();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
