// SPDX-License-Identifier: Apache-2.0
#include "kernels/linear/packed_matrix.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace bebop {
namespace {

// Aligned, zeroed bytes.
struct Storage {
  explicit Storage(int64_t bytes) : lines(static_cast<size_t>((bytes + 63) / 64)) {}
  void* data() { return lines.data(); }
  struct alignas(64) Line {
    unsigned char bytes[64] = {};
  };
  std::vector<Line> lines;
};

std::vector<float> RandomFloats(int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

std::vector<BFloat16> ToBFloat16s(const std::vector<float>& values) {
  std::vector<BFloat16> out;
  for (float value : values) out.push_back(ToBFloat16(value));
  return out;
}

bool SameBits(float a, float b) { return std::memcmp(&a, &b, sizeof(float)) == 0; }

TEST(PackedMatrixTest, BytesCoverThePadding) {
  EXPECT_EQ(PackedBytes(DType::kBFloat16, 16, 32), 1024);
  EXPECT_EQ(PackedBytes(DType::kFloat32, 16, 32), 2048);
  EXPECT_EQ(PackedBytes(DType::kBFloat16, 17, 33), 2 * 2 * 1024);
  EXPECT_EQ(PackedBytes(DType::kFloat32, 1, 1), 2048);
  EXPECT_EQ(PackedBytes(DType::kBFloat16, 0, 64), 0);
}

// The layout is a contract between packing and every instruction set's tiles: pinned here by hand.
TEST(PackedMatrixTest, LayoutIsPanelsOfSixteenRows) {
  constexpr int64_t kRows = 35, kCols = 45;  // three panels, 64 padded columns
  std::vector<float> source(kRows * kCols);
  for (int64_t i = 0; i < kRows * kCols; ++i) source[static_cast<size_t>(i)] = static_cast<float>(i % 251 + 1);  // exact in bf16
  Storage bf16(PackedBytes(DType::kBFloat16, kRows, kCols)), fp32(PackedBytes(DType::kFloat32, kRows, kCols));
  const TensorView view = FloatMatrix(source.data(), kRows, kCols);
  cpu::PackRows(view, DType::kBFloat16, kRows, kCols, 0, bf16.data());
  cpu::PackRows(view, DType::kFloat32, kRows, kCols, 0, fp32.data());
  const auto* pairs = static_cast<const BFloat16*>(bf16.data());
  const auto* floats = static_cast<const float*>(fp32.data());
  for (int64_t row = 0; row < 48; ++row) {
    for (int64_t col = 0; col < 64; ++col) {
      const float expected = row < kRows && col < kCols ? source[static_cast<size_t>(row * kCols + col)] : 0.0f;
      const int64_t panel = row / 16, in_panel = row % 16;
      EXPECT_EQ(ToFloat(pairs[panel * 16 * 64 + (col / 2) * 32 + in_panel * 2 + col % 2]), expected) << row << ", " << col;
      EXPECT_EQ(floats[panel * 16 * 64 + col * 16 + in_panel], expected) << row << ", " << col;
    }
  }
}

TEST(PackedMatrixTest, UnpackReturnsThePackedValuesExactly) {
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{1, 1}, {16, 32}, {33, 31}, {47, 300}, {70, 513}}) {
    std::vector<float> source = RandomFloats(rows * cols, 7);
    std::vector<BFloat16> source_bf16 = ToBFloat16s(source);
    const TensorView floats = FloatMatrix(source.data(), rows, cols);
    const TensorView bf16s{source_bf16.data(), DType::kBFloat16, rows, cols, cols};
    for (const TensorView& view : {floats, bf16s}) {
      for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
        Storage storage(PackedBytes(dtype, rows, cols));
        cpu::PackRows(view, dtype, rows, cols, 0, storage.data());
        const PackedMatrix matrix{storage.data(), dtype, rows, cols};
        std::vector<float> row_values(static_cast<size_t>(cols));
        for (int64_t row = 0; row < rows; ++row) {
          cpu::UnpackRow(matrix, row, row_values.data());
          for (int64_t col = 0; col < cols; ++col) {
            const auto i = static_cast<size_t>(row * cols + col);
            const bool exact = view.dtype == DType::kFloat32 && dtype == DType::kFloat32;
            const float expected = exact ? source[i] : ToFloat(source_bf16[i]);
            ASSERT_TRUE(SameBits(row_values[static_cast<size_t>(col)], expected)) << row << ", " << col;
          }
        }
      }
    }
  }
}

TEST(PackedMatrixTest, SpecialValuesSurvive) {
  std::vector<float> source = {0.0f,
                               -0.0f,
                               std::numeric_limits<float>::infinity(),
                               -std::numeric_limits<float>::infinity(),
                               std::numeric_limits<float>::quiet_NaN(),
                               std::numeric_limits<float>::denorm_min(),
                               std::numeric_limits<float>::max(),
                               1.00390625f,   // half way between two bf16: to the even one, 1.0
                               1.01171875f};  // half way: to the even one, 1.015625
  const auto cols = static_cast<int64_t>(source.size());
  Storage storage(PackedBytes(DType::kBFloat16, 1, cols));
  cpu::PackRows(FloatMatrix(source.data(), 1, cols), DType::kBFloat16, 1, cols, 0, storage.data());
  std::vector<float> out(source.size());
  cpu::UnpackRow({storage.data(), DType::kBFloat16, 1, cols}, 0, out.data());
  EXPECT_TRUE(SameBits(out[0], 0.0f));
  EXPECT_TRUE(SameBits(out[1], -0.0f));
  EXPECT_EQ(out[2], source[2]);
  EXPECT_EQ(out[3], source[3]);
  EXPECT_TRUE(std::isnan(out[4]));
  EXPECT_EQ(out[5], 0.0f);
  EXPECT_EQ(out[6], std::numeric_limits<float>::infinity());
  EXPECT_EQ(out[7], 1.0f);
  EXPECT_EQ(out[8], 1.015625f);
}

// A fused matrix: segments at multiples of 16 with gaps, from strided sources, and one segment written in pieces.
TEST(PackedMatrixTest, SegmentsLandAtTheirRowsAndLeaveTheGapsZero) {
  constexpr int64_t kCols = 50, kRows = 64 + 16 + 5, kStride = 61;
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    std::vector<float> a = RandomFloats(37 * kStride, 1), b = RandomFloats(16 * kStride, 2), c = RandomFloats(5 * kStride, 3);
    const TensorView a_view{a.data(), DType::kFloat32, 37, kCols, kStride};
    const TensorView b_view{b.data(), DType::kFloat32, 16, kCols, kStride};
    const TensorView c_view{c.data(), DType::kFloat32, 5, kCols, kStride};
    Storage storage(PackedBytes(dtype, kRows, kCols));
    cpu::PackRows(c_view, dtype, kRows, kCols, 80, storage.data());
    cpu::PackRows(b_view, dtype, kRows, kCols, 64, storage.data());
    cpu::PackRows(a_view.Rows(13, 24), dtype, kRows, kCols, 13, storage.data());
    cpu::PackRows(a_view.Rows(0, 13), dtype, kRows, kCols, 0, storage.data());
    const PackedMatrix matrix{storage.data(), dtype, kRows, kCols};
    for (int64_t row = 0; row < kRows; ++row) {
      const float* expected = row < 37   ? a_view.Row<float>(row)
                              : row < 64 ? nullptr
                              : row < 80 ? b_view.Row<float>(row - 64)
                                         : c_view.Row<float>(row - 80);
      std::vector<float> out(kCols);
      cpu::UnpackRow(matrix, row, out.data());
      for (int64_t col = 0; col < kCols; ++col) {
        float value = expected == nullptr ? 0.0f : expected[col];
        if (dtype == DType::kBFloat16) value = ToFloat(ToBFloat16(value));
        EXPECT_EQ(out[static_cast<size_t>(col)], value) << row << ", " << col;
      }
    }
  }
}

}  // namespace
}  // namespace bebop
