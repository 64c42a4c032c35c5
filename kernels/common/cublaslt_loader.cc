// SPDX-License-Identifier: Apache-2.0
// cuBLASLt at run time. The library has some 400 MB, and one build serves machines that have it in the toolkit, in PyTorch's
// wheels, or, to run on the CPU, not at all. So programs do not link it: the functions that we call are defined here and forward
// to the library, which is opened at the first call. Without it every call returns CUBLAS_STATUS_NOT_INITIALIZED, and
// cublasLtGetStatusString says where it was looked for. A function that is missing here is a link error.

#include <cublasLt.h>
#include <dlfcn.h>

#include <string>

#define BEBOP_STRING_OF(x) #x
#define BEBOP_STRING(x) BEBOP_STRING_OF(x)

namespace bebop::cuda {
namespace {

struct Library {
  void* handle = nullptr;
  std::string error;
};

Library Open() {
  const std::string name = "libcublasLt.so." BEBOP_STRING(CUBLAS_VER_MAJOR);
  Library library;
  // By the loader's own rules first (LD_LIBRARY_PATH, the system's cache).
  for (const std::string& path : {name, "/usr/local/cuda/lib64/" + name, std::string(BEBOP_CUBLASLT_OF_BUILD)}) {
    if (path.empty()) continue;
    library.handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library.handle != nullptr) return library;
    const char* why = dlerror();
    library.error += (library.error.empty() ? "cuBLASLt cannot be loaded: " : "; ") + std::string(why != nullptr ? why : path);
  }
  library.error += "; install CUDA's cuBLAS or the nvidia-cublas wheel and name its folder in LD_LIBRARY_PATH";
  return library;
}

const Library& TheLibrary() {
  static const Library* const library = new Library(Open());  // never freed: calls may come as late as static destructors
  return *library;
}

// The library's function of that name, or null. kDeclared makes one instance, and so one look-up, a function.
template <auto kDeclared>
decltype(kDeclared) Find(const char* name) {
  static const auto function =
      TheLibrary().handle == nullptr ? nullptr : reinterpret_cast<decltype(kDeclared)>(dlsym(TheLibrary().handle, name));
  return function;
}

template <auto kDeclared, typename... Args>
cublasStatus_t Forward(const char* name, Args... args) {
  const auto function = Find<kDeclared>(name);
  return function == nullptr ? CUBLAS_STATUS_NOT_INITIALIZED : function(args...);
}

}  // namespace
}  // namespace bebop::cuda

#define BEBOP_FORWARD(name, ...) return bebop::cuda::Forward<&name>(#name, __VA_ARGS__)

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) { BEBOP_FORWARD(cublasLtCreate, handle); }
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { BEBOP_FORWARD(cublasLtDestroy, handle); }

size_t cublasLtGetVersion() {
  const auto function = bebop::cuda::Find<&cublasLtGetVersion>("cublasLtGetVersion");
  return function == nullptr ? 0 : function();
}

const char* cublasLtGetStatusString(cublasStatus_t status) {
  const auto function = bebop::cuda::Find<&cublasLtGetStatusString>("cublasLtGetStatusString");
  return function == nullptr ? bebop::cuda::TheLibrary().error.c_str() : function(status);
}

const char* cublasLtGetStatusName(cublasStatus_t status) {
  const auto function = bebop::cuda::Find<&cublasLtGetStatusName>("cublasLtGetStatusName");
  return function == nullptr ? "CUBLAS_STATUS_NOT_INITIALIZED" : function(status);
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* descriptor, cublasComputeType_t compute_type,
                                        cudaDataType_t scale_type) {
  BEBOP_FORWARD(cublasLtMatmulDescCreate, descriptor, compute_type, scale_type);
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t descriptor) {
  BEBOP_FORWARD(cublasLtMatmulDescDestroy, descriptor);
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t descriptor, cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
  BEBOP_FORWARD(cublasLtMatmulDescSetAttribute, descriptor, attribute, value, bytes);
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows, uint64_t cols,
                                          int64_t stride) {
  BEBOP_FORWARD(cublasLtMatrixLayoutCreate, layout, type, rows, cols, stride);
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { BEBOP_FORWARD(cublasLtMatrixLayoutDestroy, layout); }

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  BEBOP_FORWARD(cublasLtMatmulPreferenceCreate, preference);
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  BEBOP_FORWARD(cublasLtMatmulPreferenceDestroy, preference);
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
                                                    size_t bytes) {
  BEBOP_FORWARD(cublasLtMatmulPreferenceSetAttribute, preference, attribute, value, bytes);
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t descriptor, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int requested,
                                              cublasLtMatmulHeuristicResult_t* results, int* num_results) {
  BEBOP_FORWARD(cublasLtMatmulAlgoGetHeuristic, handle, descriptor, a, b, c, d, preference, requested, results, num_results);
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t descriptor, const void* alpha, const void* a,
                              cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout, const void* beta,
                              const void* c, cublasLtMatrixLayout_t c_layout, void* d, cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t* algo, void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  BEBOP_FORWARD(cublasLtMatmul, handle, descriptor, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout, algo,
                workspace, workspace_bytes, stream);
}

}  // extern "C"
