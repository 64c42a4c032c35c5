#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the device tests in phases of under 8 minutes each, without a network: from an unpacked bundle (deploy/bundle.sh) or from a build tree.
#
#   tests/gpu.sh --list                                       the phases
#   tests/gpu.sh [--only PHASE ...] [--bundle DIR | --build DIR] [--device cuda|emulated] [--out DIR]
#
# Inside a bundle, --bundle is the bundle itself. Prints one line a test; logs and gpu.json go to --out (default: $OUT, then build/gpu).
# --device emulated runs the same phases on a build of the preset cuda-emulated.
exec python3 "$(dirname "$0")/gpu.py" "$@"
