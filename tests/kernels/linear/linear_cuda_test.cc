// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "kernels/linear/linear.h"
#include "kernels/linear/linear_cuda.h"
#include "tests/kernels/cuda_test_util.h"

namespace bebop {
namespace {

using testing::CudaTest;
using testing::DeviceArray;
using testing::DeviceMatrix;
using testing::kNan;
using testing::kUnit;
using testing::Random;
using testing::RoundToBFloat16;
using testing::SameBits;

struct alignas(64) Line {
  unsigned char bytes[64] = {};
};

struct Shape {
  int64_t n, k, t;
};

// Nothing is a multiple of a tile; one run and several; every tile of x rows and both its borders.
constexpr Shape kShapes[] = {{16, 8, 1},     {40, 72, 3},    {64, 64, 8},   {72, 648, 9},   {130, 1288, 16}, {200, 776, 17},
                             {48, 2056, 32}, {136, 328, 33}, {64, 576, 64}, {100, 520, 70}, {24, 64, 130},   {257, 1000, 5}};

// Weights on the device in rows, and on the host in panels.
struct Weights {
  Weights(const std::vector<float>& source, int64_t n, int64_t k, DType dtype)
      : values(dtype == DType::kFloat32 ? source : RoundToBFloat16(source)),
        device(values, n, k, dtype, 0),
        lines(static_cast<size_t>(PackedBytes(dtype, n, k) / 64)) {
    cpu::PackRows(FloatMatrix(values.data(), n, k), dtype, n, k, 0, lines.data());
    on_device = {device.View().data, dtype, n, k, MatrixLayout::kRows};
    on_host = {lines.data(), dtype, n, k};
  }
  std::vector<float> values;
  DeviceMatrix device;
  std::vector<Line> lines;
  PackedMatrix on_device, on_host;
};

std::vector<float> SmallIntegers(Random& random, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = static_cast<float>(random.Below(9) - 4);
  return values;
}

std::vector<float> Part(const std::vector<float>& rows, int64_t width, int64_t first, int64_t count) {
  return {rows.begin() + first * width, rows.begin() + (first + count) * width};
}

class LinearCudaTest : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    invariant_stream_ = MakeInvariantStream();
    plans_ = std::make_unique<cuda::LinearPlans>(&stream());
    invariant_plans_ = std::make_unique<cuda::LinearPlans>(invariant_stream_.get());
  }
  void TearDown() override {
    if (invariant_stream_ != nullptr) {
      BEBOP_CUDA_TRY(*invariant_stream_, cudaStreamSynchronize(invariant_stream_->handle()));
      EXPECT_TRUE(invariant_stream_->ok()) << invariant_stream_->error();
    }
    plans_.reset();
    invariant_plans_.reset();
    invariant_stream_.reset();
    CudaTest::TearDown();
  }
  void Enqueue(bool invariant, const LinearArgs& args) {
    invariant ? cuda::Linear(args, *invariant_plans_, *invariant_stream_) : cuda::Linear(args, *plans_, stream());
  }
  // y of x [t, k], which is rounded to the weights' type; gaps are checked.
  std::vector<float> Run(bool invariant, const std::vector<float>& x, int64_t t, const Weights& weights, DType y_dtype,
                         int64_t y_gap = 8) {
    DeviceMatrix device_x(x, t, weights.on_device.cols, weights.on_device.dtype, 16),
        y(t, weights.on_device.rows, y_dtype, y_gap);
    Enqueue(invariant, {device_x.View(), weights.on_device, y.View()});
    EXPECT_TRUE(y.GapsUntouched());
    return y.Values();
  }

  std::unique_ptr<cuda::Stream> invariant_stream_;
  std::unique_ptr<cuda::LinearPlans> plans_, invariant_plans_;
};

// Sums of small integers are exact in any order, so every product counts.
TEST_F(LinearCudaTest, SumsOfIntegersAreExact) {
  ThreadPool pool(1);
  for (const Shape& shape : kShapes) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
      SCOPED_TRACE(::testing::Message() << shape.n << " x " << shape.k << " x " << shape.t << " " << DTypeName(dtype));
      Random random(static_cast<uint64_t>(shape.n + shape.k));
      const Weights weights(SmallIntegers(random, shape.n * shape.k), shape.n, shape.k, dtype);
      std::vector<float> x = SmallIntegers(random, shape.t * shape.k), expected(static_cast<size_t>(shape.t * shape.n));
      cpu::LinearScratch scratch;
      cpu::Linear({FloatMatrix(x.data(), shape.t, shape.k), weights.on_host, FloatMatrix(expected.data(), shape.t, shape.n)},
                  scratch, pool);
      for (const bool invariant : {false, true}) {
        EXPECT_EQ(Run(invariant, x, shape.t, weights, DType::kFloat32), expected) << "invariant " << invariant;
        if (dtype == DType::kFloat32) continue;
        EXPECT_EQ(Run(invariant, x, shape.t, weights, DType::kBFloat16), RoundToBFloat16(expected)) << "invariant " << invariant;
        EXPECT_EQ(Run(invariant, x, shape.t, weights, DType::kBFloat16, 5), RoundToBFloat16(expected))
            << "odd distance of y's rows";
      }
    }
  }
}

TEST_F(LinearCudaTest, AgreesWithTheCpu) {
  ThreadPool pool(1);
  for (const Shape& shape : kShapes) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
      SCOPED_TRACE(::testing::Message() << shape.n << " x " << shape.k << " x " << shape.t << " " << DTypeName(dtype));
      Random random(static_cast<uint64_t>(shape.n * shape.k));
      const Weights weights(random.Normals(shape.n * shape.k), shape.n, shape.k, dtype);
      std::vector<float> x = random.Normals(shape.t * shape.k), expected(static_cast<size_t>(shape.t * shape.n));
      if (dtype == DType::kBFloat16) x = RoundToBFloat16(x);
      cpu::LinearScratch scratch;
      cpu::Linear({FloatMatrix(x.data(), shape.t, shape.k), weights.on_host, FloatMatrix(expected.data(), shape.t, shape.n)},
                  scratch, pool);
      // Tensor cores: docs/numerics.md. In float32 the chain has a rounding for every column on both sides.
      const double units = (dtype == DType::kBFloat16 ? 2.25 : 1.0) * static_cast<double>(shape.k) + cuda::kMaxSplits + 1 +
                           static_cast<double>(shape.k + 1);
      for (const bool invariant : {false, true}) {
        const std::vector<float> actual = Run(invariant, x, shape.t, weights, DType::kFloat32);
        for (int64_t t = 0; t < shape.t; ++t) {
          for (int64_t n = 0; n < shape.n; ++n) {
            double magnitude = 0;
            for (int64_t k = 0; k < shape.k; ++k) {
              magnitude += std::fabs(double{x[t * shape.k + k]} * weights.values[n * shape.k + k]);
            }
            ASSERT_NEAR(actual[t * shape.n + n], expected[t * shape.n + n], units * kUnit * magnitude)
                << "row " << t << " feature " << n;
          }
        }
        if (dtype == DType::kFloat32) continue;
        EXPECT_TRUE(SameBits(Run(invariant, x, shape.t, weights, DType::kBFloat16), RoundToBFloat16(actual)))
            << "one sum, rounded once";
      }
    }
  }
}

// The promise of batch-invariant mode, also of our kernel in general, and of float32 in any mode.
TEST_F(LinearCudaTest, ARowDoesNotDependOnItsBatch) {
  constexpr int64_t kMostRows = 130;
  struct Case {
    int64_t n, k;
    DType dtype;
    bool invariant;
  };
  for (const Case& test : {Case{96, 200, DType::kBFloat16, true},
                           {72, 1288, DType::kBFloat16, true},
                           {72, 1288, DType::kBFloat16, false},
                           {130, 72, DType::kFloat32, false}}) {
    SCOPED_TRACE(::testing::Message() << test.n << " x " << test.k << " " << DTypeName(test.dtype) << " invariant "
                                      << test.invariant);
    Random random(static_cast<uint64_t>(test.k));
    const Weights weights(random.Normals(test.n * test.k), test.n, test.k, test.dtype);
    std::vector<float> x = random.Normals(kMostRows * test.k);
    // The last rows, so that a row has another place in every batch.
    std::vector<float> alone;
    for (int64_t t = kMostRows - 17; t < kMostRows; ++t) {
      const std::vector<float> y = Run(test.invariant, Part(x, test.k, t, 1), 1, weights, DType::kFloat32);
      alone.insert(alone.end(), y.begin(), y.end());
    }
    for (const int64_t rows : {2, 5, 8, 9, 16, 17, 32, 33, 64, 65, 130}) {
      if (!test.invariant && test.dtype == DType::kBFloat16 && rows > cuda::kMaxStreamRows) break;
      const std::vector<float> y = Run(test.invariant, Part(x, test.k, kMostRows - rows, rows), rows, weights, DType::kFloat32);
      const int64_t common = std::min<int64_t>(rows, 17);
      EXPECT_TRUE(SameBits(&y[(rows - common) * test.n], &alone[(17 - common) * test.n], common * test.n)) << rows << " rows";
    }
    // A NaN stays in its row.
    for (const int64_t rows : {5, 12, 32, 130}) {
      if (!test.invariant && test.dtype == DType::kBFloat16 && rows > cuda::kMaxStreamRows) break;
      std::vector<float> poisoned = Part(x, test.k, kMostRows - rows, rows);
      poisoned[(rows - 3) * test.k + 1] = kNan;
      const std::vector<float> y = Run(test.invariant, poisoned, rows, weights, DType::kFloat32);
      for (int64_t t = rows - 5; t < rows; ++t) {
        for (int64_t n = 0; n < test.n; ++n) {
          const float value = y[t * test.n + n];
          ASSERT_TRUE(t == rows - 3 ? std::isnan(value) : value == alone[(17 - rows + t) * test.n + n])
              << "row " << t << " of " << rows;
        }
      }
    }
  }
}

// Columns of a wider matrix, as the network passes them.
TEST_F(LinearCudaTest, XAndYMayBeColumns) {
  constexpr int64_t kN = 40, kK = 72, kWide = 200;
  Random random(8);
  const Weights weights(SmallIntegers(random, kN * kK), kN, kK, DType::kBFloat16);
  for (const int64_t rows : {3, 40}) {
    const std::vector<float> x = SmallIntegers(random, rows * kWide);
    std::vector<float> y_before = SmallIntegers(random, rows * kWide);
    DeviceMatrix wide_x(x, rows, kWide, DType::kBFloat16), wide_y(y_before, rows, kWide, DType::kBFloat16);
    Enqueue(false, {wide_x.View().Columns(104, kK), weights.on_device, wide_y.View().Columns(16, kN)});
    std::vector<float> expected = RoundToBFloat16(y_before);
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t n = 0; n < kN; ++n) {
        float sum = 0;
        for (int64_t k = 0; k < kK; ++k) sum += x[t * kWide + 104 + k] * weights.values[n * kK + k];
        expected[t * kWide + 16 + n] = sum;
      }
    }
    EXPECT_EQ(wide_y.Values(), RoundToBFloat16(expected)) << rows;
    EXPECT_TRUE(wide_y.GapsUntouched());
  }
}

// Once a shape has been used, a product can be captured; a replay reads what x holds then, and the arrival counters are back at
// zero.
TEST_F(LinearCudaTest, CanBeCapturedAndReplayed) {
  constexpr int64_t kN = 72, kK = 1288;
  Random random(9);
  const Weights weights(SmallIntegers(random, kN * kK), kN, kK, DType::kBFloat16);
  ASSERT_GT(cuda::SplitsOf(kN, kK).count, 1);
  for (const int64_t rows : {3, 48}) {
    DeviceMatrix x(SmallIntegers(random, rows * kK), rows, kK, DType::kBFloat16), y(rows, kN, DType::kFloat32);
    const LinearArgs args = {x.View(), weights.on_device, y.View()};
    Enqueue(false, args);
    ASSERT_EQ(cudaStreamSynchronize(stream().handle()), cudaSuccess);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    ASSERT_EQ(cudaStreamBeginCapture(stream().handle(), cudaStreamCaptureModeThreadLocal), cudaSuccess);
    Enqueue(false, args);
    ASSERT_EQ(cudaStreamEndCapture(stream().handle(), &graph), cudaSuccess);
    ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
    for (int replay = 0; replay < 3; ++replay) {
      const std::vector<float> values = SmallIntegers(random, rows * kK);
      x.Upload(values);
      ASSERT_EQ(cudaGraphLaunch(executable, stream().handle()), cudaSuccess);
      const std::vector<float> actual = y.Values();
      EXPECT_EQ(actual, Run(false, values, rows, weights, DType::kFloat32)) << rows << " rows, replay " << replay;
    }
    EXPECT_EQ(cudaGraphExecDestroy(executable), cudaSuccess);
    EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  }
}

TEST_F(LinearCudaTest, NoRowsAreNoWork) {
  const Weights weights(std::vector<float>(16 * 8, 1.0f), 16, 8, DType::kBFloat16);
  Enqueue(false, {{nullptr, DType::kBFloat16, 0, 8, 8}, weights.on_device, {nullptr, DType::kFloat32, 0, 16, 16}});
}

// Chunks of any number of lengths leave a bounded number of plans; a product whose plan was dropped comes out as before.
TEST_F(LinearCudaTest, PlansAreBounded) {
  constexpr int64_t kN = 8, kK = 8, kLengths = cuda::LinearPlans::kMaxPlans + 8;
  Random random(13);
  const Weights weights(SmallIntegers(random, kN * kK), kN, kK, DType::kBFloat16);
  const int64_t most_rows = cuda::kMaxStreamRows + kLengths;
  const std::vector<float> values = SmallIntegers(random, most_rows * kK);
  const std::vector<float> expected = Run(true, values, most_rows, weights, DType::kFloat32);  // our own kernel
  DeviceMatrix x(values, most_rows, kK, DType::kBFloat16), y(most_rows, kN, DType::kFloat32);
  cuda::LinearPlans plans(&stream());
  const auto multiply = [&](int64_t rows) {
    TensorView few_x = x.View(), few_y = y.View();
    few_x.rows = few_y.rows = rows;
    cuda::Linear({few_x, weights.on_device, few_y}, plans, stream());
    ASSERT_TRUE(stream().ok()) << stream().error();
  };
  for (int64_t i = 1; i <= kLengths; ++i) {
    multiply(cuda::kMaxStreamRows + i);
    multiply(cuda::kMaxStreamRows + 1);  // in use all the time
    ASSERT_EQ(plans.num_plans(), std::min(i, cuda::LinearPlans::kMaxPlans)) << i;
  }
  EXPECT_EQ(y.Values(), expected);
  multiply(cuda::kMaxStreamRows + kLengths);
  multiply(cuda::kMaxStreamRows + 2);  // was the first to go
  EXPECT_EQ(plans.num_plans(), cuda::LinearPlans::kMaxPlans);
  EXPECT_EQ(y.Values(), expected);
}

// After the first failure nothing more is enqueued, and its words stay.
TEST_F(LinearCudaTest, AFailedStreamTakesNoWork) {
  cuda::Stream failed(cuda::StreamOptions{.workspace_bytes = 1 << 20});
  cuda::LinearPlans plans(&failed);
  const Weights weights(std::vector<float>(16 * 8, 1.0f), 16, 8, DType::kBFloat16);
  failed.Fail("a failure before");
  for (const int64_t rows : {1, 40}) {
    DeviceMatrix x(std::vector<float>(static_cast<size_t>(rows * 8), 1.0f), rows, 8, DType::kBFloat16),
        y(rows, 16, DType::kFloat32);
    cuda::Linear({x.View(), weights.on_device, y.View()}, plans, failed);
    for (const float value : y.Values()) EXPECT_TRUE(std::isnan(value)) << rows;
  }
  EXPECT_EQ(failed.error(), "a failure before");
}

// Needs no device: the runs cover K once, and the shapes of real models keep a large device busy.
TEST(LinearSplitsTest, RunsCoverTheColumns) {
  for (int64_t n = 1; n < 20000; n = n * 3 / 2 + 1) {
    for (int64_t k = 8; k < 40000; k = (k * 4 / 3 + 8) / 8 * 8) {
      const cuda::Splits splits = cuda::SplitsOf(n, k);
      ASSERT_TRUE(splits.count >= 1 && splits.count <= cuda::kMaxSplits && splits.cols % cuda::kStageCols == 0)
          << n << " x " << k;
      ASSERT_TRUE((splits.count - 1) * splits.cols < k && splits.count * splits.cols >= k) << n << " x " << k;
      const int64_t tiles = (n + cuda::kTileRows - 1) / cuda::kTileRows;
      ASSERT_TRUE(splits.count == 1 || tiles <= cuda::kNumCounters) << n << " x " << k;
      if (k >= 64 * cuda::kMinSplitCols && tiles >= 8) {
        ASSERT_GE(tiles * splits.count, 132) << n << " x " << k;
      }
    }
  }
}

}  // namespace
}  // namespace bebop
