#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Installs the Python client into a folder of its own and runs the examples' tests with it against the built server.

  run.py --server build/cpu-release/bin/bebop-server --work build/cpu-release/python-examples

Exits with 77 (skipped) when the interpreter lacks a package of tests/requirements.txt, or torch.
"""

import argparse
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
NEEDED = ("grpc_tools", "grpc", "numpy", "pytest", "safetensors", "setuptools", "tokenizers", "torch")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    args = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"skipped: {sys.executable} has no {', '.join(missing)} (torch, and pip install -r tests/requirements.txt)")
        sys.exit(77)
    shutil.rmtree(args.work, ignore_errors=True)
    source, site = args.work / "source", args.work / "site"
    # A copy, so that building leaves nothing in the tree; protos where a source distribution has them.
    shutil.copytree(ROOT / "client/python", source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    shutil.copytree(ROOT / "proto", source / "proto")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check",
                    "--target", str(site), str(source)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "BEBOP_SERVER": args.server, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE)]
    sys.exit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
