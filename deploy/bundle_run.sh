#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs a program of the bundle: ./run bin/bebop-server --model DIR --device cuda
# The programs find the bundle's libraries by themselves. All that is added here is cuBLASLt where only a Python wheel has it.
set -e
root=$(cd "$(dirname "$0")" && pwd)
if [ $# -eq 0 ]; then
  sed -n 's/^# //p' "$0" | sed -n '2,3p' >&2
  exit 2
fi
program=$1
shift
if command -v python3 >/dev/null 2>&1; then
  folder=$(python3 "$root/deploy/cublas_path.py")
  if [ -n "$folder" ]; then
    LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export LD_LIBRARY_PATH
  fi
fi
exec "$root/$program" "$@"
