# SPDX-License-Identifier: Apache-2.0
# cuBLASLt from the CUDA toolkit or, where the toolkit has none, from the `nvidia-cublas` wheel of the same CUDA major version, as installed in
# the site-packages of BEBOP_PYTHON (default: python3).
#   CublasLt_INCLUDE_DIR, CublasLt_LIBRARY (not needed, and not looked for, by the emulated build)
set(_hints ${CUDAToolkit_LIBRARY_ROOT} ${CUDAToolkit_TARGET_DIR})
set(_python ${BEBOP_PYTHON})
if(NOT _python)
  set(_python python3)
endif()
execute_process(COMMAND ${_python} -c "import sysconfig; print(sysconfig.get_paths()['purelib'])"
                OUTPUT_VARIABLE _site OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(_site)
  list(APPEND _hints ${_site}/nvidia/cu${CUDAToolkit_VERSION_MAJOR})
endif()
find_path(CublasLt_INCLUDE_DIR cublasLt.h HINTS ${_hints} PATH_SUFFIXES include)
find_library(CublasLt_LIBRARY NAMES cublasLt libcublasLt.so.${CUDAToolkit_VERSION_MAJOR} HINTS ${_hints} PATH_SUFFIXES lib lib64)
include(FindPackageHandleStandardArgs)
if(BEBOP_EMULATE_CUDA)
  find_package_handle_standard_args(CublasLt REQUIRED_VARS CublasLt_INCLUDE_DIR)
else()
  find_package_handle_standard_args(CublasLt REQUIRED_VARS CublasLt_LIBRARY CublasLt_INCLUDE_DIR
    REASON_FAILURE_MESSAGE "install the toolkit's cuBLAS, or `pip install nvidia-cublas==${CUDAToolkit_VERSION_MAJOR}.*` and set BEBOP_PYTHON")
endif()
mark_as_advanced(CublasLt_INCLUDE_DIR CublasLt_LIBRARY)
