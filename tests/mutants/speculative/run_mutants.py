#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Applies each deliberate bug to a copy of one source file and requires the named test to fail.

A mutant is (name, file, old line part, new line part, test program, gtest filter). The old text must occur exactly once, so that a
mutant cannot go stale unnoticed. First every test must pass against the unchanged files built in the same way.
"""
import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys

VERIFY = "engine/speculative/verify.cc"
SAMPLING = "kernels/sampling/sampling_cpu.cc"
KERNELS = "kernels/sampling/sampling_kernels.inc"
ENUMERATION = ("verify_enumeration_test", "*")
BY_HAND = ("verify_test", "*")
DECODE = ("speculative_decode_test", "*")
UNITS = ("sampling_test", "*")

MUTANTS = [
    ("ratio with q = 1 but residual max(p - q, 0)", VERIFY,
     "if (!synthetic && draws.Uniform(i, DrawPurpose::kAccept, 0) * draft_prob < target_prob)",
     "if (!synthetic && draws.Uniform(i, DrawPurpose::kAccept, 0) + 0 * draft_prob < target_prob)", ENUMERATION),
    ("argmax draft with soft q", VERIFY, "if (greedy || mode == SpeculationMode::kTargetOnly) return draft.argmax;",
     "if (greedy || mode != SpeculationMode::kCoupled) return draft.argmax;", ENUMERATION),
    ("corrected token from p instead of the residual", VERIFY, "cpu::SampleResidual(target, *draft, u_block,",
     "cpu::SampleInverseCdf(target, u_block,", ENUMERATION),
    ("residual not renormalised over blocks", SAMPLING, "PickBlock(num_blocks, total, u_block, &block_mass, block_residual)",
     "PickBlock(num_blocks, 1.0, u_block, &block_mass, block_residual)", ENUMERATION),
    ("residual not renormalised within a block", SAMPLING,
     "BlockCount(vocab_size, block), block_mass, u_within, [&](uint32_t id) {\n    return static_cast<double>(target.weight[id]) * target",
     "BlockCount(vocab_size, block), 1.0, u_within, [&](uint32_t id) {\n    return static_cast<double>(target.weight[id]) * target",
     ENUMERATION),
    ("bonus from the draft distribution", VERIFY, "const TokenDistribution& target = args.target[offset];",
     "const TokenDistribution& target = offset > 0 && offset == static_cast<int32_t>(args.draft.size()) ? args.draft[offset - 1] "
     ": args.target[offset];", ENUMERATION),
    ("bonus from the row before", VERIFY, "emit(SampleTarget(args, num_drafts, plain",
     "emit(SampleTarget(args, plain ? 0 : num_drafts - 1, plain", ENUMERATION),
    ("accept always", VERIFY, "* draft_prob < target_prob) return", "* draft_prob < target_prob + 2.0) return", ENUMERATION),
    ("accept with <= where p = 0", VERIFY, "* draft_prob < target_prob) return", "* draft_prob < target_prob + 1e-9) return", ENUMERATION),
    ("accept draw reused for the residual", VERIFY, "cpu::SampleResidual(target, *draft, u_block, draws.Uniform(i, DrawPurpose::kResidual, 1))",
     "cpu::SampleResidual(target, *draft, u_block, draws.Uniform(i, DrawPurpose::kAccept, 0))", ENUMERATION),
    ("accept draw shared by all places", VERIFY,
     "if (!synthetic && draws.Uniform(i, DrawPurpose::kAccept, 0) * draft_prob", "if (!synthetic && draws.Uniform(0, DrawPurpose::kAccept, 0) * draft_prob",
     ENUMERATION),
    ("draft draw shared with the accept draw", VERIFY, "SampleToken(draft, offset, DrawPurpose::kDraft, draws)",
     "SampleToken(draft, offset, DrawPurpose::kAccept, draws)", BY_HAND),
    ("block and id from one uniform", VERIFY, "return cpu::SampleInverseCdf(distribution, u_block, draws.Uniform(offset, purpose, 1));",
     "return cpu::SampleInverseCdf(distribution, u_block, u_block);", ENUMERATION),
    ("target row of the next place", VERIFY, "const TokenDistribution& target = args.target[i];",
     "const TokenDistribution& target = args.target[i + 1];", ENUMERATION),
    ("draft row of the first place", VERIFY, "? nullptr : &args.draft[i];", "? nullptr : &args.draft[0];", ENUMERATION),
    ("target-only correction keeps the draft", VERIFY, "cpu::SampleExcluding(target, drafted, u_block,",
     "cpu::SampleInverseCdf(target, u_block,", ENUMERATION),
    ("exclusion forgets the block's sum", SAMPLING, "return block == excluded_block ? rest_of_block : target.block_sum[block];",
     "return block == excluded_block ? target.block_sum[block] : target.block_sum[block];", ENUMERATION),
    ("residual scales q by p's total", SAMPLING, "draft_scale = 1.0 / draft.total;\n  const auto block_residual",
     "draft_scale = 1.0 / target.total;\n  const auto block_residual", ENUMERATION),
    ("row normalised before truncation", SAMPLING, "TruncateTopP(args.top_p, args.min_p, args.scratch, out);\n    out->total = SumBlocks(*out);",
     "TruncateTopP(args.top_p, args.min_p, args.scratch, out);", ENUMERATION),
    ("top-p drops the id that crosses", SAMPLING, "const float floor = std::max(border, min_p);", "const float floor = std::max(above, min_p);",
     ENUMERATION),
    ("ties at the k-th value dropped", SAMPLING, "logit_floor = KthLargest(logits, vocab_size, args.top_k, max, out->block_sum, args.scratch);",
     "logit_floor = std::nextafter(KthLargest(logits, vocab_size, args.top_k, max, out->block_sum, args.scratch), kInfinity);", UNITS),
    ("min-p off by a factor", SAMPLING, "const float weight_floor = truncate_p ? 0.0f : args.min_p;",
     "const float weight_floor = truncate_p ? 0.0f : 0.5f * args.min_p;", ENUMERATION),
    ("coupled draft and target with different noise", VERIFY, "return cpu::SampleGumbel(draft, draws.GumbelKey(offset));",
     "return cpu::SampleGumbel(draft, draws.GumbelKey(offset + 1));", BY_HAND),
    ("coupled mode emits its draft on disagreement", VERIFY, "return {!synthetic && chosen == drafted, chosen};",
     "return {!synthetic && chosen == drafted, drafted};", DECODE),
    ("coupled mode plain without drafts", VERIFY, "if (args.mode == SpeculationMode::kCoupled) return",
     "if (args.mode == SpeculationMode::kCoupled && !args.drafts.empty()) return", BY_HAND),
    ("Gumbel search prunes a possible winner", SAMPLING, "best * 0x1.0p31 * 1.00001", "best * 0x1.0p30 * 1.00001", UNITS),
    ("greedy takes the last of equal maxima", SAMPLING, "if (result.max > max) {\n      max = result.max;\n      max_block = block;\n    }\n  }\n  if (unusable",
     "if (result.max >= max) {\n      max = result.max;\n      max_block = block;\n    }\n  }\n  if (unusable", UNITS),
    ("broken draft row used", VERIFY, "if (draft != nullptr && !draft->finite) return", "if (draft != nullptr && false) return", BY_HAND),
    ("broken target row used", VERIFY, "if (!args.target[i].finite) {", "if (!args.target[0].finite) {", BY_HAND),
    ("ban applied after the maximum", SAMPLING, "      out->weight[id] = -kInfinity;", "      out->weight[id] = -1e4f;", UNITS),
    ("half of the lanes missing in block sums", KERNELS, "  sums->part[2 * part + 1] += high;\n", "", UNITS),
    ("residual without its clamp", KERNELS, "+= excess > 0.0 ? excess : Doubles{};", "+= excess;", UNITS),
]


def run(command, **options):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


class Harness:
    def __init__(self, arguments):
        self.arguments = arguments
        self.objects = [path for path in re.split("[,;]", arguments.objects) if path]
        self.libraries = arguments.libraries.split(",")
        self.tests = dict(item.split("=", 1) for item in arguments.test)
        self.flags = dict(item.split("=", 1) for item in arguments.flags)

    def build(self, folder, file):
        """Compiles `file` as it stands in `folder` and links it with the other objects; returns the library."""
        sources = [file]
        if file == KERNELS:
            names = {os.path.basename(path) for path in self.objects}
            sources = [f"kernels/sampling/{name[:-2]}" for name in sorted(names) if name.startswith("sampling_kernels_")]
        replaced = {}
        for source in sources:
            path = folder / source
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(pathlib.Path(self.arguments.source) / source, path)
            name = os.path.basename(source)
            replaced[name + ".o"] = folder / (name + ".o")
            result = run([self.arguments.compiler, "-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-w", "-D_GLIBCXX_ASSERTIONS",
                          *self.flags.get(name, "").split(), f"-I{folder}", f"-I{self.arguments.source}", "-c", str(path), "-o",
                          str(replaced[name + ".o"])])
            if result.returncode != 0:
                raise RuntimeError(f"does not compile:\n{result.stdout}")
        library = folder / "libmutation_subject.so"
        objects = [str(replaced.get(os.path.basename(path), path)) for path in self.objects]
        result = run([self.arguments.compiler, "-shared", "-o", str(library), *objects, *self.libraries, "-lpthread"])
        if result.returncode != 0:
            raise RuntimeError(f"does not link:\n{result.stdout}")
        return library

    def passes(self, library, test, test_filter):
        environment = dict(os.environ, LD_PRELOAD=str(library))
        try:
            result = run([self.tests[test], "--gtest_brief=1", f"--gtest_filter={test_filter}", "--gtest_fail_fast"], env=environment,
                         timeout=120)
        except subprocess.TimeoutExpired:
            return False, "timed out"
        lines = [line for line in result.stdout.splitlines() if "FAILED" in line or "Failure" in line]
        return result.returncode == 0, lines[0] if lines else f"exit status {result.returncode}"

    def try_mutant(self, index):
        name, file, old, new, (test, test_filter) = MUTANTS[index]
        folder = pathlib.Path(self.arguments.work) / f"mutant_{index:02d}"
        source = (pathlib.Path(self.arguments.source) / file).read_text()
        if source.count(old) != 1:
            return False, f"{name}: the text to replace occurs {source.count(old)} times in {file}"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(source.replace(old, new))
        try:
            passed, detail = self.passes(self.build(folder, file), test, test_filter)
        except RuntimeError as error:
            return False, f"{name}: {error}"
        if passed:
            return False, f"{name}: SURVIVED {test}"
        return True, f"{name}: caught by {test} ({detail})"

    def try_unchanged(self, file):
        folder = pathlib.Path(self.arguments.work) / ("unchanged_" + os.path.basename(file))
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pathlib.Path(self.arguments.source) / file, folder / file)
        try:
            library = self.build(folder, file)
        except RuntimeError as error:
            return False, f"unchanged {file}: {error}"
        for test in self.tests:
            passed, detail = self.passes(library, test, "*")
            if not passed:
                return False, f"unchanged {file}: {test} fails ({detail})"
        return True, f"unchanged {file}: all tests pass"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiler", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--objects", required=True)
    parser.add_argument("--libraries", required=True)
    parser.add_argument("--test", action="append", default=[])
    parser.add_argument("--flags", action="append", default=[])
    arguments = parser.parse_args()
    shutil.rmtree(arguments.work, ignore_errors=True)
    harness = Harness(arguments)
    failures = 0
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        jobs = [pool.submit(harness.try_unchanged, file) for file in (VERIFY, SAMPLING, KERNELS)]
        jobs += [pool.submit(harness.try_mutant, index) for index in range(len(MUTANTS))]
        for job in jobs:
            good, message = job.result()
            print(("ok    " if good else "FAIL  ") + message, flush=True)
            failures += not good
    shutil.rmtree(arguments.work, ignore_errors=True)
    print(f"{len(MUTANTS)} mutants, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
