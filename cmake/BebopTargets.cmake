# SPDX-License-Identifier: Apache-2.0
# One function per kind of target. Every folder lists its sources and dependencies explicitly: no globbing, no global flags.

find_package(Threads REQUIRED)
find_package(absl REQUIRED)

# Flags shared by all our targets (never leak to packaged libraries).
add_library(bebop_options INTERFACE)
target_include_directories(bebop_options INTERFACE ${PROJECT_SOURCE_DIR})
set(host_options
  -Wall -Wextra -Werror -Wnon-virtual-dtor -Woverloaded-virtual
  # g++ 12 reports overlapping copies inside std::string that do not exist (GCC bug 105329).
  $<$<CXX_COMPILER_ID:GNU>:-Wno-restrict>
  -fno-omit-frame-pointer -fstack-protector-strong -ffp-contract=off
  $<$<CXX_COMPILER_ID:Clang>:-Wthread-safety>
  $<$<AND:$<CONFIG:Release>,$<STREQUAL:${BEBOP_SANITIZE},>>:-U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2>)
# Not for nvcc, whose flags are in BebopCuda.cmake.
target_compile_options(bebop_options INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:${host_options}>")
target_compile_definitions(bebop_options INTERFACE $<$<CXX_COMPILER_ID:GNU>:_GLIBCXX_ASSERTIONS>)
target_link_options(bebop_options INTERFACE -Wl,-z,relro,-z,now)
if(BEBOP_ENABLE_CUDA)
  # A bundle (deploy/bundle.sh) has the shared libraries in lib/, beside bin/ and tests/. The old tag holds for what these need in turn, too.
  target_link_options(bebop_options INTERFACE "-Wl,-rpath,$ORIGIN/../lib" -Wl,--disable-new-dtags)
endif()
if(BEBOP_SANITIZE)
  target_compile_options(bebop_options INTERFACE -fsanitize=${BEBOP_SANITIZE} -fno-sanitize-recover=all)
  target_link_options(bebop_options INTERFACE -fsanitize=${BEBOP_SANITIZE})
  target_compile_definitions(bebop_options INTERFACE BEBOP_SANITIZED=1)
endif()

if(BEBOP_BUILD_FUZZ)
  # Coverage feedback from the code under test, not from the fuzz target alone.
  target_compile_options(bebop_options INTERFACE -fsanitize=fuzzer-no-link)
  add_custom_target(bebop_fuzz_targets)
endif()

# bebop_library(NAME foo SRCS a.cc DEPS bebop::bar [CUDA_SRCS a_cuda.cu b_cuda.cc] [CUDA_DEPS bebop::cublaslt]): a library `bebop_foo` with
# the alias `bebop::foo`. A library without sources is header only. CUDA_SRCS belong to the CUDA builds alone: .cu files are device code,
# .cc files host code that sees CUDA's headers.
function(bebop_library)
  cmake_parse_arguments(ARG "" "NAME" "SRCS;DEPS;CUDA_SRCS;CUDA_DEPS" ${ARGN})
  set(target bebop_${ARG_NAME})
  set(cuda_kernels)
  if(BEBOP_HAS_CUDA AND ARG_CUDA_SRCS)
    set(cuda_kernels ${ARG_CUDA_SRCS})
    list(FILTER cuda_kernels INCLUDE REGEX "\\.cu$")
    set(cuda_hosts ${ARG_CUDA_SRCS})
    list(FILTER cuda_hosts EXCLUDE REGEX "\\.cu$")
    list(APPEND ARG_SRCS ${cuda_hosts})
    list(APPEND ARG_DEPS ${ARG_CUDA_DEPS} bebop::cuda_runtime)
  endif()
  if(ARG_SRCS OR cuda_kernels)
    add_library(${target} STATIC ${ARG_SRCS})
    target_link_libraries(${target} PUBLIC ${ARG_DEPS} PRIVATE bebop_options)
    target_include_directories(${target} PUBLIC ${PROJECT_SOURCE_DIR})
    if(cuda_kernels)
      bebop_cuda_sources(${target} ${cuda_kernels})
    endif()
  else()
    add_library(${target} INTERFACE)
    target_link_libraries(${target} INTERFACE ${ARG_DEPS})
    target_include_directories(${target} INTERFACE ${PROJECT_SOURCE_DIR})
  endif()
  add_library(bebop::${ARG_NAME} ALIAS ${target})
endfunction()

# bebop_program(NAME bebop-server SRCS main.cc DEPS ...): an executable in build/<preset>/bin.
function(bebop_program)
  cmake_parse_arguments(ARG "" "NAME" "SRCS;DEPS" ${ARGN})
  add_executable(${ARG_NAME} ${ARG_SRCS})
  target_link_libraries(${ARG_NAME} PRIVATE ${ARG_DEPS} bebop_options)
endfunction()

# bebop_test(NAME linear_test SRCS ... DEPS ... [LABELS slow] [TIMEOUT 60]): one gtest program, one ctest entry.
# Labels: none = fast and part of every configuration; `statistics` and `oracle` run in cpu-release alone; `cuda` = needs the CUDA backend
# (target bebop_cuda_tests builds them all).
function(bebop_test)
  cmake_parse_arguments(ARG "" "NAME;TIMEOUT" "SRCS;DEPS;LABELS" ${ARGN})
  if(NOT BEBOP_BUILD_TESTS)
    return()
  endif()
  find_package(GTest REQUIRED)
  add_executable(${ARG_NAME} ${ARG_SRCS})
  target_link_libraries(${ARG_NAME} PRIVATE ${ARG_DEPS} GTest::gtest GTest::gtest_main bebop_options)
  set_target_properties(${ARG_NAME} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests)
  add_test(NAME ${ARG_NAME} COMMAND ${ARG_NAME} WORKING_DIRECTORY ${PROJECT_SOURCE_DIR})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  set_tests_properties(${ARG_NAME} PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS "${ARG_LABELS}")
  if(BEBOP_HAS_CUDA AND "cuda" IN_LIST ARG_LABELS)
    add_dependencies(bebop_cuda_tests ${ARG_NAME})
  endif()
endfunction()

# bebop_cuda_test(NAME attention_cuda_test SRCS ... DEPS ...): a test of the CUDA backend, labelled `cuda`, in builds that have one. It skips
# where no device is.
function(bebop_cuda_test)
  if(NOT BEBOP_HAS_CUDA)
    return()
  endif()
  cmake_parse_arguments(ARG "" "NAME;TIMEOUT" "SRCS;DEPS;LABELS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  bebop_test(NAME ${ARG_NAME} SRCS ${ARG_SRCS} DEPS ${ARG_DEPS} bebop::cuda_runtime LABELS cuda ${ARG_LABELS} TIMEOUT ${ARG_TIMEOUT})
  if(BEBOP_ENABLE_CUDA AND BEBOP_BUILD_TESTS)
    # Without a device all tests of the program skip: ctest then says "Skipped", not "Passed".
    set_tests_properties(${ARG_NAME} PROPERTIES SKIP_REGULAR_EXPRESSION "\\[  PASSED  \\] 0 tests")
  endif()
endfunction()

# bebop_benchmark(NAME linear_bench SRCS ... DEPS ...): a Google Benchmark program; never a ctest entry.
function(bebop_benchmark)
  cmake_parse_arguments(ARG "" "NAME" "SRCS;DEPS" ${ARGN})
  if(NOT BEBOP_BUILD_BENCH)
    return()
  endif()
  find_package(benchmark REQUIRED)
  add_executable(${ARG_NAME} ${ARG_SRCS})
  target_link_libraries(${ARG_NAME} PRIVATE ${ARG_DEPS} benchmark::benchmark bebop_options)
  set_target_properties(${ARG_NAME} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/bench)
  if(BEBOP_HAS_CUDA AND "${ARG_SRCS}" MATCHES "gpu/")
    add_dependencies(bebop_cuda_benches ${ARG_NAME})
  endif()
endfunction()

# bebop_fuzz_target(NAME safetensors_fuzz SRCS ... DEPS ... CORPUS dir): with BEBOP_BUILD_FUZZ a libFuzzer program in
# build/<preset>/fuzz; in every test build a ctest entry that replays the corpus through the same entry point.
function(bebop_fuzz_target)
  cmake_parse_arguments(ARG "" "NAME;CORPUS" "SRCS;DEPS" ${ARGN})
  if(BEBOP_BUILD_FUZZ)
    add_executable(${ARG_NAME} ${ARG_SRCS})
    target_compile_options(${ARG_NAME} PRIVATE -fsanitize=fuzzer)
    target_link_options(${ARG_NAME} PRIVATE -fsanitize=fuzzer)
    target_link_libraries(${ARG_NAME} PRIVATE ${ARG_DEPS} bebop_options)
    set_target_properties(${ARG_NAME} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/fuzz)
    add_dependencies(bebop_fuzz_targets ${ARG_NAME})
    file(WRITE ${PROJECT_BINARY_DIR}/fuzz/${ARG_NAME}.corpus "${ARG_CORPUS}\n")  # for tests/run.sh
  elseif(BEBOP_BUILD_TESTS)
    add_executable(${ARG_NAME} ${ARG_SRCS} ${PROJECT_SOURCE_DIR}/tests/support/fuzz_replay_main.cc)
    target_link_libraries(${ARG_NAME} PRIVATE ${ARG_DEPS} bebop_options)
    set_target_properties(${ARG_NAME} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests)
    add_test(NAME ${ARG_NAME}_corpus COMMAND ${ARG_NAME} ${ARG_CORPUS} WORKING_DIRECTORY ${PROJECT_SOURCE_DIR})
    set_tests_properties(${ARG_NAME}_corpus PROPERTIES TIMEOUT 60)
  endif()
endfunction()
