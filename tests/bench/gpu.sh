#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Benchmarks on a CUDA device: operators against the measured copy bandwidth and matrix rate, whole iterations against the ideal time, and the
# PyTorch baselines on the same device. Prints tables and leaves JSON lines in the output folder. No network, no server.
#
#   tests/bench/gpu.sh [--bundle DIR] [--out DIR] [--only PHASE]... [--list] [--smoke]
#
# Phases, each under 8 minutes, the most telling cells first:
#   iterations-4b    4B shape, B in {1, 8, 32, 128, 256}, gamma in {0, 1, 3, 5}, accept length 1, 2.5, 3.5, L = 4096
#   iterations-27b   27B shape, the same cells; one that does not fit runs at the largest context that does
#   operators        delta rule, attention, linear, sampling, norms
#   baseline-c       strong PyTorch (4B and 27B, gamma 0 and 3)
#   baseline-ab      transformers generate, and its modules under torch.compile (4B)
# --bundle: an unpacked bundle (deploy/bundle.sh); default: the cuda-release build of this tree. --smoke: tiny cells on the emulated device
# and the CPU, which tests this script's logic and nothing else.
set -euo pipefail
cd "$(dirname "$0")/../.."

phases=()
bundle=
out=${OUT:-build/bench/gpu}
smoke=0
all=(iterations-4b operators baseline-c iterations-27b baseline-ab)
while (($#)); do
  case "$1" in
    --bundle) bundle=${2:?--bundle needs a folder}; shift 2 ;;
    --out) out=${2:?--out needs a folder}; shift 2 ;;
    --only) phases+=("${2:?--only needs a phase}"); shift 2 ;;
    --smoke) smoke=1; shift ;;
    --list) printf '%s\n' "${all[@]}"; exit 0 ;;
    --help | -h) sed -n '3,18s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: unknown argument '$1' (see --help)" >&2; exit 2 ;;
  esac
done
((${#phases[@]})) || phases=("${all[@]}")
mkdir -p "$out"

if [[ -n $bundle ]]; then
  run() { "$bundle/run" "$@"; }  # the bundle's launcher: its own shared libraries
elif ((smoke)); then
  run() { local program=$1; shift; "build/cuda-emulated/bench/$program" "$@"; }
else
  run() { local program=$1; shift; "build/cuda-release/bench/$program" "$@"; }
fi
python=${PYTHON:-python3}

models=tests/bench/models
cells=()  # arguments of iteration_bench
if ((smoke)); then
  cells=(--batch 1 --batch 3 --gamma 0 --gamma 3 --accept-length 2.5 --context 128 --iterations 4 --warmup 2)
else
  ((${#phases[@]})) && command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv
fi

# A table of JSON lines: file, columns.
table() {
  "$python" - "$@" <<'PYTHON'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1]) if line.startswith("{")]
columns = sys.argv[2:]
rows = [row for row in rows if any(column in row for column in columns)]
cells = [columns] + [[str(row.get(column, row.get("error", ""))) if column in row else (row.get("error", "")[:40] if column == columns[-1] else "") for column in columns] for row in rows]
widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
for line in cells:
    print("  ".join(value.rjust(width) for value, width in zip(line, widths)))
PYTHON
}

# iterations MODEL_DIR NAME: runs the cells, then puts the ideal time beside each.
iterations() {
  local config=$1 name=$2
  shift 2
  if ((smoke)); then config=tests/models/bebop-tiny; fi
  run iteration_bench --config "$config" "${cells[@]}" "$@" >>"$out/$name.raw.jsonl"
  "$python" - "$config/config.json" "$out/$name.raw.jsonl" "$out/operators.jsonl" >"$out/$name.jsonl" <<'PYTHON'
import json, os, sys
sys.path.insert(0, "tests/bench/gpu")
import roofline
shape = roofline.Shape.load(sys.argv[1])
device = roofline.H200
# The ceilings of this very device, when the operators' phase has measured them.
if os.path.exists(sys.argv[3]):
    for line in open(sys.argv[3]):
        cell = json.loads(line)
        if cell["op"] == "ceilings":
            device = roofline.Device(cell["copy_GB_per_s"] * 1e9, cell["bf16_TFLOP_per_s"] * 1e12)
for line in open(sys.argv[2]):
    cell = json.loads(line)
    if "ms" in cell:
        ideal = roofline.ideal_seconds(shape, cell["batch"], cell["gamma"], cell["context"], device) * 1e3
        cell |= {"ideal_ms": round(ideal, 4), "fraction": round(ideal / cell["ms"], 4)}
    print(json.dumps(cell))
PYTHON
  table "$out/$name.jsonl" batch gamma context accept_length ms ideal_ms fraction host_gap tokens_per_s
}

phase() {
  case "$1" in
    iterations-4b | iterations-27b)
      local name=$1 model=$models/qwen3.5-${1#iterations-}-shape
      : >"$out/$name.raw.jsonl"
      if ((smoke)); then
        iterations "$model" "$name"
      else
        iterations "$model" "$name" --batch 1 --batch 32 --batch 128 --batch 8 --batch 256 --gamma 3 --gamma 0 --gamma 5 --gamma 1
      fi
      ;;
    operators)
      local flags=()
      if ((smoke)); then flags=(--smoke); fi
      run ops_cuda_bench "${flags[@]}" >"$out/operators.jsonl"
      table "$out/operators.jsonl" op shape us GB_per_s TFLOP_per_s bound_us fraction
      ;;
    baseline-c)
      : >"$out/baseline-c.jsonl"
      if ((smoke)); then
        "$python" tests/bench/gpu/baselines.py --config tests/models/bebop-tiny/config.json --device cpu --which C --batch 2 --gamma 0 3 \
          --context 64 --warmup 1 --samples 2 >>"$out/baseline-c.jsonl"
      else
        for model in 4b 27b; do
          "$python" tests/bench/gpu/baselines.py --config "$models/qwen3.5-$model-shape/config.json" --which C --batch 1 32 128 8 --gamma 3 0 |
            sed "s/^{/{\"model\": \"$model\", /" >>"$out/baseline-c.jsonl"
        done
      fi
      table "$out/baseline-c.jsonl" model batch gamma context ms ideal_ms fraction accept_length tokens_per_s
      ;;
    baseline-ab)
      if ((smoke)); then echo "baseline-ab: not part of --smoke (it needs transformers and a device)"; return; fi
      "$python" tests/bench/gpu/baselines.py --config "$models/qwen3.5-4b-shape/config.json" --which A B --batch 1 32 \
        --samples 16 >"$out/baseline-ab.jsonl"
      table "$out/baseline-ab.jsonl" baseline batch context ms tokens_per_s
      ;;
    *) echo "error: unknown phase '$1'; phases: ${all[*]}" >&2; exit 2 ;;
  esac
}

for name in "${phases[@]}"; do
  echo "== $name"
  started=$SECONDS
  phase "$name"
  echo "== $name: $((SECONDS - started)) s"
done
