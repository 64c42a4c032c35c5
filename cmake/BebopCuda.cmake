# SPDX-License-Identifier: Apache-2.0
# The CUDA backend in one of two builds:
#   BEBOP_ENABLE_CUDA   nvcc compiles the kernels for real devices (preset cuda-release);
#   BEBOP_EMULATE_CUDA  the host compiler builds the very same files against an emulated device that runs them on the CPU, with checks
#                       (preset cuda-emulated; tests only, see tests/support/cuda_emulation/README.md).
# BEBOP_HAS_CUDA is true in both. Targets:
#   bebop::cuda_runtime   headers, and what a program with device code links
#   bebop::cublaslt       cublasLt.h, and its library or the emulated one
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

if(BEBOP_ENABLE_CUDA)
  # sm_90a first; sm_80 is the oldest device with the instructions that the kernels use.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 90a-real 80-real)
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_EXTENSIONS OFF)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  enable_language(CUDA)
endif()
find_package(CUDAToolkit REQUIRED)
find_package(CublasLt REQUIRED)

add_library(bebop_cuda_runtime INTERFACE)
add_library(bebop::cuda_runtime ALIAS bebop_cuda_runtime)
target_include_directories(bebop_cuda_runtime SYSTEM INTERFACE ${CUDAToolkit_INCLUDE_DIRS})
add_library(bebop_cublaslt INTERFACE)
add_library(bebop::cublaslt ALIAS bebop_cublaslt)
target_include_directories(bebop_cublaslt SYSTEM INTERFACE ${CublasLt_INCLUDE_DIR})
target_link_libraries(bebop_cublaslt INTERFACE bebop_cuda_runtime)
if(BEBOP_ENABLE_CUDA)
  target_link_libraries(bebop_cuda_runtime INTERFACE CUDA::cudart_static)
  target_link_libraries(bebop_cublaslt INTERFACE ${CublasLt_LIBRARY})
else()
  target_compile_definitions(bebop_cuda_runtime INTERFACE BEBOP_CUDA_EMULATION=1)
  target_include_directories(bebop_cuda_runtime INTERFACE ${PROJECT_SOURCE_DIR}/tests/support/cuda_emulation)
  target_link_libraries(bebop_cuda_runtime INTERFACE bebop_cuda_emulation)
endif()

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

# -Xptxas -v: registers, shared memory and spills of every kernel, for docs/kernels.md.
set(BEBOP_CUDA_FLAGS --expt-relaxed-constexpr -Werror=all-warnings -Xptxas=-v -lineinfo)
# Kernels read bf16 pairs through uint4 and such. Instrumented like a program under ThreadSanitizer, but linked with our own hooks,
# which check every access to device and shared memory.
set(BEBOP_EMULATED_KERNEL_FLAGS -x c++ -fno-strict-aliasing)
