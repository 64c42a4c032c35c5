#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The paper's results in miniature: trains MTP heads with every loss, measures them by real decoding with bebop-server, follows them through an RL
# run, and makes the tables and plots of docs/reproduction.md.
#
#   tests/reproduction/run.sh [--scale quick|full|gpu] [--work DIR] [--only STAGE] [--publish] [...]
#
# Installs and builds what is missing, then runs tests/reproduction/reproduce.py, which takes all arguments (--help). full needs about an hour on
# two cores, quick two or three minutes; an interrupted run goes on when it is called again.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
  sed -n '3,9s/^# \{0,1\}//p' "$0"
  exit 0
fi

deploy/install_deps.sh build test
tests/venv.sh
mkdir -p build
log=build/reproduction-build.log
# For a CUDA device the build for it.
preset=cpu-release
for ((i = 1; i <= $#; ++i)); do
  case "${!i}" in
    --device=cuda*) preset=cuda-release ;;
    --device) next=$((i + 1)); [[ "${!next:-}" == cuda* ]] && preset=cuda-release ;;
  esac
done
cmake --preset "$preset" "-DBEBOP_PYTHON=$PWD/build/venv/bin/python" >"$log" 2>&1 || { tail -40 "$log"; exit 1; }
cmake --build --preset "$preset" -j "$(nproc)" --target bebop-server bebop bebop-train-mtp >>"$log" 2>&1 || { tail -40 "$log"; exit 1; }
exec build/venv/bin/python tests/reproduction/reproduce.py --bin "build/$preset/bin" "$@"
