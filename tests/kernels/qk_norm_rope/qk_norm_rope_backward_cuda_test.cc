// SPDX-License-Identifier: Apache-2.0
#include "kernels/qk_norm_rope/qk_norm_rope_backward.h"

#include <gtest/gtest.h>

#include "tests/kernels/cuda_test_util.h"

namespace bebop {
namespace {

using testing::CudaTest;
using testing::DeviceArray;
using testing::DeviceMatrix;
using testing::kUnit;
using testing::Random;
using testing::SameBits;

class QkNormRopeBackwardCudaTest : public CudaTest {};

struct Shape {
  int64_t rows;
  int32_t q_heads, kv_heads, dim, rotary;
};

TEST_F(QkNormRopeBackwardCudaTest, AgreesWithTheCpu) {
  ThreadPool pool(1);
  // Rotations of none, a part (pairs that share a vector of eight, and lie in other lanes) and all of a head.
  for (const auto& [rows, q_heads, kv_heads, dim, rotary] :
       {Shape{1, 1, 1, 8, 0}, {21, 4, 2, 16, 8}, {13, 3, 1, 24, 6}, {10, 2, 2, 256, 64}, {9, 2, 1, 256, 256}}) {
    SCOPED_TRACE(::testing::Message() << rows << " rows, heads " << q_heads << " and " << kv_heads << " of " << dim << "/"
                                      << rotary);
    Random random(static_cast<uint64_t>(dim * 7 + rows));
    const int64_t q_width = q_heads * dim, kv_width = kv_heads * dim;
    std::vector<int32_t> positions;
    for (int64_t r = 0; r < rows; ++r) positions.push_back(static_cast<int32_t>(r == 3 ? 1000003 : r * 37));
    std::vector<float> q_gate = random.Normals(rows * 2 * q_width, 2.0f), k = random.Normals(rows * kv_width, 0.01f);
    const std::vector<float> q_norm = random.Normals(dim, 0.3f), k_norm = random.Normals(dim, 0.3f);
    std::vector<float> dq = random.Normals(rows * q_width), dk = random.Normals(rows * kv_width);
    const std::vector<float> start = random.Normals(2 * dim);

    const DeviceArray<int32_t> device_positions(positions);
    const DeviceArray<float> device_q_norm(q_norm), device_k_norm(k_norm);
    DeviceMatrix device_q_gate(q_gate, rows, 2 * q_width, DType::kFloat32), device_k(k, rows, kv_width, DType::kFloat32, 24),
        device_dq(dq, rows, q_width, DType::kFloat32, 16), device_dk(dk, rows, kv_width, DType::kFloat32);
    DeviceMatrix dk_out(rows, kv_width, DType::kFloat32);
    DeviceArray<float> dq_norm({start.begin(), start.begin() + dim}), dk_norm({start.begin() + dim, start.end()});
    // dq_gate is q_gate, as in training: the gate halves stay.
    QkNormRopeBackwardArgs args = {device_positions.data(),
                                   device_q_gate.View(),
                                   device_k.View(),
                                   device_q_norm.data(),
                                   device_k_norm.data(),
                                   1e-6f,
                                   q_heads,
                                   kv_heads,
                                   dim,
                                   rotary,
                                   1e4,
                                   device_dq.View(),
                                   device_dk.View(),
                                   device_q_gate.View(),
                                   dk_out.View(),
                                   dq_norm.data(),
                                   dk_norm.data()};
    cuda::QkNormRopeBackward(args, stream());

    std::vector<float> expected_q_gate = q_gate, expected_dk(k.size()), expected_q_norm(start.begin(), start.begin() + dim),
                       expected_k_norm(start.begin() + dim, start.end());
    args.row_position = positions.data();
    args.q_gate = args.dq_gate = FloatMatrix(expected_q_gate.data(), rows, 2 * q_width);
    args.k = FloatMatrix(k.data(), rows, kv_width);
    args.q_norm = q_norm.data(), args.k_norm = k_norm.data();
    args.dq = FloatMatrix(dq.data(), rows, q_width), args.dk = FloatMatrix(dk.data(), rows, kv_width);
    args.dk_out = FloatMatrix(expected_dk.data(), rows, kv_width);
    args.dq_norm = expected_q_norm.data(), args.dk_norm = expected_k_norm.data();
    cpu::QkNormRopeBackward(args, pool);

    // Of a head: the rotation's two products (each |dy| of the pair), the row sums (at most dim/2 long on either side), the
    // scale, and ten more roundings; all relative to s·max|g| over the head, as |n| <= √dim and |mean(g·n)| <= max|g|.
    const auto near = [&](const std::vector<float>& actual, const std::vector<float>& expected, const std::vector<float>& x,
                          const std::vector<float>& dy, const std::vector<float>& norm, int64_t heads, int64_t stride) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t h = 0; h < heads; ++h) {
          double square = 0, largest = 0, largest_x = 0;
          for (int64_t i = 0; i < dim; ++i) {
            const double value = x[static_cast<size_t>(r * heads * stride + h * stride + i)];
            square += value * value;
            largest_x = std::max(largest_x, std::fabs(value));
            largest = std::max(largest, 2.0 * std::fabs(dy[static_cast<size_t>((r * heads + h) * dim + i)]) *
                                            (1.0 + std::fabs(norm[static_cast<size_t>(i)])));
          }
          const double scale = 1.0 / std::sqrt(square / dim + 1e-6);
          const double tolerance = (dim / 2 + 16) * kUnit * scale * largest * (1.0 + largest_x * scale);
          for (int64_t i = 0; i < stride; ++i) {
            const auto at = static_cast<size_t>(r * heads * stride + h * stride + i);
            if (i < dim) {
              ASSERT_NEAR(actual[at], expected[at], tolerance) << "row " << r << " head " << h << " dim " << i;
            } else {
              ASSERT_EQ(actual[at], x[at]) << "a gate at " << at;
            }
          }
        }
      }
    };
    near(device_q_gate.Values(), expected_q_gate, q_gate, dq, q_norm, q_heads, 2 * dim);
    near(dk_out.Values(), expected_dk, k, dk, k_norm, kv_heads, dim);
    const std::vector<float> actual_q_norm = dq_norm.Download(), actual_k_norm = dk_norm.Download();
    for (int64_t i = 0; i < dim; ++i) {
      // Terms are at most |dy|·√dim: normals, at most 3.5.
      const double tolerance =
          (dim / 2 + 16 + static_cast<double>(rows)) * kUnit * 8 * std::sqrt(static_cast<double>(rows * q_heads));
      ASSERT_NEAR(actual_q_norm[static_cast<size_t>(i)], expected_q_norm[static_cast<size_t>(i)], tolerance) << i;
      ASSERT_NEAR(actual_k_norm[static_cast<size_t>(i)], expected_k_norm[static_cast<size_t>(i)], tolerance) << i;
    }
    EXPECT_TRUE(device_q_gate.GapsUntouched() && dk_out.GapsUntouched() && dq_norm.GuardsUntouched() &&
                dk_norm.GuardsUntouched());

    // dk_out may be dk, or k.
    const std::vector<float> apart = dk_out.Values();
    for (const bool over_k : {false, true}) {
      DeviceMatrix k_again(k, rows, kv_width, DType::kFloat32), dk_again(dk, rows, kv_width, DType::kFloat32),
          q_again(q_gate, rows, 2 * q_width, DType::kFloat32);
      args.row_position = device_positions.data();
      args.q_norm = device_q_norm.data(), args.k_norm = device_k_norm.data();
      args.q_gate = args.dq_gate = q_again.View();
      args.k = k_again.View();
      args.dq = device_dq.View(), args.dk = dk_again.View();
      args.dk_out = over_k ? k_again.View() : dk_again.View();
      args.dq_norm = dq_norm.data(), args.dk_norm = dk_norm.data();
      cuda::QkNormRopeBackward(args, stream());
      EXPECT_TRUE(SameBits((over_k ? k_again : dk_again).Values(), apart)) << over_k;
    }
  }
}

}  // namespace
}  // namespace bebop
