// SPDX-License-Identifier: Apache-2.0
#include "kernels/qk_norm_rope/qk_norm_rope.h"

#include <gtest/gtest.h>

#include "tests/kernels/kernel_test_util.h"

namespace bebop {
namespace {

using testing::InstructionSets;
using testing::kUnit;
using testing::OwnedBatch;
using testing::PaddedMatrix;
using testing::Random;
using testing::SameBits;

struct Shape {
  int32_t q_heads, kv_heads, dim, rotary, page_tokens;
  double theta;
};

// Norm and rotation of one head in double. `magnitude` bounds the terms of each value, to scale the tolerance.
void Expected(const float* x, const float* weight, const Shape& shape, double position, std::vector<double>* value,
              std::vector<double>* magnitude) {
  double sum = 0;
  for (int32_t i = 0; i < shape.dim; ++i) sum += double{x[i]} * x[i];
  const double scale = 1.0 / std::sqrt(sum / shape.dim + double{1e-6f});
  value->resize(static_cast<size_t>(shape.dim));
  magnitude->resize(static_cast<size_t>(shape.dim));
  for (int32_t i = 0; i < shape.dim; ++i) {
    (*value)[i] = x[i] * scale * (1.0 + weight[i]);
    (*magnitude)[i] = std::fabs(x[i] * scale) * (1 + std::fabs(1.0 + weight[i]));
  }
  for (int32_t i = 0; i < shape.rotary / 2; ++i) {
    const double angle = position * std::pow(shape.theta, -2.0 * i / shape.rotary);
    double& low = (*value)[i];
    double& high = (*value)[i + shape.rotary / 2];
    const double turned = low * std::cos(angle) - high * std::sin(angle);
    high = high * std::cos(angle) + low * std::sin(angle);
    low = turned;
    const double both = (*magnitude)[i] + (*magnitude)[i + shape.rotary / 2];
    (*magnitude)[i] = (*magnitude)[i + shape.rotary / 2] = both;
  }
}

float Stored(const std::vector<uint8_t>& bytes, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) {
    float value;
    std::memcpy(&value, &bytes[index * 4], 4);
    return value;
  }
  BFloat16 value;
  std::memcpy(&value, &bytes[index * 2], 2);
  return ToFloat(value);
}

class QkNormRopeTest : public ::testing::TestWithParam<std::tuple<Shape, DType>> {};

TEST_P(QkNormRopeTest, AgreesWithDoubleAtAnyPosition) {
  const auto& [shape, dtype] = GetParam();
  const int64_t dim = shape.dim, bytes = ElementBytes(dtype);
  const std::vector<int32_t> first_positions = {0, 1, 63, 4095, 100003, 199995};
  constexpr int32_t kRowsEach = 5;
  OwnedBatch batch;
  int32_t num_pages = 0;
  for (const int32_t first : first_positions) {
    // Only the pages that the rows touch exist; the others point nowhere.
    std::vector<int32_t> pages(static_cast<size_t>((first + kRowsEach - 1) / shape.page_tokens + 1), -1);
    for (int32_t position = first; position < first + kRowsEach; ++position) {
      if (pages[position / shape.page_tokens] < 0) pages[position / shape.page_tokens] = num_pages++;
    }
    batch.Add({.num_rows = kRowsEach, .num_known_rows = kRowsEach, .first_position = first}, pages);
  }
  const int32_t rows = batch.num_rows();
  Random random(static_cast<uint64_t>(dim));
  PaddedMatrix q_gate(random.Normals(rows * shape.q_heads * 2 * dim), rows, shape.q_heads * 2 * dim);
  PaddedMatrix k(random.Normals(rows * shape.kv_heads * dim, 4.0f), rows, shape.kv_heads * dim);
  PaddedMatrix v(random.Normals(rows * shape.kv_heads * dim), rows, shape.kv_heads * dim);
  const std::vector<float> q_norm = random.Normals(dim, 0.5f), k_norm = random.Normals(dim, 0.5f),
                           q_gate_before = q_gate.Values();
  const int64_t page_elements = int64_t{shape.kv_heads} * shape.page_tokens * dim;

  std::vector<float> first_q;
  std::vector<uint8_t> first_k;
  for (const auto set : InstructionSets()) {
    for (const int threads : {1, 3}) {
      ThreadPool pool(threads);
      PaddedMatrix q_out(rows, shape.q_heads * dim);
      std::vector<uint8_t> k_pages(static_cast<size_t>(num_pages * page_elements * bytes), 0xff), v_pages = k_pages;  // NaN
      cpu::QkNormRopeWith(
          set,
          {.batch = batch.View(),
           .q_gate = q_gate.View(),
           .k = k.View(),
           .v = v.View(),
           .q_norm = q_norm.data(),
           .k_norm = k_norm.data(),
           .num_q_heads = shape.q_heads,
           .num_kv_heads = shape.kv_heads,
           .head_dim = shape.dim,
           .rotary_dim = shape.rotary,
           .rope_theta = shape.theta,
           .q_out = q_out.View(),
           .pages = {k_pages.data(), v_pages.data(), dtype, num_pages, shape.page_tokens, shape.kv_heads, shape.dim},
           .dense_k = {},
           .dense_v = {}},
          pool);
      EXPECT_TRUE(SameBits(q_gate.Values(), q_gate_before) && q_out.GapsUntouched());
      if (first_q.empty()) {
        first_q = q_out.Values();
        first_k = k_pages;
      }
      EXPECT_TRUE(SameBits(first_q, q_out.Values()) && first_k == k_pages) << "sets and threads agree bit for bit";

      std::vector<double> value, magnitude;
      int64_t written = 0;
      for (int32_t row = 0; row < rows; ++row) {
        const int32_t position = batch.row_position[row];
        for (int32_t h = 0; h < shape.q_heads; ++h) {
          Expected(q_gate.Row(row) + h * 2 * dim, q_norm.data(), shape, position, &value, &magnitude);
          for (int32_t i = 0; i < dim; ++i) {
            // Norm: 4 roundings; cos and sin 1, a product and a sum each 1.
            ASSERT_NEAR(q_out.Row(row)[h * dim + i], value[i], 8 * kUnit * magnitude[i])
                << "position " << position << " dim " << i;
          }
        }
        const SequenceRows& sequence = batch.sequences[batch.row_sequence[row]];
        const int64_t page = batch.page_ids[sequence.first_page + position / shape.page_tokens];
        for (int32_t h = 0; h < shape.kv_heads; ++h) {
          Expected(k.Row(row) + h * dim, k_norm.data(), shape, position, &value, &magnitude);
          const int64_t entry = ((page * shape.kv_heads + h) * shape.page_tokens + position % shape.page_tokens) * dim;
          for (int32_t i = 0; i < dim; ++i) {
            const double storage = dtype == DType::kFloat32 ? 0 : 0x1.01p-8 * std::fabs(value[i]);
            ASSERT_NEAR(Stored(k_pages, dtype, entry + i), value[i], 9 * kUnit * magnitude[i] + storage)
                << position << " dim " << i;
            const float raw = v.Row(row)[h * dim + i];
            ASSERT_EQ(Stored(v_pages, dtype, entry + i), dtype == DType::kFloat32 ? raw : ToFloat(ToBFloat16(raw)));
            ++written;
          }
        }
      }
      int64_t finite = 0;
      for (int64_t i = 0; i < num_pages * page_elements; ++i) finite += std::isfinite(Stored(k_pages, dtype, i)) ? 1 : 0;
      EXPECT_EQ(finite, written) << "every entry has a place of its own, and no other place is written";

      // The same rows into dense buffers.
      std::vector<uint8_t> dense_k(static_cast<size_t>(rows * shape.kv_heads * dim * bytes)), dense_v = dense_k;
      const TensorView dense = {dense_k.data(), dtype, rows, shape.kv_heads * dim, shape.kv_heads * dim};
      cpu::QkNormRopeWith(set,
                          {.batch = batch.View(),
                           .q_gate = q_gate.View(),
                           .k = k.View(),
                           .v = v.View(),
                           .q_norm = q_norm.data(),
                           .k_norm = k_norm.data(),
                           .num_q_heads = shape.q_heads,
                           .num_kv_heads = shape.kv_heads,
                           .head_dim = shape.dim,
                           .rotary_dim = shape.rotary,
                           .rope_theta = shape.theta,
                           .q_out = q_out.View(),
                           .pages = {},
                           .dense_k = dense,
                           .dense_v = {dense_v.data(), dtype, rows, dense.cols, dense.cols}},
                          pool);
      for (int32_t row = 0; row < rows; ++row) {
        const SequenceRows& sequence = batch.sequences[batch.row_sequence[row]];
        const int32_t position = batch.row_position[row];
        const int64_t page = batch.page_ids[sequence.first_page + position / shape.page_tokens];
        for (int32_t h = 0; h < shape.kv_heads; ++h) {
          const int64_t entry = ((page * shape.kv_heads + h) * shape.page_tokens + position % shape.page_tokens) * dim;
          const int64_t at = (row * shape.kv_heads + h) * dim;
          ASSERT_EQ(0, std::memcmp(&dense_k[at * bytes], &k_pages[entry * bytes], static_cast<size_t>(dim * bytes)));
          ASSERT_EQ(0, std::memcmp(&dense_v[at * bytes], &v_pages[entry * bytes], static_cast<size_t>(dim * bytes)));
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, QkNormRopeTest,
                         ::testing::Combine(::testing::Values(Shape{2, 1, 16, 4, 4, 1e4}, Shape{3, 3, 24, 24, 16, 1e6},
                                                              Shape{4, 2, 64, 16, 64, 1e7}, Shape{1, 1, 80, 0, 16, 1e7},
                                                              Shape{2, 2, 128, 72, 4, 1e7}, Shape{4, 2, 256, 64, 16, 1e7}),
                                            ::testing::Values(DType::kFloat32, DType::kBFloat16)));

// A quarter turn by hand: theta 1 makes every angle the position.
TEST(QkNormRopeTest, PairsAreHalfTheRotaryDimsApart) {
  ThreadPool pool(1);
  std::vector<float> q_gate = {1, 0, 0, 0, 1, 1, 9, 9, 9, 9, 9, 9}, kv(6, 1.0f), zeros(6), out(6), page(2 * 6), value_page(2 * 6);
  OwnedBatch batch;
  batch.Add({.num_rows = 1, .num_known_rows = 1, .first_position = 1}, {0});
  cpu::QkNormRope({.batch = batch.View(),
                   .q_gate = FloatMatrix(q_gate.data(), 1, 12),
                   .k = FloatMatrix(kv.data(), 1, 6),
                   .v = FloatMatrix(kv.data(), 1, 6),
                   .q_norm = zeros.data(),
                   .k_norm = zeros.data(),
                   .num_q_heads = 1,
                   .num_kv_heads = 1,
                   .head_dim = 6,
                   .rotary_dim = 4,
                   .rope_theta = 1.0,
                   .q_out = FloatMatrix(out.data(), 1, 6),
                   .pages = {page.data(), value_page.data(), DType::kFloat32, 1, 2, 1, 6},
                   .dense_k = {},
                   .dense_v = {}},
                  pool);
  const float norm = std::sqrt(2.0f);
  const std::vector<float> expected = {norm * std::cos(1.0f), 0, norm * std::sin(1.0f), 0, norm, norm};
  for (int i = 0; i < 6; ++i) EXPECT_NEAR(out[i], expected[i], 1e-5) << i;
}

TEST(QkNormRopeTest, NanStaysInItsRow) {
  ThreadPool pool(2);
  constexpr int32_t kDim = 16;
  Random random(2);
  OwnedBatch batch;
  batch.Add({.num_rows = 1, .num_known_rows = 1, .first_position = 0}, {0});
  batch.Add({.num_rows = 1, .num_known_rows = 1, .first_position = 0}, {1});
  std::vector<float> q_gate = random.Normals(4 * kDim), kv = random.Normals(2 * kDim), norm = random.Normals(kDim);
  std::vector<float> out[2], pages[2];
  for (int poison = 0; poison < 2; ++poison) {
    if (poison == 1) q_gate[0] = kv[0] = testing::kNan;
    out[poison].resize(2 * kDim);
    pages[poison].resize(2 * kDim);
    std::vector<float> values(2 * kDim);
    cpu::QkNormRope({.batch = batch.View(),
                     .q_gate = FloatMatrix(q_gate.data(), 2, 2 * kDim),
                     .k = FloatMatrix(kv.data(), 2, kDim),
                     .v = FloatMatrix(kv.data(), 2, kDim),
                     .q_norm = norm.data(),
                     .k_norm = norm.data(),
                     .num_q_heads = 1,
                     .num_kv_heads = 1,
                     .head_dim = kDim,
                     .rotary_dim = 8,
                     .q_out = FloatMatrix(out[poison].data(), 2, kDim),
                     .pages = {pages[poison].data(), values.data(), DType::kFloat32, 2, 1, 1, kDim},
                     .dense_k = {},
                     .dense_v = {}},
                    pool);
  }
  EXPECT_TRUE(std::isnan(out[1][0]) && std::isnan(pages[1][0]));
  EXPECT_TRUE(SameBits(&out[0][kDim], &out[1][kDim], kDim) && SameBits(&pages[0][kDim], &pages[1][kDim], kDim));
}

}  // namespace
}  // namespace bebop
