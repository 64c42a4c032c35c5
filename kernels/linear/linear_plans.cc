// SPDX-License-Identifier: Apache-2.0
#include <cublasLt.h>

#include <algorithm>
#include <compare>
#include <map>
#include <string>
#include <type_traits>

#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/linear/linear_backward.h"
#include "kernels/linear/linear_cuda.h"

// How a product runs on the device: by our own kernels or by cuBLASLt. cuBLASLt thinks in columns, so that a matrix of ours in
// rows is the transpose of what it sees. As it sees them:
//   y = x Wᵀ, W in rows      y [N, T] = Wᵀ x   A = W [K, N], transposed; B = x [K, T]
//   y = x Wᵀ, W in columns   y [N, T] = W x    A = W [N, K]; B = x [K, T]
//   dW = dyᵀ x               dW [K, N] = x dyᵀ  A = x [K, T]; B = dy [N, T], transposed
// Nothing is transposed in memory: the tensor cores' loads take bf16 operands either way. T may be anything in all three, as it
// is never the length of a line.
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

// D [m, n] = op(A) [m, k] op(B) [k, n], with everything that the choice of an algorithm depends on. A and B are bf16.
struct Shape {
  int64_t m = 0, n = 0, k = 0;
  int64_t a_stride = 0, b_stride = 0, d_stride = 0;  // between columns
  bool transpose_a = false, transpose_b = false;
  uint32_t a_alignment = 0, b_alignment = 0, d_alignment = 0;
  DType d_dtype = DType::kFloat32;
  bool accumulate = false;
  auto operator<=>(const Shape&) const = default;
};

struct Plan {
  Owned<cublasLtMatrixLayout_t> a, b, d;
  cublasLtMatmulAlgo_t algorithm = {};
  uint64_t last_use = 0;
};

// `x` in bf16: itself, or a copy in the scratch.
TensorView Rounded(const TensorView& x, int index, const LinearBackwardScratch& scratch, Stream& stream) {
  if (x.dtype == DType::kBFloat16) return x;
  const TensorView rounded = {scratch.operands[index], DType::kBFloat16, x.rows, x.cols, x.cols};
  BEBOP_CHECK(x.rows * x.cols * ElementBytes(rounded.dtype) <= scratch.bytes);
  Convert(x, rounded, stream);
  return rounded;
}

}  // namespace

struct LinearPlans::Impl {
  // The first failure goes to the stream, in words that say which product it was.
  bool Try(cublasStatus_t status, const char* call, const Shape& shape) {
    if (status == CUBLAS_STATUS_SUCCESS) return true;
    stream->Fail(std::string(call) + " for a product of " + std::to_string(shape.m) + " x " + std::to_string(shape.k) + " and " +
                 std::to_string(shape.k) + " x " + std::to_string(shape.n) + ": " + cublasLtGetStatusString(status));
    return false;
  }
  // The library and the description that all products with these transposes share. Null if the stream has failed.
  cublasLtMatmulDesc_t Open(const Shape& shape);
  // The plan of a shape, made at its first use; it lives until the next call. Null if the stream has failed.
  const Plan* Find(const Shape& shape, cublasLtMatmulDesc_t product);
  // D (+)= op(A) op(B); the shape's alignments are filled in here.
  void Multiply(Shape shape, const void* a, const void* b, void* d);

  Stream* stream = nullptr;
  int32_t* counters = nullptr;  // device memory
  Owned<cublasLtHandle_t> handle;
  Owned<cublasLtMatmulDesc_t> products[2][2];  // by transpose_a, transpose_b
  std::map<Shape, Plan> plans;
  uint64_t num_uses = 0;
};

cublasLtMatmulDesc_t LinearPlans::Impl::Open(const Shape& shape) {
  Owned<cublasLtMatmulDesc_t>& known = products[shape.transpose_a ? 1 : 0][shape.transpose_b ? 1 : 0];
  if (known != nullptr) return known.get();
  if (handle == nullptr) {
    cublasLtHandle_t created = nullptr;
    if (!Try(cublasLtCreate(&created), "cublasLtCreate", shape)) return nullptr;
    handle.reset(created);
  }
  cublasLtMatmulDesc_t created = nullptr;
  if (!Try(cublasLtMatmulDescCreate(&created, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate", shape)) return nullptr;
  Owned<cublasLtMatmulDesc_t> owned(created);
  const auto transpose = [&](cublasLtMatmulDescAttributes_t attribute, bool value) {
    const cublasOperation_t operation = value ? CUBLAS_OP_T : CUBLAS_OP_N;
    return Try(cublasLtMatmulDescSetAttribute(created, attribute, &operation, sizeof(operation)),
               "cublasLtMatmulDescSetAttribute", shape);
  };
  if (!transpose(CUBLASLT_MATMUL_DESC_TRANSA, shape.transpose_a)) return nullptr;
  if (!transpose(CUBLASLT_MATMUL_DESC_TRANSB, shape.transpose_b)) return nullptr;
  known = std::move(owned);
  return known.get();
}

const Plan* LinearPlans::Impl::Find(const Shape& shape, cublasLtMatmulDesc_t product) {
  const auto known = plans.find(shape);
  if (known != plans.end()) {
    known->second.last_use = ++num_uses;
    return &known->second;
  }

  Plan plan;
  const auto layout = [&](Owned<cublasLtMatrixLayout_t>* out, DType dtype, int64_t rows, int64_t cols, int64_t stride) {
    cublasLtMatrixLayout_t created = nullptr;
    const cublasStatus_t status =
        cublasLtMatrixLayoutCreate(&created, TypeOf(dtype), static_cast<uint64_t>(rows), static_cast<uint64_t>(cols), stride);
    out->reset(created);
    return Try(status, "cublasLtMatrixLayoutCreate", shape);
  };
  const bool ta = shape.transpose_a, tb = shape.transpose_b;
  if (!layout(&plan.a, DType::kBFloat16, ta ? shape.k : shape.m, ta ? shape.m : shape.k, shape.a_stride)) return nullptr;
  if (!layout(&plan.b, DType::kBFloat16, tb ? shape.n : shape.k, tb ? shape.k : shape.n, shape.b_stride)) return nullptr;
  if (!layout(&plan.d, shape.d_dtype, shape.m, shape.n, shape.d_stride)) return nullptr;

  cublasLtMatmulPreference_t created = nullptr;
  if (!Try(cublasLtMatmulPreferenceCreate(&created), "cublasLtMatmulPreferenceCreate", shape)) return nullptr;
  const Owned<cublasLtMatmulPreference_t> preference(created);
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    return Try(cublasLtMatmulPreferenceSetAttribute(created, attribute, &value, sizeof(value)),
               "cublasLtMatmulPreferenceSetAttribute", shape);
  };
  if (!prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(stream->workspace_bytes()))) return nullptr;
  if (!prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, shape.a_alignment)) return nullptr;
  if (!prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, shape.b_alignment)) return nullptr;
  if (!prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, shape.d_alignment)) return nullptr;
  if (!prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, shape.d_alignment)) return nullptr;

  cublasLtMatmulHeuristicResult_t result = {};
  int num_results = 0;
  if (!Try(cublasLtMatmulAlgoGetHeuristic(handle.get(), product, plan.a.get(), plan.b.get(), plan.d.get(), plan.d.get(), created,
                                          1, &result, &num_results),
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

void LinearPlans::Impl::Multiply(Shape shape, const void* a, const void* b, void* d) {
  if (!stream->ok()) return;
  shape.a_alignment = AlignmentOf(a);
  shape.b_alignment = AlignmentOf(b);
  shape.d_alignment = AlignmentOf(d);
  const cublasLtMatmulDesc_t product = Open(shape);
  const Plan* const plan = product == nullptr ? nullptr : Find(shape, product);
  if (plan == nullptr) return;
  const float alpha = 1.0f, beta = shape.accumulate ? 1.0f : 0.0f;
  Try(cublasLtMatmul(handle.get(), product, &alpha, a, plan->a.get(), b, plan->b.get(), &beta, d, plan->d.get(), d, plan->d.get(),
                     &plan->algorithm, stream->workspace(), static_cast<size_t>(stream->workspace_bytes()), stream->handle()),
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
  const bool in_rows = w.layout == MatrixLayout::kRows;
  BEBOP_CHECK(w.rows > 0 && w.cols > 0 && w.cols % 8 == 0);
  BEBOP_CHECK(in_rows || (w.layout == MatrixLayout::kColumns && w.dtype == DType::kBFloat16 && w.rows % 8 == 0));
  BEBOP_CHECK(args.x.cols == w.cols && args.y.rows == args.x.rows && args.y.cols == w.rows);
  BEBOP_CHECK(args.x.row_stride >= w.cols && args.x.row_stride % 8 == 0 && args.y.row_stride >= w.rows);
  BEBOP_CHECK(reinterpret_cast<uintptr_t>(args.x.data) % 16 == 0 && reinterpret_cast<uintptr_t>(w.data) % 16 == 0);
  BEBOP_CHECK(args.x.dtype == w.dtype && (w.dtype == DType::kBFloat16 || args.y.dtype == DType::kFloat32));
  if (args.x.rows == 0) return;
  if (w.dtype == DType::kFloat32) {
    LinearFloat32(args, stream);
  } else if (in_rows && (stream.batch_invariant() || args.x.rows <= kMaxStreamRows)) {
    LinearBf16(args, plans.impl_->counters, stream);
  } else {
    plans.impl_->Multiply({.m = w.rows,
                           .n = args.x.rows,
                           .k = w.cols,
                           .a_stride = in_rows ? w.cols : w.rows,
                           .b_stride = args.x.row_stride,
                           .d_stride = args.y.row_stride,
                           .transpose_a = in_rows,
                           .d_dtype = args.y.dtype},
                          w.data, args.x.data, args.y.data);
  }
}

PackedMatrix PackBf16(const TensorView& w, void* destination, Stream& stream) {
  Convert(w, {destination, DType::kBFloat16, w.rows, w.cols, w.cols}, stream);
  return {destination, DType::kBFloat16, w.rows, w.cols, MatrixLayout::kRows};
}

PackedMatrix PackBf16Transposed(const TensorView& w, void* destination, Stream& stream) {
  return InColumns(PackBf16(w, destination, stream));
}

void Clear(const TensorView& view, Stream& stream) {
  if (view.rows == 0 || view.cols == 0) return;
  const auto bytes = [&](int64_t count) { return static_cast<size_t>(count * ElementBytes(view.dtype)); };
  BEBOP_CUDA_TRY(stream, cudaMemset2DAsync(view.data, bytes(view.row_stride), 0, bytes(view.cols), static_cast<size_t>(view.rows),
                                           stream.handle()));
}

void LinearRounded(const LinearArgs& args, LinearPlans& plans, const LinearBackwardScratch& scratch, Stream& stream) {
  if (args.x.rows == 0) return;
  LinearArgs rounded = args;
  if (args.w.dtype == DType::kBFloat16) rounded.x = Rounded(args.x, 0, scratch, stream);
  Linear(rounded, plans, stream);
}

void LinearBackwardWeight(const LinearBackwardWeightArgs& args, LinearPlans& plans, const LinearBackwardScratch& scratch,
                          Stream& stream) {
  const TensorView& dw = args.dw;
  BEBOP_CHECK(plans.impl_->stream == &stream);
  BEBOP_CHECK(args.x.rows == args.dy.rows && dw.rows == args.dy.cols && dw.cols == args.x.cols && dw.dtype == DType::kFloat32);
  BEBOP_CHECK(dw.rows > 0 && dw.cols > 0 && args.x.cols % 8 == 0 && args.dy.cols % 8 == 0);
  if (args.x.rows == 0) {
    if (!args.accumulate) Clear(dw, stream);
    return;
  }
  const TensorView x = Rounded(args.x, 0, scratch, stream), dy = Rounded(args.dy, 1, scratch, stream);
  plans.impl_->Multiply({.m = dw.cols,
                         .n = dw.rows,
                         .k = x.rows,
                         .a_stride = x.row_stride,
                         .b_stride = dy.row_stride,
                         .d_stride = dw.row_stride,
                         .transpose_b = true,
                         .accumulate = args.accumulate},
                        x.data, dy.data, dw.data);
}

}  // namespace bebop::cuda
