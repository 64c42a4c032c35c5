# SPDX-License-Identifier: Apache-2.0
"""Checks what the house style promises about the tree: include order, who may see which outside headers, SPDX lines, header guards.

Run by ctest; `python3 tests/house/house_test.py` prints every offence. The checks are tried on broken samples first, so that a check
that has gone blind fails.
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

# A folder may include itself and folders to its left. kernels/<op> may include another op only as OP_MAY_INCLUDE says: packed weights, and the
# sampling kernels' blocks, which the device's decode steps share.
ORDER = [
    "engine/formats", "kernels/common", "kernels", "engine/base", "engine/config", "engine/memory", "engine/weights",
    "engine/tokenizer", "engine/model", "engine/sampling", "engine/speculative", "engine/schedule", "engine/runtime",
    "engine/training", "engine/tools", "server",
]
OP_MAY_INCLUDE = {"kernels/embedding": {"kernels/linear"}, "kernels/decode": {"kernels/sampling"}}
CLIENT_MAY_INCLUDE = {"client", "engine/formats", "proto"}
# Files that catch what a library throws (CLI11, yaml-cpp) and turn it into a status; nobody throws.
MAY_CATCH = {"server/server_options.cc", "client/cli/main.cc", "engine/tools/train_mtp.cc"}
# The one file with inline PTX: everything else builds for the emulated device too.
MAY_ASM = {"kernels/common/gpu_nvcc.h"}
CUDA_HEADER = re.compile(r"(cuda|cublas|cub/|cooperative_groups|curand|device_|driver_types|mma\.h|nccl|nv/|nvtx|sm_\d|thrust/|vector_(types|functions))")
# What kernels/common/gpu.h rules out in kernel files, and why.
NOT_IN_KERNELS = {
    r"__activemask": "names whichever lanes happen to be there; write the mask",
    r"__CUDA_ARCH__": "one source for every device",
    r"extern\s+__shared__": "use BEBOP_DYNAMIC_SHARED",
    r"\b(cooperative_groups|cub|thrust)::": "does not build for the emulated device",
}
SOURCE = {".cc", ".h", ".cu", ".cuh"}
KERNEL_FILE = {".cu", ".cuh"}
NEEDS_SPDX = SOURCE | {".py", ".sh", ".cmake", ".proto"}
INCLUDE = re.compile(r'^\s*#\s*include\s+(["<])([^">]+)[">]')


def room_of(path):
    """The folder of ORDER (or client, proto, tests) that a repository path belongs to; None for paths outside."""
    parts = path.split("/")
    if parts[0] == "kernels" and len(parts) > 2:
        return "/".join(parts[:2])
    if parts[0] == "engine" and len(parts) > 2:
        return "/".join(parts[:2])
    if parts[0] in ("server", "client", "proto", "tests"):
        return parts[0]
    if parts[0] == "bebop":  # generated: bebop/v1/*.pb.h
        return "proto"
    return None


def rank(room):
    if room.startswith("kernels/") and room != "kernels/common":
        return ORDER.index("kernels")
    return ORDER.index(room) if room in ORDER else None


def check_include(path, kind, name):
    """The offence of one include line, or None."""
    room, target = room_of(path), room_of(name)
    if room == "tests":
        return None
    outside_rpc = name.startswith(("grpc", "google/protobuf")) or name.endswith(".pb.h")
    if outside_rpc and room not in ("server", "client"):
        return f"{path}: {name}: protobuf and gRPC stay in server and client"
    outside_cuda = kind == "<" and CUDA_HEADER.match(name)
    if outside_cuda and pathlib.PurePosixPath(path).suffix in KERNEL_FILE:
        return f"{path}: {name}: kernel files see CUDA through kernels/common/gpu.h"
    if outside_cuda and not (room is not None and room.startswith("kernels/") or room in ("engine/memory", "engine/runtime")):
        return f"{path}: {name}: CUDA headers stay in kernels, engine/memory and engine/runtime"
    if kind == "<" or target is None:
        return None
    if target == "tests":
        return f"{path}: includes test code {name}"
    if room == target:
        return None
    if room == "client":
        return None if target in CLIENT_MAY_INCLUDE else f"{path}: client may not include {name}"
    if target in ("proto", "client"):
        return None if room == "server" and target == "proto" else f"{path}: may not include {name}"
    if rank(room) is None or rank(target) is None:
        return f"{path}: {room} or {target} is not in the folder order"
    if rank(target) == rank(room) and room.startswith("kernels/"):
        return None if target in OP_MAY_INCLUDE.get(room, set()) else f"{path}: {room} may not include {target}"
    if rank(target) > rank(room):
        return f"{path}: includes {name}, to the right of {room}"
    return None


def includes_gpu(text):
    return '#include "kernels/common/gpu.h"' in text


def own_includes(text):
    return [match.group(2) for match in map(INCLUDE.match, text.splitlines()) if match and match.group(1) == '"']


def text_of(path):
    return (ROOT / path).read_text(errors="replace") if (ROOT / path).is_file() else ""


def check_text(path, text):
    """All offences of one file."""
    offences = []
    suffix = pathlib.PurePosixPath(path).suffix
    head = "\n".join(text.splitlines()[:3])
    if (suffix in NEEDS_SPDX or path.endswith("CMakeLists.txt")) and "SPDX-License-Identifier: Apache-2.0" not in head:
        offences.append(f"{path}: no SPDX line in its first three lines")
    if suffix in (".h", ".cuh") and "#pragma once" not in text:
        offences.append(f"{path}: no #pragma once")
    code = re.sub(r'//.*|"[^"\n]*"', "", text)
    if suffix in SOURCE and not path.startswith("tests/"):
        if re.search(r"\bassert\s*\(", code):
            offences.append(f"{path}: assert; use BEBOP_CHECK or a status")
        if re.search(r"absl::(Mutex|Notification|BlockingCounter)\b", code):
            offences.append(f"{path}: absl locks are not instrumented for TSan; use engine/base/mutex.h")
        if re.search(r"\b(throw|catch)\b\s*[(\w]", code) and path not in MAY_CATCH:
            offences.append(f"{path}: exceptions; return a status")
        if re.search(r"\basm\b", code) and path not in MAY_ASM:
            offences.append(f"{path}: inline assembly; PTX stays in kernels/common/gpu_nvcc.h")
    if suffix in SOURCE and "<<<" in code:
        offences.append(f"{path}: <<<>>>; launch through gpu::Launch")
    device_code = includes_gpu(text)
    if suffix == ".cu" and not device_code and not any(includes_gpu(text_of(name)) for name in own_includes(text)):
        offences.append(f"{path}: a kernel file includes kernels/common/gpu.h, or a header that does")
    if suffix in KERNEL_FILE or device_code:
        for pattern, why in NOT_IN_KERNELS.items():
            if re.search(pattern, code):
                offences.append(f"{path}: {pattern}: {why}")
    if suffix in SOURCE and re.search(r"\bTODO\b(?!\(#\d+\))", text):
        offences.append(f"{path}: TODO without an issue")
    if suffix in SOURCE:
        for line in text.splitlines():
            match = INCLUDE.match(line)
            if match:
                offence = check_include(path, match.group(1), match.group(2))
                if offence:
                    offences.append(offence)
    return offences


def self_test():
    """Each check must catch its broken sample."""
    spdx = "// SPDX-License-Identifier: Apache-2.0\n"
    gpu = spdx + '#include "kernels/common/gpu.h"\n'
    broken = [
        ("kernels/linear/a.cc", spdx + '#include "engine/base/clock.h"\n'),
        ("kernels/attention/a.cc", spdx + '#include "kernels/linear/linear.h"\n'),
        ("engine/model/a.cc", spdx + '#include "engine/schedule/request.h"\n'),
        ("engine/schedule/a.cc", spdx + '#include "bebop/v1/rollout.pb.h"\n'),
        ("client/cpp/a.cc", spdx + '#include "engine/schedule/request.h"\n'),
        ("server/a.cc", spdx + '#include "client/cpp/client.h"\n'),
        ("engine/config/a.cc", spdx + "#include <cuda_runtime.h>\n"),
        ("engine/model/b.cc", spdx + "#include <cublasLt.h>\n"),
        ("server/b.cc", spdx + "#include <cuda_runtime_api.h>\n"),
        ("client/cli/b.cc", spdx + "#include <cuda_runtime_api.h>\n"),
        ("kernels/attention/b_cuda.cu", gpu + "#include <cuda_bf16.h>\n"),
        ("kernels/attention/c_cuda.cu", gpu + "#include <mma.h>\n"),
        ("kernels/attention/d_cuda.cu", spdx),
        ("kernels/attention/d_cuda.cu", spdx + '#include "kernels/common/check.h"\n'),
        ("kernels/attention/device.h", gpu + "#pragma once\nextern __shared__ float x[];\n"),
        ("kernels/attention/e_cuda.cu", gpu + 'void f() { asm volatile("bar.sync 0;"); }\n'),
        ("kernels/attention/f_cuda.cu", gpu + "void f() { g<<<1, 2>>>(); }\n"),
        ("tests/kernels/attention/f_test.cc", spdx + "void f() { g<<<1, 2>>>(); }\n"),
        ("kernels/attention/g_cuda.cu", gpu + "unsigned f() { return __activemask(); }\n"),
        ("kernels/attention/h_cuda.cu", gpu + "#if __CUDA_ARCH__ >= 900\n#endif\n"),
        ("kernels/attention/i_cuda.cu", gpu + "extern __shared__ float x[];\n"),
        ("kernels/attention/j_cuda.cu", gpu + "void f() { cub::Sum(); }\n"),
        ("engine/runtime/b.cc", spdx + 'void f() { asm("nop"); }\n'),
        ("engine/base/a.h", spdx),
        ("engine/base/a.cc", "int x;\n"),
        ("engine/base/b.cc", spdx + "void f() { assert(1); }\n"),
        ("engine/base/c.cc", spdx + "void f() { throw 1; }\n"),
        ("engine/base/d.cc", spdx + "absl::Mutex m;\n"),
    ]
    blind = [path for path, text in broken if not check_text(path, text)]
    good = check_text("engine/model/a.cc", spdx + '#include "kernels/linear/linear.h"\n#include "absl/status/status.h"\n')
    good += check_text("engine/memory/a.cc", spdx + "#include <cuda_runtime_api.h>\n")
    good += check_text("kernels/linear/a.cc", spdx + "#include <cublasLt.h>\n")
    good += check_text("kernels/linear/a_cuda.cu", gpu + '#include "kernels/common/cuda_stream.h"\n// no <<<>>>, no asm\n')
    good += check_text("kernels/common/gpu_nvcc.h", spdx + '#pragma once\n#include <cuda_runtime.h>\nvoid f() { asm("x;"); }\n')
    if blind or good:
        sys.exit(f"the checks themselves are broken: blind to {blind}, false alarm {good}")


def main():
    self_test()
    listing = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True,
                             capture_output=True, check=True).stdout.split()
    offences, checked = [], 0
    for path in listing:
        file = ROOT / path
        if not file.is_file() or not (file.suffix in NEEDS_SPDX or file.name == "CMakeLists.txt"):
            continue
        offences += check_text(path, file.read_text(errors="replace"))
        checked += 1
    for offence in offences:
        print(offence)
    print(f"{checked} files checked, {len(offences)} offences")
    sys.exit(1 if offences or checked < 50 else 0)


if __name__ == "__main__":
    main()
