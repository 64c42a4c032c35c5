// SPDX-License-Identifier: Apache-2.0
#include <cublasLt.h>
#include <gtest/gtest.h>

#include <string>

namespace bebop {
namespace {

// Loading needs no device, so that this is tried wherever the build was made; it skips where cuBLASLt is nowhere to be found.
TEST(CublasLtLoader, CallsReachTheLibrary) {
  const size_t version = cublasLtGetVersion();
  if (version == 0) GTEST_SKIP() << cublasLtGetStatusString(CUBLAS_STATUS_NOT_INITIALIZED);
  EXPECT_EQ(version / 10000, static_cast<size_t>(CUBLAS_VER_MAJOR));
  EXPECT_STREQ(cublasLtGetStatusName(CUBLAS_STATUS_INVALID_VALUE), "CUBLAS_STATUS_INVALID_VALUE");
  // A descriptor is host memory: what is set can be set, and what is wrong is refused.
  cublasLtMatmulDesc_t descriptor = nullptr;
  ASSERT_EQ(cublasLtMatmulDescCreate(&descriptor, CUBLAS_COMPUTE_32F, CUDA_R_32F), CUBLAS_STATUS_SUCCESS);
  const cublasOperation_t transposed = CUBLAS_OP_T;
  EXPECT_EQ(cublasLtMatmulDescSetAttribute(descriptor, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof(transposed)),
            CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(cublasLtMatmulDescSetAttribute(descriptor, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, 1), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(cublasLtMatmulDescDestroy(descriptor), CUBLAS_STATUS_SUCCESS);
}

TEST(CublasLtLoader, WithoutTheLibraryEveryCallSaysSo) {
  if (cublasLtGetVersion() != 0) GTEST_SKIP() << "cuBLASLt is here";
  cublasLtHandle_t handle = nullptr;
  const cublasStatus_t status = cublasLtCreate(&handle);
  EXPECT_EQ(status, CUBLAS_STATUS_NOT_INITIALIZED);
  EXPECT_NE(std::string(cublasLtGetStatusString(status)).find("libcublasLt.so"), std::string::npos)
      << cublasLtGetStatusString(status);
}

}  // namespace
}  // namespace bebop
