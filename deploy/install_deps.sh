#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what building bebop on Debian 12 needs. Safe to run twice: asks apt and pip only for what is missing.
#
#   deploy/install_deps.sh [build|test|fuzz|cuda ...]
#
# build (default): server and client.   test: their tests.   fuzz: Clang and its runtimes.
# cuda: what the CUDA and the emulated build need. A toolkit 13.x that is there (CUDACXX, PATH, /usr/local/cuda) is used; what it lacks comes as
#       NVIDIA's wheels into build/venv, where CMake finds it with -DBEBOP_PYTHON=build/venv/bin/python: cuBLAS, cuobjdump, or all of nvcc.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
  sed -n '3,9s/^# \{0,1\}//p' "$0"
  exit 0
fi

packages=()
cuda=0
for what in "${@:-build}"; do
  case "$what" in
    build) packages+=(g++ cmake ninja-build git ca-certificates python3 pkg-config libgrpc++-dev protobuf-compiler-grpc
                      protobuf-compiler libprotobuf-dev libabsl-dev nlohmann-json3-dev libicu-dev libre2-dev libyaml-cpp-dev
                      libcli11-dev libssl-dev prometheus-cpp-dev) ;;
    test) packages+=(libgtest-dev libbenchmark-dev python3-venv) ;;
    fuzz) packages+=(clang-19 libclang-rt-19-dev) ;;
    cuda) packages+=(libboost-context-dev python3-venv zstd); cuda=1 ;;
    *) echo "error: unknown part '$what' (build, test, fuzz or cuda)" >&2; exit 2 ;;
  esac
done

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if ((${#missing[@]})); then
  echo "installing: ${missing[*]}"
  sudo=()
  if ((EUID != 0)); then
    sudo=(sudo)
  fi
  "${sudo[@]}" apt-get update -qq
  DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
((cuda)) || exit 0

# The CUDA toolkit, part by part. The wheels are of the toolkit's own minor version where it matters.
major_minor=13.0
nvcc=${CUDACXX:-$(command -v nvcc || true)}
if [[ -z $nvcc && -x /usr/local/cuda/bin/nvcc ]]; then nvcc=/usr/local/cuda/bin/nvcc; fi
wheels=()
if [[ -n $nvcc ]] && "$nvcc" --version 2>/dev/null | grep -q 'release 13\.'; then
  # The folder that nvcc itself uses: `nvcc` may be a script or a link.
  toolkit=$("$nvcc" --dryrun -x cu -c /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
else
  toolkit=
  wheels+=("nvidia-cuda-nvcc==$major_minor.*" "nvidia-cuda-crt==$major_minor.*" "nvidia-nvvm==$major_minor.*"
           "nvidia-cuda-runtime==$major_minor.*" "nvidia-cuda-cccl==$major_minor.*")
fi
if [[ -z $toolkit || ! -f $toolkit/include/cublasLt.h ]]; then wheels+=("nvidia-cublas==$major_minor.*"); fi
# Any version of the 13 series reads what 13.0 wrote; the wheels start at 13.2.
if [[ -z $toolkit || ! -x $toolkit/bin/cuobjdump ]]; then wheels+=("nvidia-cuda-cuobjdump==13.*" "nvidia-cuda-nvdisasm==13.*"); fi
((${#wheels[@]})) || exit 0

python=build/venv/bin/python
marker=build/venv/.cuda-wheels
if [[ -x $python && -f $marker && $(cat "$marker") == "${wheels[*]}" ]]; then exit 0; fi
echo "installing into build/venv: ${wheels[*]}"
mkdir -p build
[[ -x $python ]] || python3 -m venv build/venv
"$python" -m pip install --disable-pip-version-check --quiet "${wheels[@]}" >build/venv-cuda.log 2>&1 || { tail -20 build/venv-cuda.log; exit 1; }
# nvcc links with -L lib64 and CMake asks for a libcudart.so; the wheels name neither.
folder=$("$python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/nvidia/cu13
if [[ -x $folder/bin/nvcc ]]; then
  ln -sfn lib "$folder/lib64"
  ln -sf libcudart.so.13 "$folder/lib/libcudart.so"
fi
echo "${wheels[*]}" >"$marker"
