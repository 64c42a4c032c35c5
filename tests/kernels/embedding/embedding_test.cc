// SPDX-License-Identifier: Apache-2.0
#include "kernels/embedding/embedding.h"

#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace bebop::cpu {
namespace {

struct alignas(64) Line {
  unsigned char bytes[64] = {};
};

TEST(EmbeddingTest, RowsAreTheTablesRowsExactly) {
  constexpr int64_t kVocab = 53, kHidden = 75, kStride = 80;
  constexpr float kGuard = -7.0f;
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  std::vector<float> source(kVocab * kHidden);
  for (float& value : source) value = normal(generator);
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    std::vector<Line> lines(static_cast<size_t>(PackedBytes(dtype, kVocab, kHidden) / 64));
    PackRows(FloatMatrix(source.data(), kVocab, kHidden), dtype, kVocab, kHidden, 0, lines.data());
    for (int threads : {1, 2, 3}) {
      ThreadPool pool(threads);
      for (int64_t rows : {1, 2, 5, 54}) {
        std::vector<uint32_t> ids;
        for (int64_t t = 0; t < rows; ++t) ids.push_back(static_cast<uint32_t>((t * 31 + 52) % kVocab));  // first and last id too
        std::vector<float> out(static_cast<size_t>(rows * kStride), kGuard);
        Embedding({ids.data(), {lines.data(), dtype, kVocab, kHidden}, {out.data(), DType::kFloat32, rows, kHidden, kStride}}, pool);
        for (int64_t t = 0; t < rows; ++t) {
          for (int64_t h = 0; h < kStride; ++h) {
            float expected = kGuard;
            if (h < kHidden) expected = source[ids[static_cast<size_t>(t)] * static_cast<size_t>(kHidden) + static_cast<size_t>(h)];
            if (h < kHidden && dtype == DType::kBFloat16) expected = ToFloat(ToBFloat16(expected));
            ASSERT_EQ(out[static_cast<size_t>(t * kStride + h)], expected) << "row " << t << " column " << h;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace bebop::cpu
