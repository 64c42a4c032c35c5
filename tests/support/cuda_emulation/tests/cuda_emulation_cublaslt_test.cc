// SPDX-License-Identifier: Apache-2.0
#include <cublasLt.h>
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <vector>

#include "cuda_emulation_control.h"
#include "device_array.h"
#include "kernels/common/dtype.h"

namespace bebop::emulation_tests {
namespace {

// One product D = alpha op(A) op(B) + beta C of matrices whose values are small integers, which all types hold exactly.
struct Case {
  int m, n, k;
  bool transpose_a, transpose_b;
  cublasLtOrder_t order_b;
  cudaDataType_t type, out_type;
  float alpha, beta;
};

class Matrix {
 public:
  Matrix(int rows, int cols, cublasLtOrder_t order, cudaDataType_t type, int seed)
      : rows_(rows), cols_(cols), order_(order), type_(type), leading_((order == CUBLASLT_ORDER_COL ? rows : cols) + 8) {
    const int lines = order == CUBLASLT_ORDER_COL ? cols : rows;
    std::vector<float> values(static_cast<size_t>(lines * leading_));
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>((static_cast<int>(i) * 5 + seed) % 9 - 4);
    values_ = values;
    if (type == CUDA_R_32F) {
      floats_ = std::make_unique<DeviceArray<float>>(values);
    } else {
      std::vector<uint16_t> halves;
      for (const float value : values) halves.push_back(ToBFloat16(value).bits);
      halves_ = std::make_unique<DeviceArray<uint16_t>>(halves);
    }
    EXPECT_EQ(cublasLtMatrixLayoutCreate(&layout_, type, static_cast<uint64_t>(rows), static_cast<uint64_t>(cols), leading_),
              CUBLAS_STATUS_SUCCESS);
    const int32_t order_value = order;
    EXPECT_EQ(cublasLtMatrixLayoutSetAttribute(layout_, CUBLASLT_MATRIX_LAYOUT_ORDER, &order_value, sizeof(order_value)),
              CUBLAS_STATUS_SUCCESS);
  }
  ~Matrix() { EXPECT_EQ(cublasLtMatrixLayoutDestroy(layout_), CUBLAS_STATUS_SUCCESS); }
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;

  size_t Index(int row, int col) const {
    return static_cast<size_t>(order_ == CUBLASLT_ORDER_COL ? col * leading_ + row : row * leading_ + col);
  }
  float At(int row, int col) const { return values_[Index(row, col)]; }
  void* data() const { return type_ == CUDA_R_32F ? static_cast<void*>(floats_->data()) : halves_->data(); }
  cublasLtMatrixLayout_t layout() const { return layout_; }
  std::vector<float> Read() const {
    if (type_ == CUDA_R_32F) return floats_->Read();
    std::vector<float> values;
    for (const uint16_t bits : halves_->Read()) values.push_back(ToFloat(BFloat16{bits}));
    return values;
  }

 private:
  const int rows_, cols_;
  const cublasLtOrder_t order_;
  const cudaDataType_t type_;
  const int64_t leading_;
  std::vector<float> values_;
  std::unique_ptr<DeviceArray<float>> floats_;
  std::unique_ptr<DeviceArray<uint16_t>> halves_;
  cublasLtMatrixLayout_t layout_ = nullptr;
};

// A library handle, a description and an algorithm for some matrices.
class Product {
 public:
  explicit Product(bool transpose_a = false, bool transpose_b = false) {
    EXPECT_EQ(cublasLtCreate(&handle_), CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(cublasLtMatmulDescCreate(&product_, CUBLAS_COMPUTE_32F, CUDA_R_32F), CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(cublasLtMatmulPreferenceCreate(&preference_), CUBLAS_STATUS_SUCCESS);
    const cublasOperation_t a = transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, b = transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    EXPECT_EQ(cublasLtMatmulDescSetAttribute(product_, CUBLASLT_MATMUL_DESC_TRANSA, &a, sizeof(a)), CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(cublasLtMatmulDescSetAttribute(product_, CUBLASLT_MATMUL_DESC_TRANSB, &b, sizeof(b)), CUBLAS_STATUS_SUCCESS);
  }
  ~Product() {
    EXPECT_EQ(cublasLtMatmulPreferenceDestroy(preference_), CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(cublasLtMatmulDescDestroy(product_), CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(cublasLtDestroy(handle_), CUBLAS_STATUS_SUCCESS);
  }
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;

  template <typename T>
  cublasStatus_t Prefer(cublasLtMatmulPreferenceAttributes_t attribute, T value) {
    return cublasLtMatmulPreferenceSetAttribute(preference_, attribute, &value, sizeof(value));
  }
  cublasStatus_t Choose(const Matrix& a, const Matrix& b, const Matrix& d) {
    int returned = 0;
    return cublasLtMatmulAlgoGetHeuristic(handle_, product_, a.layout(), b.layout(), d.layout(), d.layout(), preference_, 1,
                                          &result_, &returned);
  }
  cublasStatus_t Multiply(const Matrix& a, const Matrix& b, const Matrix& d, const void* a_data, void* workspace,
                          size_t workspace_bytes, cudaStream_t stream, float alpha = 1.0f, float beta = 0.0f) {
    return cublasLtMatmul(handle_, product_, &alpha, a_data, a.layout(), b.data(), b.layout(), &beta, d.data(), d.layout(),
                          d.data(), d.layout(), &result_.algo, workspace, workspace_bytes, stream);
  }
  const cublasLtMatmulHeuristicResult_t& result() const { return result_; }

 private:
  cublasLtHandle_t handle_ = nullptr;
  cublasLtMatmulDesc_t product_ = nullptr;
  cublasLtMatmulPreference_t preference_ = nullptr;
  cublasLtMatmulHeuristicResult_t result_ = {};
};

TEST(CublasLt, ProductsOfAllKinds) {
  const std::vector<Case> cases = {
      {33, 17, 40, true, false, CUBLASLT_ORDER_COL, CUDA_R_16BF, CUDA_R_16BF, 1.0f, 0.0f},
      {33, 17, 40, true, false, CUBLASLT_ORDER_COL, CUDA_R_16BF, CUDA_R_32F, 1.0f, 0.0f},
      {20, 9, 24, false, false, CUBLASLT_ORDER_COL, CUDA_R_16BF, CUDA_R_32F, 0.5f, 2.0f},
      {20, 9, 24, false, true, CUBLASLT_ORDER_COL, CUDA_R_32F, CUDA_R_32F, 1.0f, 1.0f},
      {7, 30, 8, true, true, CUBLASLT_ORDER_ROW, CUDA_R_32F, CUDA_R_32F, -1.0f, 0.0f},
      {7, 30, 8, true, false, CUBLASLT_ORDER_ROW, CUDA_R_16BF, CUDA_R_32F, 1.0f, 0.0f},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(&c - cases.data());
    const Matrix a(c.transpose_a ? c.k : c.m, c.transpose_a ? c.m : c.k, CUBLASLT_ORDER_COL, c.type, 1);
    const Matrix b(c.transpose_b ? c.n : c.k, c.transpose_b ? c.k : c.n, c.order_b, c.type, 2);
    const Matrix d(c.m, c.n, CUBLASLT_ORDER_COL, c.out_type, 3);
    std::vector<float> expected = d.Read();  // also between the columns, where nothing may be written
    for (int row = 0; row < c.m; ++row) {
      for (int col = 0; col < c.n; ++col) {
        float sum = 0.0f;
        for (int i = 0; i < c.k; ++i)
          sum += (c.transpose_a ? a.At(i, row) : a.At(row, i)) * (c.transpose_b ? b.At(col, i) : b.At(i, col));
        const float value = c.alpha * sum + c.beta * d.At(row, col);
        expected[d.Index(row, col)] = c.out_type == CUDA_R_32F ? value : ToFloat(ToBFloat16(value));
      }
    }
    Product product(c.transpose_a, c.transpose_b);
    ASSERT_EQ(product.Choose(a, b, d), CUBLAS_STATUS_SUCCESS);
    ASSERT_EQ(product.Multiply(a, b, d, a.data(), nullptr, 0, nullptr, c.alpha, c.beta), CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(d.Read(), expected);
  }
}

TEST(CublasLt, IsCapturedAndUsesItsWorkspace) {
  const Matrix a(16, 8, CUBLASLT_ORDER_COL, CUDA_R_16BF, 1), b(8, 8, CUBLASLT_ORDER_COL, CUDA_R_16BF, 2),
      d(16, 8, CUBLASLT_ORDER_COL, CUDA_R_32F, 3);
  const std::vector<float> before = d.Read();
  Product product;
  ASSERT_EQ(product.Prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{1} << 20), CUBLAS_STATUS_SUCCESS);
  ASSERT_EQ(product.Choose(a, b, d), CUBLAS_STATUS_SUCCESS);
  const size_t bytes = product.result().workspaceSize;
  ASSERT_GT(bytes, 0u);
  const DeviceArray<float> workspace(std::vector<float>(bytes / 4, 1.0f));
  EXPECT_EQ(product.Multiply(a, b, d, a.data(), workspace.data(), bytes - 1, nullptr), CUBLAS_STATUS_INVALID_VALUE);

  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  ASSERT_EQ(product.Multiply(a, b, d, a.data(), workspace.data(), bytes, stream), CUBLAS_STATUS_SUCCESS);
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
  EXPECT_EQ(d.Read(), before);
  EXPECT_EQ(workspace.Read()[0], 1.0f);
  ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
  EXPECT_NE(d.Read(), before);
  EXPECT_TRUE(std::isnan(workspace.Read()[0]));  // nothing of anyone else's survives there
  EXPECT_EQ(cudaGraphExecDestroy(exec), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

TEST(CublasLt, RefusesWhatTheLibraryWould) {
  const Matrix a(16, 8, CUBLASLT_ORDER_COL, CUDA_R_16BF, 1), b(8, 8, CUBLASLT_ORDER_COL, CUDA_R_16BF, 2),
      d(16, 8, CUBLASLT_ORDER_COL, CUDA_R_32F, 3);
  const Matrix wrong_depth(9, 8, CUBLASLT_ORDER_COL, CUDA_R_16BF, 2), wrong_type(8, 8, CUBLASLT_ORDER_COL, CUDA_R_32F, 2);
  Product product;
  EXPECT_EQ(product.Choose(a, wrong_depth, d), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(product.Choose(a, b, b), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(product.Choose(a, wrong_type, d), CUBLAS_STATUS_NOT_SUPPORTED);
  EXPECT_EQ(product.Prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint32_t{1}), CUBLAS_STATUS_INVALID_VALUE);
  // A promise of alignment is kept, or the product is refused.
  ASSERT_EQ(product.Prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, uint32_t{16}), CUBLAS_STATUS_SUCCESS);
  ASSERT_EQ(product.Choose(a, b, d), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(product.Multiply(a, b, d, static_cast<uint16_t*>(a.data()) + 4, nullptr, 0, nullptr), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(product.Multiply(a, b, d, nullptr, nullptr, 0, nullptr), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  // And after the device has failed nothing is enqueued.
  emulation::InjectStickyError(cudaErrorIllegalAddress);
  EXPECT_EQ(product.Multiply(a, b, d, a.data(), nullptr, 0, nullptr), CUBLAS_STATUS_EXECUTION_FAILED);
  emulation::InjectStickyError(cudaSuccess);
}

TEST(CublasLtDeathTest, OperandsOutsideOfDeviceMemory) {
  const Matrix a(16, 8, CUBLASLT_ORDER_COL, CUDA_R_16BF, 1), b(8, 8, CUBLASLT_ORDER_COL, CUDA_R_16BF, 2),
      d(16, 8, CUBLASLT_ORDER_COL, CUDA_R_32F, 3);
  Product product;
  ASSERT_EQ(product.Prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, uint32_t{2}), CUBLAS_STATUS_SUCCESS);
  ASSERT_EQ(product.Choose(a, b, d), CUBLAS_STATUS_SUCCESS);
  std::vector<uint16_t> host(1000);
  EXPECT_DEATH(
      {
        (void)product.Multiply(a, b, d, static_cast<uint16_t*>(a.data()) + 9, nullptr, 0, nullptr);
        cudaDeviceSynchronize();
      },
      "cublasLtMatmul: A, .* is not inside an allocation of device memory");
  EXPECT_DEATH(
      {
        (void)product.Multiply(a, b, d, host.data(), nullptr, 0, nullptr);
        cudaDeviceSynchronize();
      },
      "cublasLtMatmul: A, .* is not inside an allocation of device memory");
}

}  // namespace
}  // namespace bebop::emulation_tests
