# SPDX-License-Identifier: Apache-2.0
"""Compiles every public header alone: a header must include what it needs."""

import argparse
import concurrent.futures
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def compiles(compiler, generated, header):
    """None, or the compiler's complaint about a file that includes nothing but `header`."""
    command = [compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}", f"-I{generated}",
               f"-I{generated}/proto", "-x", "c++", "-"]
    done = subprocess.run(command, input=f'#include "{header}"\n', text=True, capture_output=True)
    return None if done.returncode == 0 else f"{header}:\n{done.stderr[:2000]}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--compiler", required=True)
    parser.add_argument("--generated", required=True, help="build tree, for generated headers")
    args = parser.parse_args()
    headers = sorted(str(path.relative_to(ROOT)) for folder in ("kernels", "engine", "server", "client")
                     for path in (ROOT / folder).rglob("*.h"))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        complaints = [c for c in pool.map(lambda h: compiles(args.compiler, args.generated, h), headers) if c]
    print("\n".join(complaints))
    print(f"{len(headers)} headers compiled alone, {len(complaints)} failed")
    sys.exit(1 if complaints or not headers else 0)


if __name__ == "__main__":
    main()
