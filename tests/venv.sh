#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes build/venv with the packages of tests/requirements.txt, unless they are there. Run from the repository's root.
#
# transformers and PyTorch are the oracles of the network; a CPU build of torch, so that no CUDA packages come along.
set -euo pipefail
python=build/venv/bin/python
if [[ -x $python ]] &&
  "$python" -c 'import torch, transformers, tokenizers, safetensors, numpy, scipy, grpc_tools, pytest, matplotlib' 2>/dev/null; then
  exit 0
fi
mkdir -p build
{
  python3 -m venv build/venv &&
    "$python" -m pip install --disable-pip-version-check 'torch==2.13.0' &&
    "$python" -m pip install --disable-pip-version-check -r tests/requirements.txt
} >build/venv.log 2>&1 || { tail -20 build/venv.log; exit 1; }
