// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "kernels/qk_norm_rope/qk_norm_rope.h"
#include "tests/kernels/cuda_test_util.h"

namespace bebop {
namespace {

using testing::CudaTest;
using testing::DeviceArray;
using testing::DeviceBatchCopy;
using testing::DeviceMatrix;
using testing::kUnit;
using testing::OwnedBatch;
using testing::Random;
using testing::RoundToBFloat16;
using testing::SameBits;

struct Shape {
  int32_t q_heads, kv_heads, dim, rotary, page_tokens;
  double theta;
};

// Per value of a head the magnitude of the terms that it is made of: |x| scale (1 + |1 + weight|), of both halves of a rotated
// pair.
std::vector<double> Magnitudes(const float* x, const std::vector<float>& weight, const Shape& shape) {
  double sum = 0;
  for (int32_t i = 0; i < shape.dim; ++i) sum += double{x[i]} * x[i];
  const double scale = 1.0 / std::sqrt(sum / shape.dim + 1e-6);
  std::vector<double> out(static_cast<size_t>(shape.dim));
  for (int32_t i = 0; i < shape.dim; ++i) out[i] = std::fabs(x[i] * scale) * (1 + std::fabs(1.0 + weight[i]));
  for (int32_t i = 0; i < shape.rotary / 2; ++i) out[i] = out[i + shape.rotary / 2] = out[i] + out[i + shape.rotary / 2];
  return out;
}

class QkNormRopeCudaTest : public CudaTest {
 protected:
  // Roundings: half of those of the sum of squares (8 of a vector, 5 shuffles), mean, eps, root, inverse, 1 + weight, two
  // products; cos and sin, a product and a sum 1 each. The CPU's: qk_norm_rope_test.
  static constexpr double kUnits = (8 + 5) / 2.0 + 7 + 3 + 9;

  void Check(const Shape& shape, DType dtype);
};

void QkNormRopeCudaTest::Check(const Shape& shape, DType dtype) {
  SCOPED_TRACE(::testing::Message() << shape.dim << " " << DTypeName(dtype));
  const double storage = dtype == DType::kFloat32 ? 0 : 0x1.01p-8;
  const int64_t dim = shape.dim, kv_width = shape.kv_heads * dim;
  OwnedBatch batch;
  int32_t num_pages = 1;  // nobody's
  std::vector<int32_t> position_of_row;
  for (const int32_t first : {0, 63, 4095, 100003, 1048570}) {
    const int32_t rows = first % 3 + 1;
    std::vector<int32_t> pages(static_cast<size_t>((first + rows - 1) / shape.page_tokens + 1), -1);
    for (int32_t position = first; position < first + rows; ++position) {
      if (pages[position / shape.page_tokens] < 0) pages[position / shape.page_tokens] = num_pages++;
    }
    batch.Add({.num_rows = rows, .num_known_rows = rows, .first_position = first}, pages);
  }
  const int32_t real_rows = batch.num_rows(), rows = real_rows + 3;
  ThreadPool pool(1);
  Random random(static_cast<uint64_t>(dim));
  // Rows differ in size by powers of ten, so that eps matters in some.
  const auto normals = [&](int64_t width, float scale) {
    std::vector<float> values = random.Normals(rows * width, scale);
    for (size_t i = 0; i < values.size(); ++i)
      values[i] *= std::pow(10.0f, -static_cast<float>(static_cast<int64_t>(i) / width % 4));
    return dtype == DType::kFloat32 ? values : RoundToBFloat16(values);
  };
  std::vector<float> q_gate = normals(shape.q_heads * 2 * dim, 1.0f), k = normals(kv_width, 4.0f), v = normals(kv_width, 1.0f);
  const std::vector<float> q_norm = random.Normals(dim, 0.5f), k_norm = random.Normals(dim, 0.5f);

  // The CPU, without the padding.
  std::vector<float> expected_q(static_cast<size_t>(real_rows * shape.q_heads * dim)),
      expected_k(static_cast<size_t>(real_rows * kv_width)), expected_v(expected_k.size());
  cpu::QkNormRope({.batch = batch.View(),
                   .q_gate = FloatMatrix(q_gate.data(), real_rows, shape.q_heads * 2 * dim),
                   .k = FloatMatrix(k.data(), real_rows, kv_width),
                   .v = FloatMatrix(v.data(), real_rows, kv_width),
                   .q_norm = q_norm.data(),
                   .k_norm = k_norm.data(),
                   .num_q_heads = shape.q_heads,
                   .num_kv_heads = shape.kv_heads,
                   .head_dim = shape.dim,
                   .rotary_dim = shape.rotary,
                   .rope_theta = shape.theta,
                   .q_out = FloatMatrix(expected_q.data(), real_rows, shape.q_heads * dim),
                   .pages = {},
                   .dense_k = FloatMatrix(expected_k.data(), real_rows, kv_width),
                   .dense_v = FloatMatrix(expected_v.data(), real_rows, kv_width)},
                  pool);

  // The device, with rows of padding at the end, whose positions mean nothing, and a sequence of padding, whose table does not
  // exist.
  OwnedBatch padded = batch;
  padded.sequences.push_back({.first_row = real_rows, .num_rows = 0, .first_page = 1 << 30});
  for (const int32_t position : {-1, 5, 1 << 30}) {
    padded.row_sequence.push_back(-1);
    padded.row_position.push_back(position);
  }
  const DeviceBatchCopy device_batch(padded);
  const DeviceArray<float> device_q_norm(q_norm), device_k_norm(k_norm);
  const DeviceMatrix device_q_gate(q_gate, rows, shape.q_heads * 2 * dim, dtype), device_k(k, rows, kv_width, dtype, 16),
      device_v(v, rows, kv_width, dtype, 24);
  const int64_t page_rows = int64_t{num_pages} * shape.kv_heads * shape.page_tokens;
  const auto run = [&](DeviceMatrix& q_out, const KvPagesView& pages, const TensorView& dense_k, const TensorView& dense_v) {
    cuda::QkNormRope({.batch = device_batch.View(),
                      .q_gate = device_q_gate.View(),
                      .k = device_k.View(),
                      .v = device_v.View(),
                      .q_norm = device_q_norm.data(),
                      .k_norm = device_k_norm.data(),
                      .num_q_heads = shape.q_heads,
                      .num_kv_heads = shape.kv_heads,
                      .head_dim = shape.dim,
                      .rotary_dim = shape.rotary,
                      .rope_theta = shape.theta,
                      .q_out = q_out.View(),
                      .pages = pages,
                      .dense_k = dense_k,
                      .dense_v = dense_v},
                     stream());
  };
  DeviceMatrix q_out(rows, shape.q_heads * dim, dtype, 16), k_pages(page_rows, dim, dtype, 0), v_pages(page_rows, dim, dtype, 0);
  run(q_out, {k_pages.View().data, v_pages.View().data, dtype, num_pages, shape.page_tokens, shape.kv_heads, shape.dim}, {}, {});

  const std::vector<float> actual_q = q_out.Values(), actual_k = k_pages.Values(), actual_v = v_pages.Values();
  std::vector<bool> written(static_cast<size_t>(page_rows));
  for (int32_t row = 0; row < real_rows; ++row) {
    for (int32_t h = 0; h < shape.q_heads; ++h) {
      const std::vector<double> magnitudes = Magnitudes(&q_gate[(row * shape.q_heads + h) * 2 * dim], q_norm, shape);
      for (int64_t i = 0; i < dim; ++i) {
        const int64_t at = (row * shape.q_heads + h) * dim + i;
        ASSERT_NEAR(actual_q[at], expected_q[at], kUnits * kUnit * magnitudes[i] + storage * std::fabs(expected_q[at]))
            << "row " << row << " head " << h << " dim " << i;
      }
    }
    const int32_t position = batch.row_position[row];
    const SequenceRows& sequence = batch.sequences[batch.row_sequence[row]];
    const int64_t page = batch.page_ids[sequence.first_page + position / shape.page_tokens];
    for (int32_t h = 0; h < shape.kv_heads; ++h) {
      const std::vector<double> magnitudes = Magnitudes(&k[(row * shape.kv_heads + h) * dim], k_norm, shape);
      const int64_t entry = (page * shape.kv_heads + h) * shape.page_tokens + position % shape.page_tokens;
      written[entry] = true;
      for (int64_t i = 0; i < dim; ++i) {
        const int64_t at = (row * shape.kv_heads + h) * dim + i;
        ASSERT_NEAR(actual_k[entry * dim + i], expected_k[at],
                    kUnits * kUnit * magnitudes[i] + storage * std::fabs(expected_k[at]))
            << "row " << row << " key head " << h << " dim " << i;
      }
      ASSERT_TRUE(SameBits(&actual_v[entry * dim], &v[(row * shape.kv_heads + h) * dim], dim)) << "row " << row;
    }
  }
  for (int64_t entry = 0; entry < page_rows; ++entry) {
    if (written[entry]) continue;
    for (int64_t i = 0; i < dim; ++i) {
      ASSERT_TRUE(std::isnan(actual_k[entry * dim + i]) && std::isnan(actual_v[entry * dim + i]))
          << "entry " << entry << " is nobody's";
    }
  }
  EXPECT_TRUE(q_out.GapsUntouched() && k_pages.GapsUntouched() && v_pages.GapsUntouched());

  // The same rows into dense buffers.
  DeviceMatrix q_again(rows, shape.q_heads * dim, dtype, 16), dense_k(rows, kv_width, dtype), dense_v(rows, kv_width, dtype, 16);
  run(q_again, {}, dense_k.View(), dense_v.View());
  const std::vector<float> again = q_again.Values(), actual_dense_k = dense_k.Values(), actual_dense_v = dense_v.Values();
  EXPECT_TRUE(SameBits(again.data(), actual_q.data(), real_rows * shape.q_heads * dim));
  for (int32_t row = 0; row < rows; ++row) {
    for (int32_t h = 0; h < shape.kv_heads; ++h) {
      const int64_t at = (row * shape.kv_heads + h) * dim;
      if (row >= real_rows) {
        EXPECT_TRUE(std::isnan(actual_dense_k[at]) && std::isnan(actual_dense_v[at])) << "a row of padding";
        continue;
      }
      const int32_t position = batch.row_position[row];
      const int64_t page = batch.page_ids[batch.sequences[batch.row_sequence[row]].first_page + position / shape.page_tokens];
      const int64_t entry = (page * shape.kv_heads + h) * shape.page_tokens + position % shape.page_tokens;
      EXPECT_TRUE(SameBits(&actual_dense_k[at], &actual_k[entry * dim], dim) && SameBits(&actual_dense_v[at], &v[at], dim));
    }
  }
  EXPECT_TRUE(dense_k.GapsUntouched() && dense_v.GapsUntouched());
}

TEST_F(QkNormRopeCudaTest, AgreesWithTheCpuAtAnyPosition) {
  for (const Shape& shape : {Shape{2, 1, 16, 4, 4, 1e4},
                             {3, 3, 24, 24, 16, 1e6},
                             {4, 2, 64, 16, 64, 1e7},
                             {1, 1, 80, 0, 16, 1e7},
                             {2, 2, 128, 72, 4, 1e7},
                             {4, 2, 256, 64, 16, 1e7},
                             {1, 1, 256, 256, 16, 1e7}}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) Check(shape, dtype);
  }
}

// theta 1 makes every angle the position in radians: all quarters of a turn, and angles next to their borders.
TEST_F(QkNormRopeCudaTest, AnglesAreThoseOfDouble) {
  constexpr int32_t kDim = 8;
  OwnedBatch batch;
  std::vector<int32_t> positions;
  for (int32_t i = 0; i < 64; ++i) positions.push_back(i);
  for (const int32_t position : {710, 103993, 104348, 208341, 312689, 833719, 1146408, 2147483647})
    positions.push_back(position);  // near k π
  for (const int32_t position : positions) batch.Add({.num_rows = 1, .num_known_rows = 1, .first_position = position}, {});
  const int32_t rows = batch.num_rows();
  const DeviceBatchCopy device_batch(batch);
  std::vector<float> heads;
  for (int32_t row = 0; row < rows; ++row) {
    heads.insert(heads.end(), {1, 0, 0, 0, 0, 0, 0, 0});      // the query
    heads.insert(heads.end(), static_cast<size_t>(kDim), 9);  // its gate
  }
  const DeviceMatrix q_gate(heads, rows, 2 * kDim, DType::kFloat32), unused(rows, 0, DType::kFloat32);
  const DeviceArray<float> zeros(std::vector<float>(kDim, 0.0f));
  DeviceMatrix q_out(rows, kDim, DType::kFloat32);
  TensorView none = unused.View();
  none.cols = 0;
  cuda::QkNormRope({.batch = device_batch.View(),
                    .q_gate = q_gate.View(),
                    .k = none,
                    .v = none,
                    .q_norm = zeros.data(),
                    .k_norm = zeros.data(),
                    .eps = 0.0f,
                    .num_q_heads = 1,
                    .num_kv_heads = 0,
                    .head_dim = kDim,
                    .rotary_dim = 4,
                    .rope_theta = 1.0,
                    .q_out = q_out.View(),
                    .pages = {.head_dim = kDim},
                    .dense_k = {},
                    .dense_v = {}},
                   stream());
  const std::vector<float> actual = q_out.Values();
  const double length = std::sqrt(8.0);
  for (int32_t row = 0; row < rows; ++row) {
    const double angle = positions[static_cast<size_t>(row)];
    // The norm's roundings (seven at most in a head with one value), those of cos and sin and of their products. The angle's own
    // error is absolute: 3 * 2^-53 of up to 2^31 radians.
    const double angle_error = 3 * 0x1.0p-53 * angle;
    ASSERT_NEAR(actual[row * kDim], length * std::cos(angle), length * (9 * kUnit * std::fabs(std::cos(angle)) + angle_error))
        << angle;
    ASSERT_NEAR(actual[row * kDim + 2], length * std::sin(angle), length * (9 * kUnit * std::fabs(std::sin(angle)) + angle_error))
        << angle;
    for (const int i : {1, 3, 4, 5, 6, 7}) ASSERT_EQ(actual[row * kDim + i], 0.0f);
  }
}

}  // namespace
}  // namespace bebop
