// SPDX-License-Identifier: Apache-2.0
#include "kernels/linear/linear.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace bebop::cpu {
namespace {

struct alignas(64) Line {
  unsigned char bytes[64] = {};
};

// A packed matrix with its values as the kernels see them.
struct Weights {
  Weights(DType dtype, int64_t rows, int64_t cols, const std::vector<float>& source)
      : lines(static_cast<size_t>(PackedBytes(dtype, rows, cols) / 64)), values(source) {
    PackRows(FloatMatrix(values.data(), rows, cols), dtype, rows, cols, 0, lines.data());
    if (dtype == DType::kBFloat16) {
      for (float& value : values) value = ToFloat(ToBFloat16(value));
    }
    matrix = {lines.data(), dtype, rows, cols};
  }
  std::vector<Line> lines;
  std::vector<float> values;
  PackedMatrix matrix;
};

std::vector<float> RandomFloats(int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

std::vector<float> RunLinear(InstructionSet set, const std::vector<float>& x, int64_t rows, const PackedMatrix& w, ThreadPool& pool) {
  std::vector<float> y(static_cast<size_t>(rows * w.rows), std::numeric_limits<float>::quiet_NaN());
  LinearScratch scratch;
  LinearArgs args;
  args.x = FloatMatrix(const_cast<float*>(x.data()), rows, w.cols);
  args.w = w;
  args.y = FloatMatrix(y.data(), rows, w.rows);
  LinearWith(set, args, scratch, pool);
  return y;
}

struct Kernel {
  InstructionSet set;
  DType dtype;
};

// Every kernel that this processor can run.
std::vector<Kernel> Kernels() {
  std::vector<Kernel> kernels;
  for (int set = 0; set <= static_cast<int>(DetectInstructionSet()); ++set) {
    for (DType dtype : {DType::kFloat32, DType::kBFloat16}) kernels.push_back({static_cast<InstructionSet>(set), dtype});
  }
  return kernels;
}

class LinearTest : public testing::TestWithParam<Kernel> {
 protected:
  const InstructionSet set_ = GetParam().set;
  const DType dtype_ = GetParam().dtype;
};

INSTANTIATE_TEST_SUITE_P(AllKernels, LinearTest, testing::ValuesIn(Kernels()), [](const auto& info) {
  return std::string(InstructionSetName(info.param.set)) + "_" + DTypeName(info.param.dtype);
});

// Against a double sum. A chain of n roundings of relative size u = 2^-24 errs by at most n u / (1 - n u) of sum |x| |w|. A product
// and a sum are at most two roundings, so K columns make at most K + 1 on the way of any product (docs/numerics.md); the flushed
// denormals of vdpbf16ps add at most 2^-126 for each operation.
TEST_P(LinearTest, AgreesWithADoubleSum) {
  ThreadPool pool(2);
  struct Shape {
    int64_t rows, n, k;
  };
  for (const Shape& shape : {Shape{1, 1, 1}, {1, 16, 32}, {2, 17, 5}, {3, 15, 31}, {4, 48, 33}, {5, 100, 64}, {6, 33, 127},
                             {7, 65, 70}, {8, 16, 257}, {9, 80, 96}, {11, 31, 40}, {13, 129, 65}, {15, 50, 200}, {16, 96, 1000},
                             {17, 83, 77}, {29, 130, 129}, {64, 64, 64}, {100, 61, 333}, {7, 40, 4500}, {19, 72, 4500}}) {
    SCOPED_TRACE(std::to_string(shape.rows) + " x " + std::to_string(shape.n) + " x " + std::to_string(shape.k));
    const std::vector<float> x = RandomFloats(shape.rows * shape.k, 11);
    const Weights weights(dtype_, shape.n, shape.k, RandomFloats(shape.n * shape.k, 12));
    const std::vector<float> y = RunLinear(set_, x, shape.rows, weights.matrix, pool);
    const double roundings = static_cast<double>(shape.k + 1) * 0x1.0p-24;
    const double bound = roundings / (1.0 - roundings);
    for (int64_t t = 0; t < shape.rows; ++t) {
      for (int64_t n = 0; n < shape.n; ++n) {
        double sum = 0.0, magnitude = 0.0;
        for (int64_t k = 0; k < shape.k; ++k) {
          float value = x[static_cast<size_t>(t * shape.k + k)];
          if (dtype_ == DType::kBFloat16) value = ToFloat(ToBFloat16(value));
          const double product = static_cast<double>(value) * static_cast<double>(weights.values[static_cast<size_t>(n * shape.k + k)]);
          sum += product;
          magnitude += std::abs(product);
        }
        const double tolerance = bound * magnitude + static_cast<double>(2 * shape.k) * 0x1.0p-126;
        ASSERT_NEAR(y[static_cast<size_t>(t * shape.n + n)], sum, tolerance) << "row " << t << " feature " << n;
      }
    }
  }
}

// The promise of linear.h: a row alone and the same row in any batch, at any thread count, agree bit for bit.
TEST_P(LinearTest, ARowDoesNotDependOnItsBatchOrTheThreads) {
  constexpr int64_t kMostRows = 257;
  struct Shape {
    int64_t n, k;
  };
  // The last ones are wide enough for a group of panels to be cut into runs of columns (AVX-512; AVX2 and portable).
  for (const Shape& shape : {Shape{83, 77}, {100, 320}, {37, 9001}, {20, 17001}}) {
    SCOPED_TRACE(std::to_string(shape.n) + " x " + std::to_string(shape.k));
    const int64_t most = shape.k > 1000 ? 33 : kMostRows;
    const std::vector<float> x = RandomFloats(most * shape.k, 21);
    const Weights weights(dtype_, shape.n, shape.k, RandomFloats(shape.n * shape.k, 22));
    ThreadPool single(1);
    std::vector<float> alone;
    for (int64_t t = 0; t < most; ++t) {
      const std::vector<float> row(x.begin() + t * shape.k, x.begin() + (t + 1) * shape.k);
      const std::vector<float> y = RunLinear(set_, row, 1, weights.matrix, single);
      alone.insert(alone.end(), y.begin(), y.end());
    }
    for (int threads : {1, 2, 3}) {
      ThreadPool pool(threads);
      for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 33, 64, 257}) {
        if (rows > most) break;
        // The last rows of x rather than the first ones, so that a row has another place in each batch.
        const std::vector<float> batch(x.end() - rows * shape.k, x.end());
        const std::vector<float> y = RunLinear(set_, batch, rows, weights.matrix, pool);
        const float* expected = alone.data() + (most - rows) * shape.n;
        ASSERT_EQ(std::memcmp(y.data(), expected, y.size() * sizeof(float)), 0) << rows << " rows, " << threads << " threads";
      }
    }
  }
}

TEST_P(LinearTest, StridesAreHonouredAndNothingElseIsWritten) {
  constexpr int64_t kN = 45, kK = 70, kXStride = 91, kYStride = 59;
  constexpr float kGuard = -12345.0f;
  ThreadPool pool(2);
  const Weights weights(dtype_, kN, kK, RandomFloats(kN * kK, 31));
  for (int64_t rows : {1, 2, 7, 16, 40}) {
    const std::vector<float> dense = RandomFloats(rows * kK, 32);
    std::vector<float> x(static_cast<size_t>(rows * kXStride), std::numeric_limits<float>::quiet_NaN());
    for (int64_t t = 0; t < rows; ++t) std::copy_n(dense.begin() + t * kK, kK, x.begin() + t * kXStride);
    std::vector<float> y(static_cast<size_t>((rows + 1) * kYStride), kGuard);
    LinearScratch scratch;
    LinearArgs args;
    args.x = {x.data(), DType::kFloat32, rows, kK, kXStride};
    args.w = weights.matrix;
    args.y = {y.data(), DType::kFloat32, rows, kN, kYStride};
    LinearWith(set_, args, scratch, pool);
    const std::vector<float> expected = RunLinear(set_, dense, rows, weights.matrix, pool);
    for (int64_t t = 0; t <= rows; ++t) {
      for (int64_t n = 0; n < kYStride; ++n) {
        const float value = t < rows && n < kN ? expected[static_cast<size_t>(t * kN + n)] : kGuard;
        ASSERT_EQ(y[static_cast<size_t>(t * kYStride + n)], value) << rows << " rows: " << t << ", " << n;
      }
    }
  }
}

// With W = 1 and one column, y is what the kernel took x for.
TEST_P(LinearTest, RoundsXToBf16WithBf16WeightsOnly) {
  std::vector<float> x = {0.0f, 1.0f, -3.0f, 1.00390625f, 1.01171875f, 1.0039063f, -1.00390625f, 0.1f, 1e30f, -1e-30f, 65504.0f,
                          3.3895314e38f /* rounds to the largest bf16 */, 3.4e38f /* rounds to infinity */,
                          std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()};
  for (const float value : RandomFloats(200, 41)) x.push_back(value);
  ThreadPool pool(1);
  const Weights weights(dtype_, 1, 1, {1.0f});
  const std::vector<float> y = RunLinear(set_, x, static_cast<int64_t>(x.size()), weights.matrix, pool);
  for (size_t i = 0; i < x.size(); ++i) {
    EXPECT_EQ(y[i], dtype_ == DType::kBFloat16 ? ToFloat(ToBFloat16(x[i])) : x[i]) << x[i];
  }
  // All payloads of NaN stay NaN, also those whose upper half alone would read as infinity.
  for (const uint32_t bits : {0x7fc00000u, 0x7f800001u, 0xff80ffffu, 0x7fffffffu, 0xffffffffu}) {
    EXPECT_TRUE(std::isnan(RunLinear(set_, {std::bit_cast<float>(bits)}, 1, weights.matrix, pool)[0])) << std::hex << bits;
  }
}

TEST_P(LinearTest, AnOverflowingRowLeavesTheOthersAlone) {
  constexpr int64_t kN = 40, kK = 37;
  ThreadPool pool(2);
  const Weights weights(dtype_, kN, kK, RandomFloats(kN * kK, 51));
  for (int64_t rows : {2, 9, 16, 31}) {
    std::vector<float> x = RandomFloats(rows * kK, 52);
    const std::vector<float> clean = RunLinear(set_, x, rows, weights.matrix, pool);
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      std::vector<float> dirty = x;
      dirty[static_cast<size_t>((rows - 1) * kK + kK - 1)] = bad;  // last column: next to the padding
      const std::vector<float> y = RunLinear(set_, dirty, rows, weights.matrix, pool);
      EXPECT_EQ(std::memcmp(y.data(), clean.data(), static_cast<size_t>((rows - 1) * kN) * sizeof(float)), 0);
      for (int64_t n = 0; n < kN; ++n) EXPECT_FALSE(std::isfinite(y[static_cast<size_t>((rows - 1) * kN + n)]));
    }
  }
}

TEST(LinearScratchTest, ReserveMakesLaterCallsKeepTheBuffer) {
  constexpr int64_t kN = 20, kK = 100;
  ThreadPool pool(1);
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const Weights weights(dtype, kN, kK, RandomFloats(kN * kK, 61));
    LinearScratch scratch;
    scratch.Reserve(50, kK);
    const void* const data = scratch.data();
    const int64_t capacity = scratch.capacity();
    for (int64_t rows : {50, 1, 16, 17}) {
      std::vector<float> x = RandomFloats(rows * kK, 62), y(static_cast<size_t>(rows * kN));
      Linear({FloatMatrix(x.data(), rows, kK), weights.matrix, FloatMatrix(y.data(), rows, kN)}, scratch, pool);
      EXPECT_EQ(scratch.data(), data);
      EXPECT_EQ(scratch.capacity(), capacity);
      EXPECT_EQ(y, RunLinear(DetectInstructionSet(), x, rows, weights.matrix, pool)) << "Linear must use the detected set";
    }
  }
}

TEST(LinearEdgeTest, NoRowsAreNoWork) {
  ThreadPool pool(2);
  const Weights weights(DType::kBFloat16, 16, 32, RandomFloats(16 * 32, 71));
  EXPECT_TRUE(RunLinear(DetectInstructionSet(), {}, 0, weights.matrix, pool).empty());
}

}  // namespace
}  // namespace bebop::cpu
