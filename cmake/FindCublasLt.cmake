# SPDX-License-Identifier: Apache-2.0
# cuBLASLt from the CUDA toolkit or, where the toolkit has none, from the `nvidia-cublas` wheel of the same CUDA major version in
# BEBOP_CUDA_WHEELS (set by BebopCuda.cmake).
#   CublasLt_INCLUDE_DIR
#   CublasLt_LIBRARY       where programs of this build may load it from; may be missing, since they look in the system's places first
set(_hints ${CUDAToolkit_LIBRARY_ROOT} ${CUDAToolkit_TARGET_DIR} ${BEBOP_CUDA_WHEELS})
find_path(CublasLt_INCLUDE_DIR cublasLt.h HINTS ${_hints} PATH_SUFFIXES include)
find_library(CublasLt_LIBRARY NAMES cublasLt libcublasLt.so.${CUDAToolkit_VERSION_MAJOR} HINTS ${_hints} PATH_SUFFIXES lib lib64)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(CublasLt REQUIRED_VARS CublasLt_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "run `deploy/install_deps.sh cuda` and set BEBOP_PYTHON=build/venv/bin/python, or install the toolkit's cuBLAS")
mark_as_advanced(CublasLt_INCLUDE_DIR CublasLt_LIBRARY)
