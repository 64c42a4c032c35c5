# SPDX-License-Identifier: Apache-2.0
"""Compiles every public header alone: a header must include what it needs.

Headers that reach a CUDA header, directly or through ours, are compiled against the toolkit's; those that reach device code are compiled by
nvcc. Where there is no toolkit (CUDACXX, PATH, /usr/local/cuda, build/venv), these alone are left out, and the last line says how many.
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
INCLUDE = re.compile(r'^\s*#\s*include\s+(["<])([^">]+)[">]', re.MULTILINE)
DEVICE_HEADER = "kernels/common/gpu_nvcc.h"


class Toolkit:
    """Where CUDA is: `nvcc` (None without one) and the folders of its headers."""

    def __init__(self):
        wheels = sorted((ROOT / "build" / "venv" / "lib").glob("python3*/site-packages/nvidia/cu13"))
        candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
        candidates += [str(wheel / "bin" / "nvcc") for wheel in wheels]
        self.nvcc = next((nvcc for nvcc in candidates if nvcc and os.access(nvcc, os.X_OK)), None)
        self.include_dirs = [str(wheel / "include") for wheel in wheels]
        if self.nvcc:
            dry = subprocess.run([self.nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"], text=True, capture_output=True).stderr
            self.include_dirs += [folder for line in dry.splitlines() if line.startswith("#$ INCLUDES=")
                                  for folder in re.findall(r'-I([^"]+)"', line)]
        else:
            self.include_dirs = []

    def has(self, header):
        return any((pathlib.Path(folder) / header).is_file() for folder in self.include_dirs)


def reaches(header, seen=None):
    """(CUDA's headers, our headers) that a header of ours reaches through our own."""
    seen = seen if seen is not None else set()
    seen.add(header)
    outside = set()
    path = ROOT / header
    if not path.is_file():
        return outside, seen
    for kind, name in INCLUDE.findall(path.read_text()):
        if kind == "<" and re.match(r"(cuda|cublas)", name):
            outside.add(name)
        elif kind == '"' and name not in seen:
            outside |= reaches(name, seen)[0]
    return outside, seen


def compiles(args, toolkit, header):
    """None; or the compiler's complaint about a file that includes nothing but `header`; or "skipped"."""
    cuda, ours = reaches(header)
    flags = ["-std=c++20", f"-I{ROOT}", f"-I{args.generated}", f"-I{args.generated}/proto"]
    if cuda:
        if not toolkit.nvcc or not all(toolkit.has(name) for name in cuda):
            return "skipped"
        flags += [flag for folder in toolkit.include_dirs for flag in ("-isystem", folder)]
    if DEVICE_HEADER in ours:
        command = [toolkit.nvcc, *flags, "-arch=sm_80", "--expt-relaxed-constexpr", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror",
                   "-x", "cu", "-c", "-o", "/dev/null", "-"]
    else:
        command = [args.compiler, *flags, "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-x", "c++", "-"]
    done = subprocess.run(command, input=f'#include "{header}"\n', text=True, capture_output=True)
    return None if done.returncode == 0 else f"{header}:\n{done.stderr[:2000]}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--compiler", required=True)
    parser.add_argument("--generated", required=True, help="build tree, for generated headers")
    args = parser.parse_args()
    toolkit = Toolkit()
    headers = sorted(str(path.relative_to(ROOT)) for folder in ("kernels", "engine", "server", "client")
                     for suffix in ("*.h", "*.cuh") for path in (ROOT / folder).rglob(suffix))
    if not reaches("kernels/common/gpu.h")[0] or DEVICE_HEADER not in reaches("kernels/common/gpu.h")[1]:
        sys.exit("the search for CUDA headers has gone blind: kernels/common/gpu.h reaches some")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda header: compiles(args, toolkit, header), headers))
    complaints = [result for result in results if result not in (None, "skipped")]
    skipped = [header for header, result in zip(headers, results) if result == "skipped"]
    print("\n".join(complaints))
    if skipped:
        print(f"left out, since this machine has no CUDA toolkit or not all of it (deploy/install_deps.sh cuda): {' '.join(skipped)}")
    print(f"{len(headers) - len(skipped)} headers compiled alone, {len(complaints)} failed, {len(skipped)} left out")
    sys.exit(1 if complaints or len(headers) <= len(skipped) else 0)


if __name__ == "__main__":
    main()
