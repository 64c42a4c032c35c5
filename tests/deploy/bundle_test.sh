#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes a bundle of a CUDA build, unpacks it elsewhere and tries it where no GPU is.
#
#   tests/deploy/bundle_test.sh [--chroot] BUILD_DIR
#
# --chroot (as root, with debootstrap): tries it in an empty Debian 12, too, where none of our libraries is installed. Fetches some 60 MB.
set -euo pipefail
cd "$(dirname "$0")/../.."

chroot=0
out=build/bebop-bundle.tar.xz
if [[ ${1:-} == --chroot ]]; then chroot=1; shift; fi
build=${1:?usage: tests/deploy/bundle_test.sh [--chroot] BUILD_DIR}

work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT
deploy/bundle.sh --build "$build" --out "$out"
if [[ -e /dev/nvidiactl ]]; then
  echo "a device is here: tests/gpu.sh tries the bundle on it"
else
  python3 -m tarfile -e "$out" "$work"
  env -i PATH="$PATH" HOME=/ sh tests/deploy/bundle_smoke.sh "$work/bebop-bundle"
  "$work/bebop-bundle/tests/gpu.sh" --list >"$work/list"
  grep -q cuda_test "$work/list"
fi

if ((chroot)); then
  source tests/deploy/debian.sh
  debian_root "$work/debian"
  tar -C "$work/debian/opt" -xf "$out"
  cp tests/deploy/bundle_smoke.sh "$work/debian/opt/"
  in_debian "$work/debian" sh /opt/bundle_smoke.sh /opt/bebop-bundle
  echo "the same in an empty Debian 12"
fi
