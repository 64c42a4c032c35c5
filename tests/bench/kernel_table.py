# SPDX-License-Identifier: Apache-2.0
"""What the compiler made of every kernel: docs/kernels.md from the objects of a cuda-release build.

  kernel_table.py BUILD_DIR            prints the page
  kernel_table.py BUILD_DIR --write    writes docs/kernels.md
  kernel_table.py BUILD_DIR --check    fails when a kernel spills registers that may not, or when docs/kernels.md lists other kernels than the
                                       build has (numbers may differ by compiler; kernels may not)

Registers, stack and static shared memory are cuobjdump's --dump-resource-usage; instructions are counted in its --dump-sass (which needs nvdisasm):
`deploy/install_deps.sh cuda` installs both. No device is needed, and nothing here says how fast a kernel is.
"""

import argparse
import collections
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "kernels.md"
ARCHITECTURES = ["sm_90a", "sm_80"]
RESERVED_SHARED_SM90 = 1024  # of every block that uses shared memory, by the system; cuobjdump counts it in

# What each kernel is expected to wait for on an H200, as its file's banner derives it. A kernel that is missing here, or an entry without a
# kernel, is an error. `DRAM` bytes of device memory, `tensor` tensor cores, `latency` launch, dependent loads and barriers, `L1` loads from L1.
LIMITERS = {
    "AdamWKernel": "DRAM",
    "AdvanceSequences": "latency",
    "BackwardKernel": "DRAM (logits)",
    "BeginDecodeRows": "latency",
    "CausalConvKernel": "DRAM",
    "ChainForwardKernel": "L2 (keys and values in float32), tensor",
    "ChainKeysKernel": "L2 (queries and gradients in float32), tensor",
    "ChainLossKernel": "latency",
    "ChainQueriesKernel": "L2 (keys and values in float32), tensor",
    "ChainRowsKernel": "DRAM",
    "ChunkKernel": "tensor, shared memory",
    "ConvertKernel": "DRAM",
    "DocumentRowsKernel": "latency",
    "DrawRows": "latency",
    "EmbeddingKernel": "latency; DRAM for long prompts",
    "FinishRows": "latency",
    "FinishSequences": "latency",
    "FloatKernel": "L1 (float32, the oracle mode)",
    "ForwardKernel": "DRAM (logits)",
    "GatedRmsNormKernel": "latency; DRAM for long prompts",
    "GatherUnits": "latency",
    "GumbelDrafts": "integer arithmetic (Philox)",
    "GumbelRows": "integer arithmetic (Philox)",
    "LinearBf16Kernel": "DRAM (weights)",
    "LinearFloat32Kernel": "L1 (float32, the oracle mode)",
    "MaxBlocks": "DRAM (logits)",
    "MergeKernel": "latency",
    "NormalizeKernel": "DRAM (logits)",
    "PrefillKernel": "tensor",
    "PrepareRows": "latency",
    "PublishWords": "latency (PCIe)",
    "QkNormRopeBackwardKernel": "DRAM",
    "QkNormRopeKernel": "latency; DRAM for long prompts",
    "QkNormWeightKernel": "latency",
    "RmsNormBackwardKernel": "DRAM",
    "RmsNormKernel": "latency; DRAM for long prompts",
    "RmsNormWeightKernel": "latency",
    "ScatterKernel": "latency",
    "SplitKernel": "DRAM (keys and values); shared memory from 48 rows on",
    "SquaredNormKernel": "DRAM",
    "SquaredNormSumKernel": "latency",
    "StepKernel": "DRAM (state)",
    "SumBlocks": "DRAM or L2 (logits)",
    "SwiGluBackwardKernel": "DRAM",
    "SwiGluKernel": "latency; DRAM for long prompts",
    "VocabularyRows": "DRAM (logits of rejected rows)",
    "WindowKernel": "latency",
}
# Kernels that may keep so many bytes a thread in local memory; all others none, as STL is the store of a spilled register or a local array. These are
# kernels of one block a row, or of a few blocks, that wait for loads and barriers: 1,024 threads leave them 64 registers or fewer.
MAY_USE_LOCAL_BYTES = {"AdvanceSequences": 32, "ChainLossKernel": 32, "FinishRows": 32, "FinishSequences": 32, "PrepareRows": 32}

# Classes of SASS opcodes, in the order of the table's column.
CLASSES = [
    ("tensor", {"HMMA", "HGMMA", "IMMA"}),
    ("cp.async", {"LDGSTS", "UBLKCP", "UTMALDG"}),
    ("ldmatrix", {"LDSM"}),
    ("ld", {"LDG", "LD"}),
    ("st", {"STG", "ST"}),
    ("lds", {"LDS"}),
    ("sts", {"STS"}),
    ("fp32", {"FFMA", "FADD", "FMUL"}),
    ("fp64", {"DFMA", "DADD", "DMUL"}),
    ("mufu", {"MUFU"}),
    ("shfl", {"SHFL"}),
    ("bar", {"BAR"}),
    ("local", {"LDL", "STL"}),
]
OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]\s+)?([A-Z][A-Z0-9_]*)")

Kernel = collections.namedtuple("Kernel", "file name registers stack shared mix instructions")


def find_tool(name, build):
    cache = (build / "CMakeCache.txt").read_text()
    match = re.search(r"^BEBOP_PYTHON:\w+=(.+)$", cache, re.MULTILINE)
    pythons = [pathlib.Path(match.group(1))] if match else []
    wheels = [folder / "bin" / name for python in [*pythons, ROOT / "build" / "venv" / "bin" / "python"]
              for folder in sorted((python.parent.parent / "lib").glob("python3*/site-packages/nvidia/cu13"))]
    for candidate in [shutil.which(name), f"/usr/local/cuda/bin/{name}", *wheels]:
        if candidate and os.access(candidate, os.X_OK):
            return str(candidate)
    sys.exit(f"error: {name} is missing; deploy/install_deps.sh cuda installs it")


def demangle(names):
    """Short readable names: no namespaces, return types or parameter lists."""
    readable = subprocess.run(["c++filt"], input="\n".join(names), text=True, capture_output=True, check=True).stdout.splitlines()
    short = {}
    for mangled, name in zip(names, readable):
        name = name.replace("(anonymous namespace)::", "").replace("bebop::cuda::", "").replace("bebop::", "")
        name = re.sub(r"\(int\)|\(bool\)", "", name)
        depth, end = 0, len(name)
        for i, c in enumerate(name):  # the parameter list opens at the first parenthesis outside < >
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                end = i
                break
        head = name[:end]
        # A template's return type comes first; blanks inside < > are its arguments'.
        depth, start = 0, 0
        for i, c in enumerate(head):
            depth += (c == "<") - (c == ">")
            if c == " " and depth == 0:
                start = i + 1
        head = head[start:]
        base, bracket, arguments = head.partition("<")
        short[mangled] = base.rpartition("::")[2] + bracket + arguments.replace("> >", ">>")
    return short


def kernels_of(cuobjdump, environment, build, source_of, obj):
    """{architecture: [Kernel]} of one object file."""
    def output(flag):
        done = subprocess.run([cuobjdump, flag, str(obj)], text=True, capture_output=True, env=environment)
        if done.returncode != 0:
            sys.exit(f"error: cuobjdump {flag} {obj}: {done.stderr.strip()}")
        return done.stdout

    usage, architecture, function = collections.defaultdict(dict), None, None
    for line in output("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match.group(1)
        elif match := re.match(r"\s*Function (\S+):", line):
            function = match.group(1)
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            usage[architecture][function] = tuple(map(int, match.groups()))
    counts, architecture, function = collections.defaultdict(lambda: collections.defaultdict(collections.Counter)), None, None
    for line in output("--dump-sass").splitlines():
        if match := re.match(r"\s*code for (\w+)", line):
            architecture = match.group(1)
        elif match := re.match(r"\s*Function : (\S+)", line):
            function = match.group(1)
        elif match := OPCODE.match(line):
            if match.group(1) != "NOP":
                counts[architecture][function][match.group(1)] += 1
    names = demangle(sorted({name for functions in usage.values() for name in functions}))
    result = collections.defaultdict(list)
    for architecture, functions in usage.items():
        for mangled, (registers, stack, shared) in functions.items():
            opcodes = counts[architecture][mangled]
            if not opcodes:
                sys.exit(f"error: no machine code found for {mangled} ({architecture}): has cuobjdump's format changed?")
            mix = {label: sum(opcodes[name] for name in group) for label, group in CLASSES}
            if architecture.startswith("sm_90") and shared >= RESERVED_SHARED_SM90:
                shared -= RESERVED_SHARED_SM90
            result[architecture].append(Kernel(source_of(obj), names[mangled], registers, stack, shared, mix, sum(opcodes.values())))
    return result


def collect(build):
    cuobjdump = find_tool("cuobjdump", build)
    environment = {**os.environ, "PATH": os.pathsep.join([str(pathlib.Path(find_tool("nvdisasm", build)).parent), os.environ.get("PATH", "")])}
    objects = sorted((build / "kernels").rglob("*.cu.o"))
    if not objects:
        sys.exit(f"error: no kernels in {build}; build the preset cuda-release")

    def source_of(obj):
        folder = obj.relative_to(build).parts
        return "/".join([*folder[:folder.index("CMakeFiles")], obj.name.removesuffix(".o")])

    merged = collections.defaultdict(list)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(lambda obj: kernels_of(cuobjdump, environment, build, source_of, obj), objects):
            for architecture, kernels in result.items():
                merged[architecture] += kernels
    return {architecture: sorted(kernels, key=lambda k: (k.file, natural(k.name))) for architecture, kernels in merged.items()}


def natural(name):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def base_name(name):
    return name.partition("<")[0]


def offences(kernels):
    found = []
    present = {base_name(k.name) for own in kernels.values() for k in own}
    for name in sorted(present - LIMITERS.keys()):
        found.append(f"{name}: what limits it? LIMITERS in tests/bench/kernel_table.py does not say")
    for name in sorted(LIMITERS.keys() - present):
        found.append(f"{name}: in LIMITERS, but no kernel of this build")
    for architecture in ARCHITECTURES:
        if not kernels.get(architecture):
            found.append(f"no code for {architecture}")
        for k in kernels.get(architecture, []):
            if k.stack > MAY_USE_LOCAL_BYTES.get(base_name(k.name), 0) or (k.mix["local"] and not k.stack):
                found.append(f"{k.file} {k.name} ({architecture}): {k.stack} bytes of stack, {k.mix['local']} local loads and stores")
    return found


def compiler_of(build):
    files = sorted(build.glob("CMakeFiles/*/CMakeCUDACompiler.cmake"))
    match = re.search(r'CMAKE_CUDA_COMPILER_VERSION "([^"]+)"', files[-1].read_text()) if files else None
    return match.group(1) if match else "unknown"


def page(kernels, compiler):
    lines = [
        "# Kernels",
        "",
        "What the compiler made of every device kernel, and what each is expected to wait for. **Nothing here was measured on a device**: registers, "
        "shared memory and instructions are read",
        "from the machine code, the limiter is what the banner of the kernel's file derives from its bytes and operations. "
        "Measured times, where there are any, are in [benchmarks.md](benchmarks.md).",
        "",
        f"Made by `tests/bench/kernel_table.py build/cuda-release --write`, nvcc {compiler}; `tests/run.sh --only cuda` fails when a kernel is missing here, "
        "or spills registers (but for a few bytes in the kernels that `kernel_table.py` names).",
        "",
        "- *regs*: registers a thread; *warps*: how many warps these registers let a multiprocessor have (of 64).",
        "- *smem*: bytes of static shared memory; what a launch asks for dynamically is in the banner of its file.",
        "- *local*: bytes of stack, and with a + the loads and stores of local memory; `-` where there is none.",
        "- Counts are instructions in the code, not executed ones: *tensor* HMMA, *cp.async* LDGSTS, *ldmatrix* LDSM, *ld*/*st* global, *lds*/*sts* shared, "
        "*fp32* FFMA+FADD+FMUL, *fp64* likewise, *mufu* special functions.",
        "",
        "| kernel | expected limiter |",
        "|---|---|",
    ]
    present = sorted({(k.file, base_name(k.name)) for own in kernels.values() for k in own})
    lines += [f"| `{name}` ({file}) | {LIMITERS.get(name, '?')} |" for file, name in present]
    for architecture in ARCHITECTURES:
        own = kernels.get(architecture, [])
        lines += ["", f"## {architecture}", "",
                  "| kernel | regs | warps | smem | local | instructions | mix |", "|---|---|---|---|---|---|---|"]
        for k in own:
            warps = min(64, 65536 // (32 * (-(-k.registers // 8) * 8)))
            local = f"{k.stack} + {k.mix['local']}" if k.stack or k.mix["local"] else "-"
            mix = ", ".join(f"{label} {count}" for label, count in k.mix.items() if count and label != "local")
            lines.append(f"| `{k.name}` | {k.registers} | {warps} | {k.shared} | {local} | {k.instructions} | {mix} |")
    return "\n".join(lines) + "\n"


def listed(text):
    """(architecture, kernel) pairs of a page."""
    pairs, architecture = set(), None
    for line in text.splitlines():
        if match := re.match(r"## (sm_\w+)", line):
            architecture = match.group(1)
        elif architecture and (match := re.match(r"\| `([^`]+)` \|", line)):
            pairs.add((architecture, match.group(1)))
    return pairs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=pathlib.Path)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true")
    what.add_argument("--check", action="store_true")
    args = parser.parse_args()
    kernels = collect(args.build.resolve())
    text = page(kernels, compiler_of(args.build.resolve()))
    if args.write:
        PAGE.write_text(text)
    elif not args.check:
        sys.stdout.write(text)
    found = offences(kernels)
    if args.check:
        in_page, in_build = listed(PAGE.read_text() if PAGE.is_file() else ""), listed(text)
        found += [f"docs/kernels.md lists {name} ({architecture}), which the build does not have" for architecture, name in sorted(in_page - in_build)]
        found += [f"docs/kernels.md lacks {name} ({architecture}): run kernel_table.py --write" for architecture, name in sorted(in_build - in_page)]
    for offence in found:
        print(offence, file=sys.stderr)
    print(f"{sum(len(own) for own in kernels.values())} kernels for {' and '.join(sorted(kernels))}, {len(found)} offences", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
