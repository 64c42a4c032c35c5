#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds and runs the benchmarks: kernels (Google Benchmark) and the whole engine on a 0.8B-shaped dummy model. Prints tables and leaves JSON
# in build/bench/.
#
#   tests/bench/run.sh [--only kernels|engine] [--force]
#
# Machines are noisy: it refuses to run when the one-minute load says other work is going on, unless --force. Fractions of the read bandwidth are
# of a plain read measured in the same run.
set -euo pipefail
cd "$(dirname "$0")/../.."

parts=(kernels engine)
force=0
while (($#)); do
  case "$1" in
    --only) parts=("${2:?--only needs a part}"); shift 2 ;;
    --force) force=1; shift ;;
    --help | -h) sed -n '3,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: unknown argument '$1' (see --help)" >&2; exit 2 ;;
  esac
done

deploy/install_deps.sh build test
mkdir -p build/bench
cmake --preset cpu-release >build/bench/build.log 2>&1 || { tail -30 build/bench/build.log; exit 1; }
cmake --build --preset cpu-release -j "$(nproc)" --target bebop-server bebop linear_bench ops_bench sampling_bench draft_losses_bench >>build/bench/build.log 2>&1 ||
  { tail -30 build/bench/build.log; exit 1; }

load=$(cut -d' ' -f1 /proc/loadavg)
echo "processor: $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1), $(nproc) cores, load $load"
if ((!force)) && awk -v load="$load" 'BEGIN { exit !(load > 1.0) }'; then
  echo "error: load $load: other work is going on; wait, or use --force" >&2
  exit 1
fi

server_pid=
cleanup() {
  if [[ -n $server_pid ]]; then
    kill -TERM "$server_pid" 2>/dev/null || true
    wait "$server_pid" 2>/dev/null || true
  fi
}
trap cleanup EXIT

kernels() {
  for bench in linear_bench ops_bench sampling_bench draft_losses_bench; do
    echo "== $bench"
    "build/cpu-release/bench/$bench" --benchmark_out="build/bench/$bench.json" --benchmark_out_format=json \
      --benchmark_min_time=0.5 2>/dev/null
  done
}

engine() {
  echo "== engine: Qwen3.5-0.8B shape, dummy bfloat16 weights, prompt 32, output 64"
  build/cpu-release/bin/bebop-server --model tests/bench/models/qwen3.5-0.8b-shape --load-format dummy --port 0 --admin-port 0 \
    --max-num-seqs 8 --max-model-len 2048 >build/bench/ready 2>build/bench/server.log &
  server_pid=$!
  local started=$SECONDS
  until grep -q '^bebop-server ready:' build/bench/ready; do
    kill -0 "$server_pid" || { cat build/bench/server.log; exit 1; }
    sleep 0.2
  done
  echo "weights made in about $((SECONDS - started)) s"
  local address
  address=$(sed -n 's/.*rollout=\([^ ]*\).*/\1/p' build/bench/ready)
  : >build/bench/engine.jsonl
  printf '%-12s %4s %6s %6s %10s %10s %8s %8s\n' mode B gamma accept tokens/s iter/s GB/s 'a-length'
  for cell in "off 1 0 0" "rejection 1 3 1" "rejection 1 3 2.5" "rejection 1 3 3.5" "off 4 0 0" "rejection 4 3 2.5"; do
    read -r mode concurrency drafts accept <<<"$cell"
    local synthetic=()
    if ((drafts > 0)); then synthetic=(--synthetic-accept-length "$accept"); fi
    build/cpu-release/bin/bebop --server "$address" --json bench --concurrency "$concurrency" --num-requests "$((2 * concurrency))" \
      --num-samples 1 --prompt-len 32 --output-len 64 --mode "$mode" --num-draft-tokens "$drafts" --warmup 1 "${synthetic[@]}" |
      tee -a build/bench/engine.jsonl |
      python3 -c 'import json, sys
r = json.load(sys.stdin)
print("%-12s %4s %6s %6s %10.2f %10.2f %8.2f %8.2f" % (*sys.argv[1:], r["tokens_per_second"], r["iterations_per_second"], r["effective_gb_per_second"], r["accept_length"]))' \
        "$mode" "$concurrency" "$drafts" "$accept"
  done
}

for part in "${parts[@]}"; do
  case "$part" in
    kernels | engine) "$part" ;;
    *) echo "error: unknown part '$part' (kernels or engine)" >&2; exit 2 ;;
  esac
done
