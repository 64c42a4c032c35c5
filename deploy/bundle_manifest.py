# SPDX-License-Identifier: Apache-2.0
"""What a build of the CUDA backend holds, as JSON: its programs, its tests labelled `cuda` and its device benchmarks, as far as they are built.

usage: bundle_manifest.py BUILD_DIR

  {"version": "0.1.0", "device": "cuda" | "emulated", "programs": ["bin/bebop", ...], "benches": ["bench/ops_cuda_bench", ...],
   "tests": [{"name": "attention_cuda_test", "program": "tests/attention_cuda_test", "arguments": [], "folder": "tests/kernels/attention",
              "labels": ["cuda"], "timeout_s": 300}, ...]}
Programs are relative to the build tree. CTest itself says which tests there are, so that no list is kept by hand.
"""

import json
import os
import pathlib
import re
import subprocess
import sys


def cache_entry(build, name):
    match = re.search(rf"^{name}:\w+=(.*)$", (build / "CMakeCache.txt").read_text(), re.MULTILINE)
    return match.group(1) if match else ""


def folder_of(test, graph, source):
    """The folder whose CMakeLists.txt declares the test: the outermost frame of its backtrace but for the generic functions."""
    node = test.get("backtrace")
    while node is not None:
        entry = graph["nodes"][node]
        file = pathlib.Path(graph["files"][entry["file"]])
        if file.name == "CMakeLists.txt":
            file = file if file.is_absolute() else source / file
            return str(file.parent.relative_to(source))
        node = entry.get("parent")
    return ""


def is_true(value):
    return value.upper() in ("ON", "1", "TRUE", "YES")


def manifest(build):
    build = pathlib.Path(build).resolve()
    source = pathlib.Path(cache_entry(build, "CMAKE_HOME_DIRECTORY"))
    listing = json.loads(subprocess.run(["ctest", "--test-dir", str(build), "--show-only=json-v1"], check=True, text=True,
                                        capture_output=True).stdout)
    tests = []
    for test in listing["tests"]:
        properties = {p["name"]: p["value"] for p in test.get("properties", [])}
        command = test.get("command", [])
        if "cuda" not in properties.get("LABELS", []) or not command:
            continue
        program = pathlib.Path(command[0])
        if program.parent != build / "tests" or not os.access(program, os.X_OK):
            continue  # a script that drives programs, or not built
        tests.append({"name": test["name"], "program": str(program.relative_to(build)), "arguments": command[1:],
                      "folder": folder_of(test, listing["backtraceGraph"], source), "labels": properties["LABELS"],
                      "timeout_s": properties.get("TIMEOUT", 120)})
    def built(folder, names):
        return [f"{folder}/{name}" for name in names if os.access(build / folder / name, os.X_OK)]

    benches = sorted(path.name for path in (build / "bench").iterdir() if path.is_file()) if (build / "bench").is_dir() else []
    cpu_benches = {"linear_bench", "ops_bench", "sampling_bench"}
    return {
        "version": cache_entry(build, "CMAKE_PROJECT_VERSION"),
        "device": "emulated" if is_true(cache_entry(build, "BEBOP_EMULATE_CUDA")) else "cuda",
        "programs": built("bin", ["bebop-server", "bebop", "bebop-train-mtp"]),
        "benches": built("bench", [name for name in benches if name not in cpu_benches]),
        "tests": sorted(tests, key=lambda test: (test["folder"], test["name"])),
    }


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (pathlib.Path(sys.argv[1]) / "CMakeCache.txt").is_file():
        sys.exit("usage: bundle_manifest.py BUILD_DIR")
    print(json.dumps(manifest(sys.argv[1]), indent=1))
