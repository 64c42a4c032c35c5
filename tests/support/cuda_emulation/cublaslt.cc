// SPDX-License-Identifier: Apache-2.0
// cuBLASLt on the emulated device: matrix products of bfloat16 or float32 with float32 sums, as kernels/linear asks for them.
// What the library would refuse (types, sizes, strides, broken promises of alignment, too small a workspace) is refused with its
// status; what would be a fault on a device (operands outside of device memory) is a violation. Kinds of products that the engine
// does not use are "not supported". The workspace is filled with NaN by each product: nothing may be expected to survive in it.
#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "memory.h"
#include "runtime.h"
#include "violation.h"

struct cublasLtContext {};

namespace bebop::emulation {
namespace {

// What the opaque structures hold.
struct Layout {
  uint64_t rows;
  uint64_t cols;
  int64_t leading;
  int32_t type;
  int32_t order;
};
struct Product {
  int32_t compute_type;
  int32_t scale_type;
  int32_t transpose_a;
  int32_t transpose_b;
};
struct Preference {
  uint64_t workspace_bytes;
  std::array<uint32_t, 4> alignments;  // of A, B, C, D
};
struct Algorithm {
  uint64_t magic;
  uint64_t workspace_bytes;
  std::array<uint32_t, 4> alignments;
};
constexpr uint64_t kMagic = 0x6265626f70616c67;
constexpr uint64_t kWantedWorkspaceBytes = 1 << 20;
static_assert(sizeof(Layout) <= sizeof(cublasLtMatrixLayoutOpaque_t) && sizeof(Product) <= sizeof(cublasLtMatmulDescOpaque_t) &&
              sizeof(Preference) <= sizeof(cublasLtMatmulPreferenceOpaque_t) &&
              sizeof(Algorithm) <= sizeof(cublasLtMatmulAlgo_t));

template <typename Content, typename Opaque>
Content Get(const Opaque& opaque) {
  Content content;
  std::memcpy(&content, &opaque, sizeof(content));
  return content;
}
template <typename Content, typename Opaque>
void Put(const Content& content, Opaque* opaque) {
  std::memcpy(opaque, &content, sizeof(content));
}

// Stores an attribute's value into `member`.
template <typename T>
cublasStatus_t Store(const void* value, size_t bytes, T* member) {
  if (value == nullptr || bytes != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(member, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

int64_t ElementBytes(int32_t type) { return type == CUDA_R_32F ? 4 : 2; }

// A matrix as the product reads it: element (row, col) of op(M) is at row * row_stride + col * col_stride.
struct View {
  const char* data;
  int64_t rows, cols, row_stride, col_stride;
  int32_t type;
  float At(int64_t row, int64_t col) const {
    const int64_t index = row * row_stride + col * col_stride;
    if (type == CUDA_R_32F) {
      float value;
      std::memcpy(&value, data + index * 4, 4);
      return value;
    }
    uint16_t bits;
    std::memcpy(&bits, data + index * 2, 2);
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
};

View ViewOf(const void* data, const Layout& layout, bool transpose) {
  View view = {.data = static_cast<const char*>(data),
               .rows = static_cast<int64_t>(layout.rows),
               .cols = static_cast<int64_t>(layout.cols),
               .row_stride = layout.order == CUBLASLT_ORDER_COL ? 1 : layout.leading,
               .col_stride = layout.order == CUBLASLT_ORDER_COL ? layout.leading : 1,
               .type = layout.type};
  if (transpose) {
    std::swap(view.rows, view.cols);
    std::swap(view.row_stride, view.col_stride);
  }
  return view;
}

// Bytes from the first element to the last.
size_t Extent(const Layout& layout) {
  const int64_t lines = static_cast<int64_t>(layout.order == CUBLASLT_ORDER_COL ? layout.cols : layout.rows);
  const int64_t length = static_cast<int64_t>(layout.order == CUBLASLT_ORDER_COL ? layout.rows : layout.cols);
  return static_cast<size_t>(((lines - 1) * layout.leading + length) * ElementBytes(layout.type));
}

void RequireDeviceMemory(const void* pointer, size_t bytes, const char* what) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const Allocation* const allocation = FindAllocation(address);
  if (allocation == nullptr || allocation->freed || allocation->kind != MemoryKind::kDevice || address < allocation->begin ||
      address + bytes > allocation->end) {
    Violation(std::string("cublasLtMatmul: ") + what + ", " + std::to_string(bytes) + " bytes at " + Hex(pointer) +
              ", is not inside an allocation of device memory");
  }
}

// Rows of `count` floats, each a row or column of the operand.
std::vector<float> Unpack(const View& view, bool by_rows) {
  const int64_t lines = by_rows ? view.rows : view.cols, count = by_rows ? view.cols : view.rows;
  std::vector<float> values(static_cast<size_t>(lines * count));
  for (int64_t line = 0; line < lines; ++line) {
    for (int64_t i = 0; i < count; ++i)
      values[static_cast<size_t>(line * count + i)] = by_rows ? view.At(line, i) : view.At(i, line);
  }
  return values;
}

// Sixteen partial sums: one of the many orders that a device may add in.
float Dot(const float* a, const float* b, int64_t count) {
  constexpr int kSums = 16;
  float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int s = 0; s < kSums; ++s) sums[s] += a[i + s] * b[i + s];
  }
  for (int s = 0; i < count; ++i, ++s) sums[s] += a[i] * b[i];
  float sum = 0.0f;
  for (int s = 0; s < kSums; ++s) sum += sums[s];
  return sum;
}

void WriteElement(char* data, int64_t index, int32_t type, float value) {
  if (type == CUDA_R_32F) {
    std::memcpy(data + index * 4, &value, 4);
    return;
  }
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t half = (bits & 0x7fffffffu) > 0x7f800000u ? static_cast<uint16_t>((bits >> 16) | 0x40u)
                                                           : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  std::memcpy(data + index * 2, &half, 2);
}

struct Call {
  Product product;
  Layout a_layout, b_layout, c_layout, d_layout;
  const void *a, *b, *c;
  void *d, *workspace;
  size_t workspace_bytes;  // that the algorithm uses
  float alpha, beta;

  void Run() const {
    RequireDeviceMemory(a, Extent(a_layout), "A");
    RequireDeviceMemory(b, Extent(b_layout), "B");
    if (beta != 0.0f) RequireDeviceMemory(c, Extent(c_layout), "C");
    RequireDeviceMemory(d, Extent(d_layout), "D");
    if (workspace_bytes > 0) {
      RequireDeviceMemory(workspace, workspace_bytes, "the workspace");
      std::memset(workspace, 0xff, workspace_bytes);
    }
    const View a_view = ViewOf(a, a_layout, product.transpose_a == CUBLAS_OP_T),
               b_view = ViewOf(b, b_layout, product.transpose_b == CUBLAS_OP_T);
    const View c_view = ViewOf(c, c_layout, false), d_view = ViewOf(d, d_layout, false);
    const std::vector<float> a_rows = Unpack(a_view, true), b_cols = Unpack(b_view, false);
    const int64_t depth = a_view.cols;
    for (int64_t col = 0; col < d_view.cols; ++col) {
      for (int64_t row = 0; row < d_view.rows; ++row) {
        float value = alpha * Dot(a_rows.data() + row * depth, b_cols.data() + col * depth, depth);
        if (beta != 0.0f) value += beta * c_view.At(row, col);
        WriteElement(static_cast<char*>(d), row * d_view.row_stride + col * d_view.col_stride, d_view.type, value);
      }
    }
  }
};

bool SoundLayout(const Layout& layout) {
  const uint64_t length = layout.order == CUBLASLT_ORDER_COL ? layout.rows : layout.cols;
  return layout.rows > 0 && layout.cols > 0 && layout.leading > 0 && static_cast<uint64_t>(layout.leading) >= length;
}

// Whether the library has an algorithm for such a product.
cublasStatus_t CheckProduct(const Product& product, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
  if (!SoundLayout(a) || !SoundLayout(b) || !SoundLayout(c) || !SoundLayout(d)) return CUBLAS_STATUS_INVALID_VALUE;
  const View a_view = ViewOf(nullptr, a, product.transpose_a == CUBLAS_OP_T),
             b_view = ViewOf(nullptr, b, product.transpose_b == CUBLAS_OP_T);
  const bool fits = a_view.cols == b_view.rows && a_view.rows == static_cast<int64_t>(d.rows) &&
                    b_view.cols == static_cast<int64_t>(d.cols) && c.rows == d.rows && c.cols == d.cols && c.order == d.order;
  if (!fits) return CUBLAS_STATUS_INVALID_VALUE;
  const bool from_bf16 = a.type == CUDA_R_16BF && b.type == CUDA_R_16BF && (d.type == CUDA_R_16BF || d.type == CUDA_R_32F);
  const bool from_float = a.type == CUDA_R_32F && b.type == CUDA_R_32F && d.type == CUDA_R_32F;
  if (!(from_bf16 || from_float) || c.type != d.type) return CUBLAS_STATUS_NOT_SUPPORTED;
  // Rounding to TF32 is what only a device would do: products that ask for it are not offered.
  if (product.compute_type != CUBLAS_COMPUTE_32F || product.scale_type != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
  return CUBLAS_STATUS_SUCCESS;
}

bool Aligned(const void* pointer, uint64_t alignment) { return reinterpret_cast<uintptr_t>(pointer) % alignment == 0; }

}  // namespace
}  // namespace bebop::emulation

using namespace bebop::emulation;  // of this file's own names, for the C functions below

extern "C" {

const char* cublasLtGetStatusName(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS:
      return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED:
      return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_INVALID_VALUE:
      return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_EXECUTION_FAILED:
      return "CUBLAS_STATUS_EXECUTION_FAILED";
    case CUBLAS_STATUS_NOT_SUPPORTED:
      return "CUBLAS_STATUS_NOT_SUPPORTED";
    default:
      return "CUBLAS_STATUS_INTERNAL_ERROR";
  }
}
const char* cublasLtGetStatusString(cublasStatus_t status) { return cublasLtGetStatusName(status); }
size_t cublasLtGetVersion() { return CUBLAS_VERSION; }

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  if (handle == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) return CUBLAS_STATUS_NOT_INITIALIZED;
  *handle = new cublasLtContext;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  delete handle;
  return CUBLAS_STATUS_SUCCESS;
}

// ---- Descriptions ----

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows, uint64_t cols,
                                          int64_t leading) {
  if (layout == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  *layout = new cublasLtMatrixLayoutOpaque_t{};
  Put(Layout{.rows = rows, .cols = cols, .leading = leading, .type = type, .order = CUBLASLT_ORDER_COL}, *layout);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  delete layout;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t attribute,
                                                const void* value, size_t bytes) {
  if (layout == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  Layout content = Get<Layout>(*layout);
  cublasStatus_t status = CUBLAS_STATUS_NOT_SUPPORTED;
  switch (attribute) {
    case CUBLASLT_MATRIX_LAYOUT_ROWS:
      status = Store(value, bytes, &content.rows);
      break;
    case CUBLASLT_MATRIX_LAYOUT_COLS:
      status = Store(value, bytes, &content.cols);
      break;
    case CUBLASLT_MATRIX_LAYOUT_LD:
      status = Store(value, bytes, &content.leading);
      break;
    case CUBLASLT_MATRIX_LAYOUT_ORDER:
      status = Store(value, bytes, &content.order);
      if (content.order != CUBLASLT_ORDER_COL && content.order != CUBLASLT_ORDER_ROW) return CUBLAS_STATUS_NOT_SUPPORTED;
      break;
    default:
      break;
  }
  if (status == CUBLAS_STATUS_SUCCESS) Put(content, layout);
  return status;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* product, cublasComputeType_t compute_type,
                                        cudaDataType_t scale_type) {
  if (product == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  *product = new cublasLtMatmulDescOpaque_t{};
  Put(Product{.compute_type = compute_type, .scale_type = scale_type, .transpose_a = CUBLAS_OP_N, .transpose_b = CUBLAS_OP_N},
      *product);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t product) {
  delete product;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
  if (product == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  Product content = Get<Product>(*product);
  int32_t word = 0;
  if (const cublasStatus_t status = Store(value, bytes, &word); status != CUBLAS_STATUS_SUCCESS) return status;
  const bool operation = word == CUBLAS_OP_N || word == CUBLAS_OP_T;
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
      if (!operation) return CUBLAS_STATUS_NOT_SUPPORTED;
      content.transpose_a = word;
      break;
    case CUBLASLT_MATMUL_DESC_TRANSB:
      if (!operation) return CUBLAS_STATUS_NOT_SUPPORTED;
      content.transpose_b = word;
      break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      if (word != CUBLASLT_EPILOGUE_DEFAULT) return CUBLAS_STATUS_NOT_SUPPORTED;
      break;
    case CUBLASLT_MATMUL_DESC_POINTER_MODE:
      if (word != CUBLASLT_POINTER_MODE_HOST) return CUBLAS_STATUS_NOT_SUPPORTED;
      break;
    default:
      return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  Put(content, product);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  if (preference == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  *preference = new cublasLtMatmulPreferenceOpaque_t{};
  Put(Preference{.workspace_bytes = 0, .alignments = {256, 256, 256, 256}}, *preference);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  delete preference;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
                                                    size_t bytes) {
  if (preference == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  Preference content = Get<Preference>(*preference);
  cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
  uint32_t ignored = 0;
  switch (attribute) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
      status = Store(value, bytes, &content.workspace_bytes);
      break;
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
      status = Store(value, bytes, &content.alignments[0]);
      break;
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
      status = Store(value, bytes, &content.alignments[1]);
      break;
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
      status = Store(value, bytes, &content.alignments[2]);
      break;
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
      status = Store(value, bytes, &content.alignments[3]);
      break;
    // Choices among algorithms that differ in nothing here.
    case CUBLASLT_MATMUL_PREF_SEARCH_MODE:
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
      status = Store(value, bytes, &ignored);
      break;
    default:
      return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  if (status == CUBLAS_STATUS_SUCCESS) Put(content, preference);
  return status;
}

// ---- Products ----

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t product, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int requested,
                                              cublasLtMatmulHeuristicResult_t results[], int* returned) {
  if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (product == nullptr || a == nullptr || b == nullptr || c == nullptr || d == nullptr || preference == nullptr ||
      requested < 1 || results == nullptr || returned == nullptr) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  *returned = 0;
  const std::array<Layout, 4> layouts = {Get<Layout>(*a), Get<Layout>(*b), Get<Layout>(*c), Get<Layout>(*d)};
  if (const cublasStatus_t status = CheckProduct(Get<Product>(*product), layouts[0], layouts[1], layouts[2], layouts[3]);
      status != CUBLAS_STATUS_SUCCESS) {
    return status;
  }
  const Preference wanted = Get<Preference>(*preference);
  for (size_t i = 0; i < layouts.size(); ++i) {
    const uint32_t alignment = wanted.alignments[i];
    if (!std::has_single_bit(alignment) || alignment < static_cast<uint32_t>(ElementBytes(layouts[i].type)))
      return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  results[0] = {};
  const uint64_t workspace_bytes = std::min(wanted.workspace_bytes, kWantedWorkspaceBytes);
  Put(Algorithm{.magic = kMagic, .workspace_bytes = workspace_bytes, .alignments = wanted.alignments}, &results[0].algo);
  results[0].workspaceSize = workspace_bytes;
  results[0].state = CUBLAS_STATUS_SUCCESS;
  results[0].wavesCount = 1.0f;
  *returned = 1;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t product, const void* alpha, const void* a,
                              cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout, const void* beta,
                              const void* c, cublasLtMatrixLayout_t c_layout, void* d, cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t* algorithm, void* workspace, size_t workspace_bytes,
                              cudaStream_t stream) {
  if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (product == nullptr || alpha == nullptr || beta == nullptr || a == nullptr || b == nullptr || d == nullptr ||
      a_layout == nullptr || b_layout == nullptr || c_layout == nullptr || d_layout == nullptr) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  Call call = {.product = Get<Product>(*product),
               .a_layout = Get<Layout>(*a_layout),
               .b_layout = Get<Layout>(*b_layout),
               .c_layout = Get<Layout>(*c_layout),
               .d_layout = Get<Layout>(*d_layout),
               .a = a,
               .b = b,
               .c = c,
               .d = d,
               .workspace = workspace,
               .workspace_bytes = 0,
               .alpha = 0.0f,
               .beta = 0.0f};
  if (const cublasStatus_t status = CheckProduct(call.product, call.a_layout, call.b_layout, call.c_layout, call.d_layout);
      status != CUBLAS_STATUS_SUCCESS) {
    return status;
  }
  std::memcpy(&call.alpha, alpha, sizeof(float));
  std::memcpy(&call.beta, beta, sizeof(float));
  if (call.beta != 0.0f && c == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  if (algorithm != nullptr) {
    const Algorithm chosen = Get<Algorithm>(*algorithm);
    if (chosen.magic != kMagic) return CUBLAS_STATUS_INVALID_VALUE;
    if (workspace_bytes < chosen.workspace_bytes ||
        (chosen.workspace_bytes > 0 && (workspace == nullptr || !Aligned(workspace, 16)))) {
      return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (!Aligned(a, chosen.alignments[0]) || !Aligned(b, chosen.alignments[1]) || !Aligned(c, chosen.alignments[2]) ||
        !Aligned(d, chosen.alignments[3])) {
      return CUBLAS_STATUS_INVALID_VALUE;
    }
    call.workspace_bytes = chosen.workspace_bytes;
  }
  if (!Aligned(a, static_cast<uint64_t>(ElementBytes(call.a_layout.type))) ||
      !Aligned(b, static_cast<uint64_t>(ElementBytes(call.b_layout.type))) ||
      !Aligned(d, static_cast<uint64_t>(ElementBytes(call.d_layout.type)))) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  return EnqueueWork(stream, [call] { call.Run(); }) == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

}  // extern "C"
