#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what building bebop on Debian 12 needs. Safe to run twice: asks apt only for what is missing.
#   deploy/install_deps.sh [build|test|fuzz ...]     build (default): server and client; test: their tests; fuzz: Clang and its runtimes
set -euo pipefail

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
  sed -n '3,4s/^# //p' "$0"
  exit 0
fi

packages=()
for what in "${@:-build}"; do
  case "$what" in
    build) packages+=(g++ cmake ninja-build git ca-certificates python3 pkg-config libgrpc++-dev protobuf-compiler-grpc
                      protobuf-compiler libprotobuf-dev libabsl-dev nlohmann-json3-dev libicu-dev libre2-dev libyaml-cpp-dev
                      libcli11-dev) ;;
    test) packages+=(libgtest-dev libbenchmark-dev python3-venv) ;;
    fuzz) packages+=(clang-19 libclang-rt-19-dev) ;;
    *) echo "error: unknown part '$what' (build, test or fuzz)" >&2; exit 2 ;;
  esac
done

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
  exit 0
fi
echo "installing: ${missing[*]}"
sudo=()
if ((EUID != 0)); then
  sudo=(sudo)
fi
"${sudo[@]}" apt-get update -qq
DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
