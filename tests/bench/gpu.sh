#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Benchmarks on a CUDA device: operators against the copy bandwidth and matrix rate measured on it, whole iterations against the ideal time, and the
# PyTorch baselines. Prints tables and leaves JSON lines in the output folder. No network, no server.
#
#   tests/bench/gpu.sh [--bundle DIR | --build DIR] [--out DIR] [--only PHASE]... [--list] [--smoke]
#
# Phases, each cut off after 460 seconds with what it has measured by then, the most telling cells first:
#   ceilings         copy bandwidth and matrix rate (seconds; runs before any other phase that has no ceilings.json yet)
#   iterations-4b    4B shape, B in {1, 8, 32, 128, 256}, gamma in {0, 1, 3, 5}, accept length 1, 2.5, 3.5, L = 4096
#   operators        delta rule, attention, linear, sampling, norms
#   training-4b      optimizer steps of the MTP trainer, 4B shape: 5 steps ahead, batches of 8,192 tokens in documents of 1,024 and of 8,192
#   training-9b      the same for the 9B shape
#   baseline-c       strong PyTorch, 4B and 27B shape, gamma 0 and 3, accept length 2.5
#   iterations-27b   as iterations-4b; a cell that does not fit runs at the largest context that does
#   baseline-ab      transformers' generate, and its modules under torch.compile (4B)
#   summary          bebop's iterations beside baseline C's (after the phases above)
# Inside an unpacked bundle (deploy/bundle.sh) its own programs run; else those of --build (default build/cuda-release). --smoke: tiny cells on
# the emulated device and the CPU, which test this script's logic and nothing else. Exit status 1 when a phase failed; the others run all the same.
set -uo pipefail
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
all=(ceilings iterations-4b operators training-4b training-9b baseline-c iterations-27b baseline-ab summary)
phases=()
bundle=
build=
out=${OUT:-build/bench/gpu}
smoke=0
limit=460
while (($#)); do
  case "$1" in
    --bundle) bundle=$(absolute "${2:?--bundle needs a folder}"); shift 2 ;;
    --build) build=$(absolute "${2:?--build needs a folder}"); shift 2 ;;
    --out) out=${2:?--out needs a folder}; shift 2 ;;
    --only) phases+=("${2:?--only needs a phase}"); shift 2 ;;
    --smoke) smoke=1; shift ;;
    --list) printf '%s\n' "${all[@]}"; exit 0 ;;
    --help | -h) sed -n '3,23s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: unknown argument '$1' (see --help)" >&2; exit 2 ;;
  esac
done
((${#phases[@]})) || phases=("${all[@]}")
for name in "${phases[@]}"; do
  [[ " ${all[*]} " == *" $name "* ]] || { echo "error: unknown phase '$name'; phases: ${all[*]}" >&2; exit 2; }
done
out=$(absolute "$out")
cd "$(dirname "$0")/../.." || exit 1
mkdir -p "$out" || exit 1
if [[ -z $bundle && -z $build && -f manifest.json ]]; then bundle=$PWD; fi
if [[ -z $build ]]; then
  build=build/cuda-release
  if ((smoke)); then build=build/cuda-emulated; fi
fi
for program in iteration_bench ops_cuda_bench training_cuda_bench; do
  if [[ ! -x ${bundle:-$build}/bench/$program ]]; then
    echo "error: ${bundle:-$build}/bench/$program is missing: build the target bebop_cuda_benches, or name a bundle or build tree" >&2
    exit 2
  fi
done
run() {  # program of bench/, arguments...
  local program=$1
  shift
  if [[ -n $bundle ]]; then
    timeout "$limit" "$bundle/run" "bench/$program" "$@"
  else
    timeout "$limit" "$build/bench/$program" "$@"
  fi
}
python=${PYTHON:-python3}
models=tests/bench/models
failed=()

# The value of a ceiling, or nothing.
ceiling() { "$python" -c 'import json,sys; print(float(json.load(open(sys.argv[1]))[sys.argv[2]]) * float(sys.argv[3]))' "$out/ceilings.json" "$1" "$2"; }

# A table of JSON lines: file, columns.
table() {
  "$python" - "$@" <<'PYTHON'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1]) if line.startswith("{") and line.endswith("}\n")]
columns = sys.argv[2:]
rows = [row for row in rows if "error" in row or any(column in row for column in columns[1:])]
cells = [columns + ["error"]] + [[str(row.get(column, "")) for column in columns] + [row.get("error", "")[:60]] for row in rows]
if not any(line[-1] for line in cells[1:]):
    cells = [line[:-1] for line in cells]
widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
for line in cells:
    print("  ".join(value.rjust(width) for value, width in zip(line, widths)))
PYTHON
}

# iterations NAME MODEL_DIR arguments...: runs the cells, then puts the ideal time on this device beside each.
iterations() {
  local name=$1 config=$2 status=0
  shift 2
  run iteration_bench --config "$config" "$@" >"$out/$name.raw.jsonl" || status=$?
  "$python" - "$config/config.json" "$out/$name.raw.jsonl" "$out/ceilings.json" >"$out/$name.jsonl" <<'PYTHON' || status=1
import json, sys
sys.path.insert(0, "tests/bench/gpu")
import roofline
shape = roofline.Shape.load(sys.argv[1])
ceilings = json.load(open(sys.argv[3]))
device = roofline.Device(ceilings["copy_GB_per_s"] * 1e9, ceilings["bf16_TFLOP_per_s"] * 1e12)
for line in open(sys.argv[2]):
    if not (line.startswith("{") and line.endswith("}\n")):
        continue  # cut off
    cell = json.loads(line)
    if "ms" in cell:
        ideal = roofline.ideal_seconds(shape, cell["batch"], cell["gamma"], cell["context"], device) * 1e3
        cell |= {"ideal_ms": round(ideal, 4), "fraction": round(ideal / cell["ms"], 4), "device": ceilings["device"]}
    print(json.dumps(cell))
PYTHON
  table "$out/$name.jsonl" batch gamma context accept_length ms ideal_ms fraction starved host_gap tokens_per_s
  return "$status"
}

baseline() {  # file, model, arguments...
  local file=$1 model=$2
  shift 2
  timeout "$limit" "$python" tests/bench/gpu/baselines.py --bandwidth "$(ceiling copy_GB_per_s 1e9)" --matrix-rate "$(ceiling bf16_TFLOP_per_s 1e12)" "$@" |
    sed "s/^{/{\"model\": \"$model\", /" >>"$file"
}

phase() {
  local status=0
  case "$1" in
    ceilings)
      local flags=()
      if ((smoke)); then flags=(--smoke); fi
      run ops_cuda_bench --only ceilings "${flags[@]}" >"$out/ceilings.jsonl" || return 1
      head -1 "$out/ceilings.jsonl" | tee "$out/ceilings.json"
      ;;
    iterations-4b | iterations-27b)
      if ((smoke)); then
        iterations "$1" tests/models/bebop-tiny --batch 1 --batch 3 --gamma 0 --gamma 3 --accept-length 2.5 --context 128 --iterations 4 --warmup 2
      else
        iterations "$1" "$models/qwen3.5-${1#iterations-}-shape" --batch 1 --batch 32 --batch 128 --batch 8 --batch 256 --gamma 3 --gamma 0 \
          --gamma 5 --gamma 1
      fi
      ;;
    operators)
      local flags=()
      if ((smoke)); then flags=(--smoke); fi
      run ops_cuda_bench "${flags[@]}" >"$out/operators.jsonl" || status=$?
      table "$out/operators.jsonl" op shape us GB_per_s TFLOP_per_s bound_us fraction
      return "$status"
      ;;
    training-4b | training-9b)
      local rate
      rate=$(ceiling bf16_TFLOP_per_s 1e12)
      : >"$out/$1.jsonl"
      if ((smoke)); then
        run training_cuda_bench --config tests/models/bebop-tiny --tokens 24 --length 12 --steps 2 --samples 1 --matrix-rate "$rate" \
          >>"$out/$1.jsonl" || status=$?
      else
        for length in 1024 8192; do
          run training_cuda_bench --config "$models/qwen3.5-${1#training-}-shape" --tokens 8192 --length "$length" --matrix-rate "$rate" \
            >>"$out/$1.jsonl" || status=$?
        done
      fi
      table "$out/$1.jsonl" tokens length steps ms tokens_per_s TFLOP_per_s bound_ms fraction all_fraction
      return "$status"
      ;;
    baseline-c)
      : >"$out/baseline-c.jsonl"
      if ((smoke)); then
        baseline "$out/baseline-c.jsonl" 4b --config tests/models/bebop-tiny/config.json --device cpu --which C --batch 1 3 --gamma 0 3 --context 64 \
          --warmup 1 --samples 2 || status=$?
      else
        local half=$((limit / 2))
        local limit=$half
        for model in 4b 27b; do
          baseline "$out/baseline-c.jsonl" "$model" --config "$models/qwen3.5-$model-shape/config.json" --which C --batch 1 32 128 8 --gamma 3 0 || status=$?
        done
      fi
      table "$out/baseline-c.jsonl" model batch gamma context ms ideal_ms fraction accept_length tokens_per_s
      return "$status"
      ;;
    baseline-ab)
      if ((smoke)); then echo "not part of --smoke: it needs transformers and a device"; return 0; fi
      : >"$out/baseline-ab.jsonl"
      baseline "$out/baseline-ab.jsonl" 4b --config "$models/qwen3.5-4b-shape/config.json" --which A B --batch 1 32 --samples 16 || status=$?
      table "$out/baseline-ab.jsonl" baseline batch context ms tokens_per_s
      return "$status"
      ;;
    summary)
      "$python" - "$out" <<'PYTHON'
import json, os, sys

def lines(name):
    path = os.path.join(sys.argv[1], name)
    return [json.loads(line) for line in open(path) if line.endswith("}\n")] if os.path.exists(path) else []

baseline = {(row["model"], row["batch"], row["gamma"]): row for row in lines("baseline-c.jsonl") if "ms" in row}
found = False
for model in ("4b", "27b"):
    for row in lines(f"iterations-{model}.jsonl"):
        other = baseline.get((model, row.get("batch"), row.get("gamma")))
        # The same gamma and acceptance; iterations of both emit the same number of tokens.
        if other and "ms" in row and abs(row["accept_length"] - other["accept_length"]) < 0.2:
            found = True
            print(f"{model} B={row['batch']} gamma={row['gamma']} accept length {row['accept_length']}: bebop {row['ms']} ms, baseline C {other['ms']} ms, "
                  f"ratio {other['ms'] / row['ms']:.2f}")
if not found:
    print("no cell of iterations-* and baseline-c has the same shape, batch, gamma and accept length yet")
PYTHON
      ;;
  esac
}

if ((!smoke)) && command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv
fi
for name in "${phases[@]}"; do
  if [[ $name != ceilings && $name != summary && ! -f $out/ceilings.json ]]; then
    echo "== ceilings"
    phase ceilings || { echo "error: the ceilings could not be measured" >&2; exit 1; }
  fi
  echo "== $name"
  started=$SECONDS
  phase "$name" || { echo "error: $name failed or was cut off after $limit s; what it measured is above" >&2; failed+=("$name"); }
  echo "== $name: $((SECONDS - started)) s"
done
if ((${#failed[@]})); then
  echo "error: failed: ${failed[*]}" >&2
  exit 1
fi
