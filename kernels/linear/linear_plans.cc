// SPDX-License-Identifier: Apache-2.0
#include <cublasLt.h>

#include <algorithm>
#include <compare>
#include <map>
#include <string>
#include <type_traits>

#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/linear/linear_cuda.h"

// How a product runs on the device: by our own kernels or by cuBLASLt. cuBLASLt thinks in columns: y's rows are the columns of an
// [N, T] matrix, w's those of a [K, N] one that is transposed, x's those of a [K, T] one.
namespace bebop::cuda {
namespace {

struct Destroy {
  void operator()(cublasLtHandle_t handle) const { (void)cublasLtDestroy(handle); }
  void operator()(cublasLtMatmulDesc_t description) const { (void)cublasLtMatmulDescDestroy(description); }
  void operator()(cublasLtMatrixLayout_t layout) const { (void)cublasLtMatrixLayoutDestroy(layout); }
  void operator()(cublasLtMatmulPreference_t preference) const { (void)cublasLtMatmulPreferenceDestroy(preference); }
};
template <typename Handle>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy>;

cudaDataType_t TypeOf(DType dtype) { return dtype == DType::kFloat32 ? CUDA_R_32F : CUDA_R_16BF; }

// The largest power of two up to 256 that divides an address: what cuBLASLt may assume of it.
uint32_t AlignmentOf(const void* pointer) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(pointer) | 256;
  return static_cast<uint32_t>(bits & (~bits + 1));
}

// Everything that the choice of an algorithm depends on.
struct Shape {
  int64_t n = 0, k = 0, t = 0;
  int64_t x_stride = 0, y_stride = 0;
  uint32_t w_alignment = 0, x_alignment = 0, y_alignment = 0;
  DType y_dtype = DType::kFloat32;
  auto operator<=>(const Shape&) const = default;
};

struct Plan {
  Owned<cublasLtMatrixLayout_t> w, x, y;
  cublasLtMatmulAlgo_t algorithm = {};
  uint64_t last_use = 0;
};

}  // namespace

struct LinearPlans::Impl {
  // The first failure goes to the stream, in words that say which product it was.
  bool Try(cublasStatus_t status, const char* call, const Shape& shape) {
    if (status == CUBLAS_STATUS_SUCCESS) return true;
    stream->Fail(std::string(call) + " for a product of " + std::to_string(shape.t) + " rows with " + std::to_string(shape.n) +
                 " x " + std::to_string(shape.k) + " weights: " + cublasLtGetStatusString(status));
    return false;
  }
  // The library and the one description that all products share. False if the stream has failed.
  bool Open(const Shape& shape);
  // The plan of a shape, made at its first use; it lives until the next call. Null if the stream has failed.
  const Plan* Find(const Shape& shape);
  void Multiply(const LinearArgs& args);

  Stream* stream = nullptr;
  int32_t* counters = nullptr;  // device memory
  Owned<cublasLtHandle_t> handle;
  Owned<cublasLtMatmulDesc_t> product;
  std::map<Shape, Plan> plans;
  uint64_t num_uses = 0;
};

bool LinearPlans::Impl::Open(const Shape& shape) {
  if (product != nullptr) return true;
  cublasLtHandle_t new_handle = nullptr;
  if (!Try(cublasLtCreate(&new_handle), "cublasLtCreate", shape)) return false;
  handle.reset(new_handle);
  cublasLtMatmulDesc_t new_product = nullptr;
  if (!Try(cublasLtMatmulDescCreate(&new_product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate", shape))
    return false;
  Owned<cublasLtMatmulDesc_t> owned(new_product);
  const cublasOperation_t transpose = CUBLAS_OP_T;
  if (!Try(cublasLtMatmulDescSetAttribute(new_product, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof(transpose)),
           "cublasLtMatmulDescSetAttribute", shape)) {
    return false;
  }
  product = std::move(owned);
  return true;
}

const Plan* LinearPlans::Impl::Find(const Shape& shape) {
  const auto known = plans.find(shape);
  if (known != plans.end()) {
    known->second.last_use = ++num_uses;
    return &known->second;
  }
  if (!Open(shape)) return nullptr;

  Plan plan;
  const auto layout = [&](Owned<cublasLtMatrixLayout_t>* out, DType dtype, int64_t rows, int64_t cols, int64_t stride) {
    cublasLtMatrixLayout_t created = nullptr;
    const cublasStatus_t status =
        cublasLtMatrixLayoutCreate(&created, TypeOf(dtype), static_cast<uint64_t>(rows), static_cast<uint64_t>(cols), stride);
    out->reset(created);
    return Try(status, "cublasLtMatrixLayoutCreate", shape);
  };
  if (!layout(&plan.w, DType::kBFloat16, shape.k, shape.n, shape.k)) return nullptr;
  if (!layout(&plan.x, DType::kBFloat16, shape.k, shape.t, shape.x_stride)) return nullptr;
  if (!layout(&plan.y, shape.y_dtype, shape.n, shape.t, shape.y_stride)) return nullptr;

  cublasLtMatmulPreference_t created = nullptr;
  if (!Try(cublasLtMatmulPreferenceCreate(&created), "cublasLtMatmulPreferenceCreate", shape)) return nullptr;
  const Owned<cublasLtMatmulPreference_t> preference(created);
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    return Try(cublasLtMatmulPreferenceSetAttribute(created, attribute, &value, sizeof(value)),
               "cublasLtMatmulPreferenceSetAttribute", shape);
  };
  if (!prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(stream->workspace_bytes()))) return nullptr;
  if (!prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, shape.w_alignment)) return nullptr;
  if (!prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, shape.x_alignment)) return nullptr;
  if (!prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, shape.y_alignment)) return nullptr;
  if (!prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, shape.y_alignment)) return nullptr;

  cublasLtMatmulHeuristicResult_t result = {};
  int num_results = 0;
  if (!Try(cublasLtMatmulAlgoGetHeuristic(handle.get(), product.get(), plan.w.get(), plan.x.get(), plan.y.get(), plan.y.get(),
                                          created, 1, &result, &num_results),
           "cublasLtMatmulAlgoGetHeuristic", shape)) {
    return nullptr;
  }
  if (!Try(num_results == 1 ? result.state : CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmulAlgoGetHeuristic", shape))
    return nullptr;
  plan.algorithm = result.algo;
  plan.last_use = ++num_uses;
  // What has been enqueued or captured needs its plan no more. A search takes as long as a fraction of the heuristic above.
  if (static_cast<int64_t>(plans.size()) == LinearPlans::kMaxPlans) {
    plans.erase(std::min_element(plans.begin(), plans.end(),
                                 [](const auto& a, const auto& b) { return a.second.last_use < b.second.last_use; }));
  }
  return &plans.emplace(shape, std::move(plan)).first->second;
}

void LinearPlans::Impl::Multiply(const LinearArgs& args) {
  if (!stream->ok()) return;
  const Shape shape = {.n = args.w.rows,
                       .k = args.w.cols,
                       .t = args.x.rows,
                       .x_stride = args.x.row_stride,
                       .y_stride = args.y.row_stride,
                       .w_alignment = AlignmentOf(args.w.data),
                       .x_alignment = AlignmentOf(args.x.data),
                       .y_alignment = AlignmentOf(args.y.data),
                       .y_dtype = args.y.dtype};
  const Plan* const plan = Find(shape);
  if (plan == nullptr) return;
  const float alpha = 1.0f, beta = 0.0f;
  Try(cublasLtMatmul(handle.get(), product.get(), &alpha, args.w.data, plan->w.get(), args.x.data, plan->x.get(), &beta,
                     args.y.data, plan->y.get(), args.y.data, plan->y.get(), &plan->algorithm, stream->workspace(),
                     static_cast<size_t>(stream->workspace_bytes()), stream->handle()),
      "cublasLtMatmul", shape);
}

LinearPlans::LinearPlans(Stream* stream) : impl_(std::make_unique<Impl>()) {
  impl_->stream = stream;
  void* counters = nullptr;
  BEBOP_CUDA_TRY(*stream, cudaMalloc(&counters, kNumCounters * sizeof(int32_t)));
  BEBOP_CUDA_TRY(*stream, cudaMemsetAsync(counters, 0, kNumCounters * sizeof(int32_t), stream->handle()));
  impl_->counters = static_cast<int32_t*>(counters);
}

LinearPlans::~LinearPlans() {
  // Waits for the launches that use them; after a sticky error it fails, and nobody is left to tell.
  if (impl_->counters != nullptr) (void)cudaFree(impl_->counters);
}

int64_t LinearPlans::num_plans() const { return static_cast<int64_t>(impl_->plans.size()); }

void Linear(const LinearArgs& args, LinearPlans& plans, Stream& stream) {
  const PackedMatrix& w = args.w;
  BEBOP_CHECK(plans.impl_->stream == &stream);
  BEBOP_CHECK(w.layout == MatrixLayout::kRows && w.rows > 0 && w.cols > 0 && w.cols % 8 == 0);
  BEBOP_CHECK(args.x.cols == w.cols && args.y.rows == args.x.rows && args.y.cols == w.rows);
  BEBOP_CHECK(args.x.row_stride >= w.cols && args.x.row_stride % 8 == 0 && args.y.row_stride >= w.rows);
  BEBOP_CHECK(reinterpret_cast<uintptr_t>(args.x.data) % 16 == 0 && reinterpret_cast<uintptr_t>(w.data) % 16 == 0);
  BEBOP_CHECK(args.x.dtype == w.dtype && (w.dtype == DType::kBFloat16 || args.y.dtype == DType::kFloat32));
  if (args.x.rows == 0) return;
  if (w.dtype == DType::kFloat32) {
    LinearFloat32(args, stream);
  } else if (stream.batch_invariant() || args.x.rows <= kMaxStreamRows) {
    LinearBf16(args, plans.impl_->counters, stream);
  } else {
    plans.impl_->Multiply(args);
  }
}

}  // namespace bebop::cuda
