#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Packs a build of the CUDA backend for another machine: programs, device tests and benchmarks, the shared libraries that they need, the
# bundled model and the scripts that drive all this.
#
#   deploy/bundle.sh [--build DIR] [--out FILE]      default: build/cuda-release, build/bebop-bundle.tar.xz
#
# The bundle runs from wherever it is unpacked, on x86-64 Linux with glibc >= 2.36; for --device cuda with a driver for CUDA 13 and cuBLAS, which
# it finds in the system or in PyTorch's wheels. Unpack with `tar xf`, or `python3 -m tarfile -e FILE` where xz is missing; then
#   bebop-bundle/run bin/bebop-server --model bebop-bundle/tests/models/bebop-tiny
#   bebop-bundle/tests/gpu.sh --list
# Fails when bundle and source tree together, the model counted once, exceed 60 MiB, or when a file asks for a newer glibc.
set -euo pipefail
cd "$(dirname "$0")/.."

build=build/cuda-release
out=build/bebop-bundle.tar.xz
max_total_bytes=$((60 * 1024 * 1024))
max_glibc=2.36
while (($#)); do
  case "$1" in
    --build) build=${2:?--build needs a folder}; shift 2 ;;
    --out) out=${2:?--out needs a file}; shift 2 ;;
    --help | -h) sed -n '3,13s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: unknown argument '$1' (see --help)" >&2; exit 2 ;;
  esac
done
for tool in ctest ldd strip objdump xz python3; do
  command -v "$tool" >/dev/null || { echo "error: $tool is missing" >&2; exit 1; }
done

stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
root=$stage/bebop-bundle
mkdir -p "$root"/{bin,bench,deploy,lib,tests}

python3 deploy/bundle_manifest.py "$build" >"$root/manifest.json"
python3 - "$root/manifest.json" >"$stage/programs" <<'PYTHON'
import json, sys
manifest = json.load(open(sys.argv[1]))
if len(manifest["programs"]) < 3 or not manifest["tests"]:
    sys.exit("error: the build lacks bebop-server, bebop, bebop-train-mtp or every device test; build the targets bebop-server bebop bebop-train-mtp bebop_cuda_tests")
print("\n".join(sorted({*manifest["programs"], *manifest["benches"], *(test["program"] for test in manifest["tests"])})))
PYTHON

# Libraries of the machine that runs it: the C library, whose version decides which systems the bundle runs on, and all of the driver and CUDA.
not_ours='^(linux-vdso|ld-linux|(libc|libm|libdl|libpthread|librt|libresolv|libutil|libnsl|libanl|libcuda|libcudart)\.so|libnvidia|libcublas)'
while read -r program; do
  strip --strip-all -o "$root/$program" "$build/$program"
  ldd "$build/$program" | sed -n 's/^\t\([^ ]*\) => \([^ ]*\).*/\1 \2/p' >>"$stage/needed"
  if grep -q 'not found' <(ldd "$build/$program"); then echo "error: $program lacks a library" >&2; ldd "$build/$program" >&2; exit 1; fi
done <"$stage/programs"
sort -u "$stage/needed" | grep -Ev "$not_ours" | while read -r name path; do
  strip --strip-unneeded -o "$root/lib/$name" "$(readlink -f "$path")"
done

# Everything must be content with the glibc that we name.
find "$root/bin" "$root/bench" "$root/lib" "$root/tests" -type f -exec objdump -T {} + 2>/dev/null |
  sed -n 's/.*(\{0,1\}GLIBC_\([0-9][0-9.]*\))\{0,1\} .*/\1/p' | sort -Vu >"$stage/glibc"
needs_glibc=$(tail -1 "$stage/glibc")
if [[ $(printf '%s\n' "$needs_glibc" "$max_glibc" | sort -V | tail -1) != "$max_glibc" ]]; then
  echo "error: the build needs glibc $needs_glibc; build it on a system that has $max_glibc" >&2
  exit 1
fi

install -m 755 deploy/bundle_run.sh "$root/run"
cp deploy/cublas_path.py "$root/deploy/"
cp LICENSE "$root/"
cp tests/gpu.sh tests/gpu.py "$root/tests/"
# Models, tasks, and the benchmark scripts: what git knows, so that nothing that lies about gets in.
git ls-files -z tests/models tests/bench | xargs -0 cp --parents -t "$root"

mkdir -p "$(dirname "$out")"
tar -C "$stage" --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -cf - bebop-bundle | xz -T0 -3 >"$out.part"
mv "$out.part" "$out"

bundle_bytes=$(stat -c %s "$out")
tree_bytes=$(git ls-files -z | xargs -0 -r stat -c %s 2>/dev/null | awk '{ sum += $1 } END { print sum }')
model_bytes=$(git ls-files -z tests/models | xargs -0 -r stat -c %s | awk '{ sum += $1 } END { print sum }')
total=$((bundle_bytes + tree_bytes - model_bytes))
awk -v bundle="$bundle_bytes" -v tree="$tree_bytes" -v model="$model_bytes" -v total="$total" -v glibc="$needs_glibc" -v out="$out" 'BEGIN {
  printf "%s: %.1f MiB; with the source tree (%.1f MiB) but the model (%.1f MiB) once: %.1f MiB; needs glibc %s\n", out,
         bundle / 1048576, tree / 1048576, model / 1048576, total / 1048576, glibc }'
if ((total > max_total_bytes)); then
  echo "error: more than 60 MiB" >&2
  exit 1
fi
