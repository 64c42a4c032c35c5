// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "kernels/embedding/embedding.h"
#include "tests/kernels/cuda_test_util.h"

namespace bebop {
namespace {

using testing::CudaTest;
using testing::DeviceArray;
using testing::DeviceMatrix;
using testing::Random;
using testing::RoundToBFloat16;
using testing::SameBits;

struct alignas(64) Line {
  unsigned char bytes[64] = {};
};

class EmbeddingCudaTest : public CudaTest {};

TEST_F(EmbeddingCudaTest, RowsAreTheTablesRows) {
  constexpr int64_t kVocab = 53;
  ThreadPool pool(1);
  for (const int64_t hidden : {8, 72, 2056}) {  // a turn of a block takes 2048
    Random random(static_cast<uint64_t>(hidden));
    std::vector<float> table = random.Normals(kVocab * hidden);
    std::vector<uint32_t> ids = {0, 52, 7, 7, 31, 1};
    const auto rows = static_cast<int64_t>(ids.size());
    const DeviceArray<uint32_t> device_ids(ids);
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      const DeviceMatrix device_table(table, kVocab, hidden, dtype, 0);
      std::vector<Line> lines(static_cast<size_t>(PackedBytes(dtype, kVocab, hidden) / 64));
      cpu::PackRows(FloatMatrix(table.data(), kVocab, hidden), dtype, kVocab, hidden, 0, lines.data());
      std::vector<float> expected(static_cast<size_t>(rows * hidden));
      cpu::Embedding({ids.data(), {lines.data(), dtype, kVocab, hidden}, FloatMatrix(expected.data(), rows, hidden)}, pool);
      for (const DType out_dtype : {DType::kFloat32, DType::kBFloat16}) {
        DeviceMatrix out(rows, hidden, out_dtype);
        cuda::Embedding({device_ids.data(), {device_table.View().data, dtype, kVocab, hidden, MatrixLayout::kRows}, out.View()},
                        stream());
        EXPECT_TRUE(SameBits(out.Values(), out_dtype == DType::kFloat32 ? expected : RoundToBFloat16(expected)))
            << hidden << ": " << DTypeName(dtype) << " -> " << DTypeName(out_dtype);
        EXPECT_TRUE(out.GapsUntouched());
      }
    }
  }
}

TEST_F(EmbeddingCudaTest, IdsOutOfRangeGiveZeros) {
  constexpr int64_t kVocab = 5, kHidden = 16;
  Random random(1);
  const std::vector<float> table = random.Normals(kVocab * kHidden);
  const DeviceMatrix device_table(table, kVocab, kHidden, DType::kFloat32, 0);
  const DeviceArray<uint32_t> ids({5, 4, 0xffffffffu, 0x80000000u});
  DeviceMatrix out(4, kHidden, DType::kFloat32);
  cuda::Embedding({ids.data(), {device_table.View().data, DType::kFloat32, kVocab, kHidden, MatrixLayout::kRows}, out.View()},
                  stream());
  const std::vector<float> actual = out.Values(), zeros(kHidden);
  EXPECT_TRUE(SameBits(&actual[kHidden], &table[4 * kHidden], kHidden));
  for (const int row : {0, 2, 3}) EXPECT_TRUE(SameBits(&actual[row * kHidden], zeros.data(), kHidden)) << row;
  cuda::Embedding({nullptr,
                   {device_table.View().data, DType::kFloat32, kVocab, kHidden, MatrixLayout::kRows},
                   {nullptr, DType::kFloat32, 0, kHidden, kHidden}},
                  stream());
}

}  // namespace
}  // namespace bebop
