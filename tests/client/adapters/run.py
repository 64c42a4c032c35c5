#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Installs the adapters' frameworks at pinned versions and the client's wheel, and runs the adapters' tests against the built server.

  run.py --server build/cpu-release/bin/bebop-server --work build/cpu-release/python-adapters

Everything goes into folders beneath --work; the frameworks stay there for the next run. Exits with 77 (skipped) when the interpreter lacks what
tests/requirements.txt and torch bring, or when the package index has not what requirements.txt here pins.
"""

import argparse
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
PACKAGE = HERE.parents[2] / "client/python"
REQUIREMENTS = HERE / "requirements.txt"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]


def install_frameworks(folder):
    stamp = folder / "installed"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    # torch and transformers are the interpreter's: --no-deps keeps pip from bringing others.
    done = subprocess.run([*PIP, "--only-binary", ":all:", "--target", str(folder), "-r", str(REQUIREMENTS)], stderr=subprocess.PIPE,
                          text=True, check=False)
    if done.returncode != 0:
        missing = [line for line in done.stderr.splitlines() if "No matching distribution" in line]
        if missing:
            print(f"skipped: {missing[0]}")
            sys.exit(77)
        sys.exit(done.stderr)
    stamp.write_text(wanted)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("tests", nargs="*", help="arguments of pytest; default: all")
    args = parser.parse_args()
    needed = ("grpc_tools", "grpc", "numpy", "pytest", "setuptools", "torch", "transformers", "safetensors")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        print(f"skipped: {sys.executable} has no {', '.join(missing)} (pip install torch -r tests/requirements.txt)")
        sys.exit(77)
    # dill, with which datasets makes fingerprints, takes a module for installed if its path says so, and else pickles its whole contents.
    source, site, frameworks = args.work / "source", args.work / "site", args.work / "frameworks/site-packages"
    install_frameworks(frameworks)
    shutil.rmtree(source, ignore_errors=True)
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    shutil.copytree(PACKAGE.parents[1] / "proto", source / "proto")
    subprocess.run([*PIP, "--no-build-isolation", "--target", str(site), str(source)], check=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site.resolve()), str(frameworks.resolve())]),
                   "BEBOP_SERVER": str(pathlib.Path(args.server).resolve()),
                   # pip compiled the frameworks: Ray's processes give each other 15 seconds to start.
                   "PYTHONDONTWRITEBYTECODE": "1"}
    sys.exit(subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", *(args.tests or [str(HERE)])],
                            env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
