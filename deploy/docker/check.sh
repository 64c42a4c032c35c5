#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Checks the Dockerfiles of this folder without a container engine.
#
#   deploy/docker/check.sh                  parses them and checks what dockerfile.py lists under "rules" (a second; part of ctest)
#   deploy/docker/check.sh --run FILE ...   also carries out every step of FILE in an empty Debian 12, then starts the result as its user, with its file
#                                           system read-only and the bundled model at /model (on the CPU), asks its HEALTHCHECK, and stops it.
#                                           As root, with debootstrap and a package mirror; some 10 minutes; not part of ctest.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '3,8s/^# \{0,1\}//p' "$0"
  exit 0
fi
python3 deploy/docker/dockerfile.py lint deploy/docker/*.Dockerfile
if [[ ${1:-} == --run ]]; then
  shift
  for file in "${@:?--run needs Dockerfiles}"; do
    python3 deploy/docker/dockerfile.py run "$file"
  done
fi
