# SPDX-License-Identifier: Apache-2.0
# The CUDA backend in one of two builds:
#   BEBOP_ENABLE_CUDA   nvcc compiles the kernels for real devices (preset cuda-release);
#   BEBOP_EMULATE_CUDA  the host compiler builds the very same files against an emulated device that runs them on the CPU, with checks
#                       (preset cuda-emulated; tests only, see tests/support/cuda_emulation/README.md).
# BEBOP_HAS_CUDA is true in both. Targets:
#   bebop::cuda_runtime   headers, and what a program with device code links
#   bebop::cublaslt       cublasLt.h, and what loads its library at run time (kernels/common/cublaslt_loader.cc) or the emulated one
#   bebop_cuda_tests      builds every test labelled `cuda`
#   bebop_cuda_benches    builds every benchmark of tests/bench/gpu
option(BEBOP_ENABLE_CUDA "Build the CUDA backend with nvcc" OFF)
option(BEBOP_EMULATE_CUDA "Build the CUDA backend for the emulated device of the tests" OFF)
if(BEBOP_ENABLE_CUDA AND BEBOP_EMULATE_CUDA)
  message(FATAL_ERROR "BEBOP_ENABLE_CUDA and BEBOP_EMULATE_CUDA exclude each other: choose one build")
endif()
set(BEBOP_HAS_CUDA OFF)
if(NOT BEBOP_ENABLE_CUDA AND NOT BEBOP_EMULATE_CUDA)
  return()
endif()
set(BEBOP_HAS_CUDA ON)

# Parts that a toolkit may lack (cuBLAS, or all of it) can come from NVIDIA's wheels, in the site-packages of BEBOP_PYTHON:
# `deploy/install_deps.sh cuda` puts what is missing into build/venv.
set(BEBOP_CUDA_WHEELS)
set(wheel_python ${BEBOP_PYTHON})
if(NOT wheel_python)
  set(wheel_python python3)
endif()
execute_process(COMMAND ${wheel_python} -c "import sysconfig; print(sysconfig.get_paths()['purelib'])"
                OUTPUT_VARIABLE site_packages OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(site_packages AND IS_DIRECTORY ${site_packages}/nvidia/cu13)
  set(BEBOP_CUDA_WHEELS ${site_packages}/nvidia/cu13)
endif()
# The toolkit: CUDACXX or CMAKE_CUDA_COMPILER, what is on PATH, /usr/local/cuda, the wheels.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(BEBOP_NVCC nvcc PATHS /usr/local/cuda/bin ${BEBOP_CUDA_WHEELS}/bin)
  mark_as_advanced(BEBOP_NVCC)
  if(BEBOP_NVCC)
    set(CMAKE_CUDA_COMPILER ${BEBOP_NVCC})
    if(BEBOP_CUDA_WHEELS AND BEBOP_NVCC STREQUAL "${BEBOP_CUDA_WHEELS}/bin/nvcc")
      set(CUDAToolkit_ROOT ${BEBOP_CUDA_WHEELS})
    endif()
  endif()
endif()

if(BEBOP_ENABLE_CUDA)
  # sm_90a first; sm_80 is the oldest device with the instructions that the kernels use.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 90a-real 80-real)
  endif()
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  enable_language(CUDA)
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know that nvcc has C++20
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_EXTENSIONS OFF)
endif()
# CMake 3.25 marks CUDA::nvToolsExt as deprecated for projects that ask for 3.25, and with NVIDIA's wheels of CUDA 13, which lack that library,
# failed there ("set_property could not find TARGET").
set(minimum_required ${CMAKE_MINIMUM_REQUIRED_VERSION})
set(CMAKE_MINIMUM_REQUIRED_VERSION 3.24)
find_package(CUDAToolkit REQUIRED)
set(CMAKE_MINIMUM_REQUIRED_VERSION ${minimum_required})
if(CUDAToolkit_VERSION VERSION_LESS 13.0)
  message(FATAL_ERROR "CUDA ${CUDAToolkit_VERSION} at ${CUDAToolkit_BIN_DIR}: bebop needs 13.0 or later (deploy/install_deps.sh cuda)")
endif()
find_package(CublasLt REQUIRED)

add_library(bebop_cuda_runtime INTERFACE)
add_library(bebop::cuda_runtime ALIAS bebop_cuda_runtime)
target_include_directories(bebop_cuda_runtime SYSTEM INTERFACE ${CUDAToolkit_INCLUDE_DIRS})
if(BEBOP_ENABLE_CUDA)
  target_link_libraries(bebop_cuda_runtime INTERFACE CUDA::cudart_static)
  add_library(bebop_cublaslt STATIC ${PROJECT_SOURCE_DIR}/kernels/common/cublaslt_loader.cc)
  set(library_of_build ${CublasLt_LIBRARY})
  if(NOT library_of_build)
    set(library_of_build "")
  endif()
  target_compile_definitions(bebop_cublaslt PRIVATE BEBOP_CUBLASLT_OF_BUILD="${library_of_build}")
  target_include_directories(bebop_cublaslt SYSTEM PUBLIC ${CublasLt_INCLUDE_DIR})
  target_link_libraries(bebop_cublaslt PUBLIC bebop_cuda_runtime PRIVATE bebop_options ${CMAKE_DL_LIBS})
else()
  target_compile_definitions(bebop_cuda_runtime INTERFACE BEBOP_CUDA_EMULATION=1)
  target_include_directories(bebop_cuda_runtime INTERFACE ${PROJECT_SOURCE_DIR}/tests/support/cuda_emulation)
  target_link_libraries(bebop_cuda_runtime INTERFACE bebop_cuda_emulation)
  add_library(bebop_cublaslt INTERFACE)
  target_include_directories(bebop_cublaslt SYSTEM INTERFACE ${CublasLt_INCLUDE_DIR})
  target_link_libraries(bebop_cublaslt INTERFACE bebop_cuda_runtime)
endif()
add_library(bebop::cublaslt ALIAS bebop_cublaslt)

add_custom_target(bebop_cuda_tests)
add_custom_target(bebop_cuda_benches)

# bebop_cuda_sources(<target> a_cuda.cu ...): adds device code to a library of ours.
function(bebop_cuda_sources target)
  target_sources(${target} PRIVATE ${ARGN})
  target_link_libraries(${target} PUBLIC bebop_cuda_runtime)
  if(BEBOP_EMULATE_CUDA)
    set_source_files_properties(${ARGN} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "${BEBOP_EMULATED_KERNEL_FLAGS}")
  else()
    set_source_files_properties(${ARGN} PROPERTIES COMPILE_OPTIONS "${BEBOP_CUDA_FLAGS}")
  endif()
endfunction()

# Warnings are errors in device code (nvcc, ptxas) and in the host code of .cu files. -lineinfo costs nothing at run time and gives
# compute-sanitizer and the profilers their source lines.
set(BEBOP_CUDA_FLAGS --expt-relaxed-constexpr -Werror=all-warnings -lineinfo
  -Xcompiler=-Wall,-Wextra,-Werror,-fno-omit-frame-pointer,-fstack-protector-strong,-ffp-contract=off)
# Kernels read bf16 pairs through uint4 and such. Instrumented like a program under ThreadSanitizer, but linked with our own hooks,
# which check every access to device and shared memory.
set(BEBOP_EMULATED_KERNEL_FLAGS -x c++ -fno-strict-aliasing -Wno-unknown-pragmas -fsanitize=thread,alignment,bounds
  --param=tsan-instrument-func-entry-exit=0 --param=tsan-distinguish-volatile=1)
