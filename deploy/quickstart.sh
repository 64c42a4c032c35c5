#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a fresh Debian 12 machine to rollouts: installs what is needed, builds, starts bebop-server on the bundled model on the CPU, and
# compares decoding without drafts with the three ways of drafting on math, code and tool-call prompts.
#
#   deploy/quickstart.sh [--prompts N] [--samples N]
#
# Leaves build/cpu-release/bin/{bebop-server,bebop,bebop-train-mtp}. Safe to run twice; the second run takes seconds. Leaves no process behind.
set -euo pipefail
cd "$(dirname "$0")/.."

prompts=12
samples=4
while (($#)); do
  case "$1" in
    --prompts) prompts=${2:?--prompts needs a number}; shift 2 ;;
    --samples) samples=${2:?--samples needs a number}; shift 2 ;;
    --help | -h) sed -n '3,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: unknown argument '$1' (see --help)" >&2; exit 2 ;;
  esac
done

started=$SECONDS
say() { printf '[%4ds] %s\n' "$((SECONDS - started))" "$*"; }

say "installing what the build needs (apt)"
deploy/install_deps.sh build

# A build tree made at another place (a moved or mounted clone) cannot be reused.
cache=build/cpu-release/CMakeCache.txt
if [[ -f $cache ]] && ! grep -qxF "CMAKE_HOME_DIRECTORY:INTERNAL=$PWD" "$cache"; then
  say "build/cpu-release was made for another place: building anew"
  rm -rf build/cpu-release
fi

mkdir -p build
log=build/quickstart-build.log
say "building bebop-server, bebop and bebop-train-mtp (the first time takes 10 minutes or more on two cores; progress: tail -f $log)"
cmake --preset cpu-release -DBEBOP_BUILD_TESTS=OFF -DBEBOP_BUILD_BENCH=OFF -B build/cpu-release >"$log" 2>&1 || { tail -40 "$log"; exit 1; }
cmake --build build/cpu-release -j "$(nproc)" --target bebop-server bebop bebop-train-mtp >>"$log" 2>&1 || { tail -40 "$log"; exit 1; }

say "starting bebop-server on tests/models/bebop-tiny"
work=$(mktemp -d)
server_pid=
cleanup() {
  if [[ -n $server_pid ]]; then
    kill -TERM "$server_pid" 2>/dev/null || true
    wait "$server_pid" 2>/dev/null || true
  fi
  rm -rf "$work"
}
trap cleanup EXIT
build/cpu-release/bin/bebop-server --model tests/models/bebop-tiny --port 0 --admin-port 0 >"$work/ready" 2>build/quickstart-server.log &
server_pid=$!
for _ in $(seq 300); do
  if grep -q '^bebop-server ready:' "$work/ready"; then break; fi
  kill -0 "$server_pid" 2>/dev/null || { cat build/quickstart-server.log; exit 1; }
  sleep 0.1
done
ready=$(grep '^bebop-server ready:' "$work/ready") || { echo "error: the server did not get ready" >&2; cat build/quickstart-server.log; exit 1; }
echo "$ready"
address=$(sed -n 's/.*rollout=\([^ ]*\).*/\1/p' <<<"$ready")

say "rollouts: $prompts prompts a task, $samples samples each, four ways of decoding"
python3 deploy/quickstart_table.py --bebop build/cpu-release/bin/bebop --server "$address" --prompts "$prompts" --samples "$samples"

cat <<'NEXT'

What to try next
  build/cpu-release/bin/bebop-server --model tests/models/bebop-tiny          a server on 127.0.0.1:50051
  build/cpu-release/bin/bebop generate --parse-special $'<|im_start|>user\nCompute 27+35.<|im_end|>\n<|im_start|>assistant\n'
                                                                              one prompt from the shell
  build/cpu-release/bin/bebop verify                                          that drafting changes no distribution
  build/cpu-release/bin/bebop bench --concurrency 8 --num-requests 64         load, with latencies and acceptance
  build/cpu-release/bin/bebop-train-mtp --help                                train the MTP layer on rollouts (docs/training.md)
  tests/run.sh                                                                every test
NEXT
say "done"
