#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what is needed, builds and runs every test of bebop.
#
#   tests/run.sh                  everything, as CI does
#   tests/run.sh --only STAGE     one of: release, asan, tsan, fuzz, cuda, emulated (repeatable)
#   tests/run.sh --list           the stages and what they hold
#
# release: the whole tree, every test (oracle, statistics and mutants included).   asan: AddressSanitizer + UBSan, all but those.
# tsan: the threaded parts under ThreadSanitizer, without gRPC.   fuzz: every libFuzzer target for a few seconds on its corpus.
# cuda: nvcc compiles every kernel for sm_90a and sm_80, programs and device tests link (the tests skip where no device is), and the bundle is made.
# emulated: the same kernels, the engine and the server run on the emulated device.
set -euo pipefail
cd "$(dirname "$0")/.."

stages=()
while (($#)); do
  case "$1" in
    --only) stages+=("${2:?--only needs a stage}"); shift 2 ;;
    --list | --help | -h) sed -n '3,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: unknown argument '$1' (see --help)" >&2; exit 2 ;;
  esac
done
((${#stages[@]})) || stages=(release asan tsan fuzz cuda emulated)

jobs=$(nproc)
fuzz_seconds=${BEBOP_FUZZ_SECONDS:-8}
python=build/venv/bin/python
started=$SECONDS
say() { printf '\n== [%4ds] %s\n' "$((SECONDS - started))" "$*"; }

configure_and_build() {  # preset, targets...
  local preset=$1
  shift
  # A build tree made at another place cannot be reused.
  local cache=build/$preset/CMakeCache.txt
  if [[ -f $cache ]] && ! grep -qxF "CMAKE_HOME_DIRECTORY:INTERNAL=$PWD" "$cache"; then rm -rf "build/$preset"; fi
  cmake --preset "$preset" "${cmake_args[@]}" >"build/$preset-configure.log" 2>&1 || { cat "build/$preset-configure.log"; exit 1; }
  cmake --build --preset "$preset" -j "$jobs" ${@+--target "$@"} >"build/$preset-build.log" 2>&1 ||
    { tail -60 "build/$preset-build.log"; exit 1; }
}

run_stage() {
  cmake_args=()
  case "$1" in
    release)
      say "release: build"
      cmake_args=("-DBEBOP_PYTHON=$PWD/$python")
      configure_and_build cpu-release
      say "release: tests"
      ctest --preset cpu-release --output-on-failure -j "$jobs"
      ;;
    asan)
      say "asan: build"
      configure_and_build cpu-asan
      say "asan: tests"
      ctest --preset cpu-asan --output-on-failure -j "$jobs"
      ;;
    tsan)
      say "tsan: build"
      configure_and_build cpu-tsan thread_pool_test engine_test engine_weights_test weight_digest_test
      say "tsan: tests"
      ctest --preset cpu-tsan --output-on-failure
      ;;
    fuzz)
      say "fuzz: build"
      configure_and_build cpu-fuzz bebop_fuzz_targets
      say "fuzz: $fuzz_seconds s a target"
      for target in build/cpu-fuzz/fuzz/*_fuzz; do
        local name corpus
        name=$(basename "$target")
        corpus=$(cat "$target.corpus")
        mkdir -p "build/cpu-fuzz/found/$name"
        "$target" -max_total_time="$fuzz_seconds" -timeout=5 -rss_limit_mb=1024 -print_final_stats=1 \
          -artifact_prefix="build/cpu-fuzz/found/$name/" "build/cpu-fuzz/found/$name" "$corpus" \
          >"build/cpu-fuzz/$name.log" 2>&1 || { tail -30 "build/cpu-fuzz/$name.log"; exit 1; }
        echo "$name: $(sed -n 's/stat::number_of_executed_units: *//p' "build/cpu-fuzz/$name.log") executions"
      done
      ;;
    cuda)
      say "cuda: build"
      cmake_args=("-DBEBOP_PYTHON=$PWD/$python")
      configure_and_build cuda-release bebop-server bebop bebop-train-mtp bebop_cuda_tests bebop_cuda_benches
      say "cuda: tests (they skip where no device is)"
      ctest --preset cuda-release --output-on-failure -j "$jobs"
      say "cuda: registers and spills"
      python3 tests/bench/kernel_table.py build/cuda-release --check
      say "cuda: bundle"
      tests/deploy/bundle_test.sh build/cuda-release
      ;;
    emulated)
      say "emulated: build"
      cmake_args=("-DBEBOP_PYTHON=$PWD/$python")
      configure_and_build cuda-emulated bebop-server bebop bebop-train-mtp bebop_cuda_tests bebop_cuda_benches
      say "emulated: tests"
      ctest --preset cuda-emulated --output-on-failure -j "$jobs"
      say "emulated: the device scripts"
      tests/gpu.sh --device emulated --build build/cuda-emulated --only server --only training
      # The script's logic; an emulated device has no times worth reading.
      local bench=(--only iterations-4b --only operators --only training-4b --only summary)
      if "$python" -c 'import torch' 2>/dev/null; then bench+=(--only baseline-c); fi
      PYTHON=$([[ -x $python ]] && echo "$python" || echo python3) tests/bench/gpu.sh --smoke "${bench[@]}" >build/cuda-emulated-bench.log 2>&1 ||
        { tail -30 build/cuda-emulated-bench.log; exit 1; }
      ;;
    *) echo "error: unknown stage '$1' (see --help)" >&2; exit 2 ;;
  esac
}

mkdir -p build
say "install"
parts=(build test)
for stage in "${stages[@]}"; do
  case "$stage" in
    fuzz) parts+=(fuzz) ;;
    cuda | emulated) parts+=(cuda) ;;
  esac
done
deploy/install_deps.sh "${parts[@]}"
for stage in "${stages[@]}"; do
  if [[ $stage == release ]]; then tests/venv.sh; fi
done
for stage in "${stages[@]}"; do
  run_stage "$stage"
done
say "all stages passed: ${stages[*]}"
echo "${#stages[@]} passed, 0 failed"
