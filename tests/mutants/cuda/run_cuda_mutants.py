#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Applies each deliberate bug to a copy of one kernel file and requires the operator's test to fail on the emulated device.

A mutant is caught by a failed expectation or by one of the emulator's checks (tests/support/cuda_emulation/README.md). Its old
text must occur exactly once, so that a mutant cannot go stale unnoticed. Before the mutants of a file, the unchanged copy of it
must pass the same tests, built and run in the same way.

Commands to compile and link are those of the build tree, as Ninja prints them; the mutated object stands before the archives, so
that the linker does not take the archive's member. (A shared library to preload, as in tests/mutants/speculative, would not do:
the emulator knows the shared memory of the program's own image alone.)
"""
import argparse
import collections
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

# `source` is the .cu file that is built: `file` itself unless that is a header.
Mutant = collections.namedtuple("Mutant", "name file old new test filter source", defaults=[None])

SPLIT = "kernels/attention/attention_cuda_split.cu"
PREFILL = "kernels/attention/attention_cuda_prefill.cu"
MERGE = "kernels/attention/attention_cuda.cu"
TILES = "kernels/attention/attention_cuda.cuh"
DELTA = "kernels/delta_rule/delta_rule_cuda.cu"
CHUNKS = "kernels/delta_rule/delta_rule_chunks_cuda.cu"
CONV = "kernels/causal_conv/causal_conv_cuda.cu"
LINEAR = "kernels/linear/linear_cuda.cu"
ROPE = "kernels/qk_norm_rope/qk_norm_rope_cuda.cu"
NORM = "kernels/rms_norm/rms_norm_cuda.cu"
EMBEDDING = "kernels/embedding/embedding_cuda.cu"
SWIGLU = "kernels/swiglu/swiglu_cuda.cu"
TRANSFORM = "kernels/decode/transform_cuda.cu"
VERIFY = "kernels/decode/verify_cuda.cu"
ADVANCE = "kernels/decode/advance_cuda.cu"
SAMPLING = "kernels/decode/decode_device.cuh"

SPLIT_AGREES = ("attention_cuda_test", "*.SplitKernelAgreesWithCpu")
STEPS = ("delta_rule_cuda_test", "*.StepsAgreeWithDouble")
FORKS = ("lazy_commit_cuda_test", "*ForksLeaveTheParentAlone/0")
CONV_AGREES = ("causal_conv_cuda_test", "*.AgreesWithTheCpu")
LINEAR_EXACT = ("linear_cuda_test", "*.SumsOfIntegersAreExact")
ROPE_AGREES = ("qk_norm_rope_cuda_test", "*.AgreesWithTheCpuAtAnyPosition")
LOOP = ("step_loop_cuda_test", "*.AllModesOverManySizes")
MODES = ("step_loop_cuda_test", "*.EachModeAlone")

MUTANTS = {
    "attention": [
        Mutant("keys used before their copy has arrived", SPLIT,
               "WaitPending(plan.num_slots - 2);\n    __syncthreads();\n    fill(2 * t + plan.num_slots - 1);",
               "WaitPending(plan.num_slots - 1);\n    __syncthreads();\n    fill(2 * t + plan.num_slots - 1);", *SPLIT_AGREES),
        Mutant("no barrier between maxima and weights", SPLIT, "    __syncthreads();\n\n    // Weights.", "\n    // Weights.",
               *SPLIT_AGREES),
        Mutant("a row sees the position behind it", SPLIT, "position > limit ||", "position > limit + 1 ||", *SPLIT_AGREES),
        Mutant("page of the entries behind", TILES, "params.page_ids[first_page + (position >> params.page_shift)]",
               "params.page_ids[first_page + ((position + kRowsPerThread) >> params.page_shift)]", *SPLIT_AGREES, SPLIT),
        Mutant("prompt rows do not see themselves", PREFILL, "position > limit[e / 2] ||", "position >= limit[e / 2] ||",
               "attention_cuda_test", "*.PrefillKernelAgreesWithCpu"),
        Mutant("splits merged twice", MERGE, "for (int32_t s = group; group < num_groups",
               "for (int32_t s = group / 2; group < num_groups", "attention_cuda_test", "*.ManySplitsAgreeWithCpu"),
        Mutant("merge of a split that nobody wrote", MERGE, "limit / (plan.tiles_per_split * kKeyTile) + 1",
               "(limit + 1) / (plan.tiles_per_split * kKeyTile) + 1", *SPLIT_AGREES),
        Mutant("padded row gets an output", MERGE, "if (params.row_sequence[row] < 0) return;\n  const int32_t limit",
               "const int32_t limit", *SPLIT_AGREES),
    ],
    "delta_rule": [
        Mutant("replay from the next row of the window", DELTA,
               "static_cast<int64_t>(sequence_.state_src) * state.window + token;",
               "static_cast<int64_t>(sequence_.state_src) * state.window + token + 1;", *STEPS),
        Mutant("window written to the slot it was read from", DELTA,
               "kept = static_cast<int64_t>(sequence.state_dst) * state.window + draft;",
               "kept = static_cast<int64_t>(sequence.state_src) * state.window + draft;", *STEPS),
        Mutant("state stored before the last known row", DELTA, "Run{0, all, committed, sequence.state_src}",
               "Run{0, all, committed - 1, sequence.state_src}", *FORKS),
        Mutant("no wait for the rows of a tile", DELTA, "    if constexpr (kExact) gpu::CpAsyncWait<0>();\n", "", *STEPS),
        Mutant("no barrier between norms and steps", DELTA, "Convert(count);\n      __syncthreads();", "Convert(count);", *STEPS),
        Mutant("a row of a chunk does not see itself", CHUNKS, "j <= i ? scale * DecayBetween(i, j)",
               "j < i ? scale * DecayBetween(i, j)", "delta_rule_cuda_test", "*.ChunksOfAlikeKeys"),
    ],
    "causal_conv": [
        Mutant("history without the replayed rows", CONV,
               "(sequence.state_src * slot_rows + sequence.num_replay_rows) * num_channels",
               "sequence.state_src * slot_rows * num_channels", *CONV_AGREES),
        Mutant("history stored one row early", CONV, "? 0 : sequence.num_known_rows - past; i < sequence.num_known_rows; ++i)",
               "? 0 : sequence.num_known_rows - past; i < sequence.num_known_rows - 1; ++i)", *CONV_AGREES),
        Mutant("history written to the slot it was read from", CONV, "inputs + sequence.state_dst * slot_rows * num_channels",
               "inputs + sequence.state_src * slot_rows * num_channels", *CONV_AGREES),
        Mutant("first row beyond the head left out", CONV, "- args.batch.sequences[sequence].first_row < kHeadRows",
               "- args.batch.sequences[sequence].first_row <= kHeadRows", *CONV_AGREES),
    ],
    "linear": [
        Mutant("counter of a tile left as it is", LINEAR, "    if (is_last) args.counters[tile] = 0;  // for the next launch\n",
               "", *LINEAR_EXACT),
        Mutant("runs summed from the last to the first", LINEAR,
               "float total = partial[0];\n"
               "#pragma unroll 4\n"
               "    for (int s = 1; s < args.num_splits; ++s) total += partial[s * plane];",
               "float total = 0.0f;\n    for (int s = args.num_splits - 1; s >= 0; --s) total += partial[s * plane];",
               "linear_cuda_test", "*.ARowDoesNotDependOnItsBatch"),
        Mutant("rows beyond x are read", LINEAR, "col_valid && first_token + token < args.num_tokens);", "col_valid);",
               *LINEAR_EXACT),
        Mutant("stage used before its copies have arrived", LINEAR, "gpu::CpAsyncWait<kStages - 2>();",
               "gpu::CpAsyncWait<kStages - 1>();", *LINEAR_EXACT),
        Mutant("sums handed over without a barrier", LINEAR, "  __syncthreads();\n  const bool is_split", "  const bool is_split",
               *LINEAR_EXACT),
    ],
    "dense": [
        Mutant("padded row writes to a page", ROPE, "  if (sequence < 0) return;  // padding\n", "", *ROPE_AGREES),
        Mutant("pairs meet without a barrier", ROPE, "  __syncthreads();\n  if (!active) return;", "  if (!active) return;",
               *ROPE_AGREES),
        Mutant("the last warp's squares are missing", NORM, "thread % kWarp < num_threads / kWarp ?",
               "thread % kWarp < (num_threads - 1) / kWarp ?", "rms_norm_cuda_test", "RmsNormCudaTest.AgreesWithTheCpu"),
        Mutant("first id beyond the table is read", EMBEDDING, "if (token < args.table.rows)", "if (token <= args.table.rows)",
               "embedding_cuda_test", "*"),
        Mutant("threads beyond the row store", SWIGLU, "if (col >= args.gate.cols) return;", "if (col > args.gate.cols) return;",
               "swiglu_cuda_test", "*.AgreesWithTheCpu"),
    ],
    "decode": [
        Mutant("the last of equal logits is argmax", TRANSFORM, "other == best && other_id < best_id)",
               "other == best && other_id > best_id)", "transform_cuda_test", "*.ArgmaxComesFirstAmongEqualWeights"),
        Mutant("sums of a block halved in another order", SAMPLING, "for (int32_t half = 8; half > 0; half /= 2)",
               "for (int32_t half = 1; half < 16; half *= 2)", "transform_cuda_test", "*.EveryTruncationAlone", TRANSFORM),
        Mutant("accepted with the target's probability, not the ratio", VERIFY,
               "__dmul_rn(Uniform53(key, DrawPurpose::kAccept, 0), draft_prob) < target_prob",
               "Uniform53(key, DrawPurpose::kAccept, 0) < target_prob", *MODES),
        Mutant("accept draw of the first place for all", VERIFY,
               "const RandomKey key = KeyAt(request, FirstPosition(params, sequence) + place);\n  const bool synthetic",
               "const RandomKey key = KeyAt(request, FirstPosition(params, sequence));\n  const bool synthetic", *MODES),
        Mutant("all samples of a request draw alike", SAMPLING, "return {request.seed, request.sample_index,",
               "return {request.seed, 0u,", *MODES, VERIFY),
        Mutant("noise of the neighbouring id", SAMPLING, "NoiseWords(key, static_cast<uint32_t>(group) / 4 + lane)",
               "NoiseWords(key, static_cast<uint32_t>(group) / 4 + (lane ^ 1))", *MODES, VERIFY),
        Mutant("decision before all places are judged", VERIFY,
               "JudgePlace(params, sequence, request, thread);\n  __syncthreads();",
               "JudgePlace(params, sequence, request, thread);", *MODES),
        Mutant("last stop id ignored", ADVANCE, "j < request.num_stop_ids;", "j < request.num_stop_ids - 1;", *LOOP),
        Mutant("one draft too many before the end", ADVANCE, "request.max_new_tokens - state.num_output - 2",
               "request.max_new_tokens - state.num_output - 1", *MODES),
        Mutant("the token itself counted among the rows to replay", ADVANCE, "state.num_replay = record.num_accepted;",
               "state.num_replay = record.num_emitted;", *MODES),
        Mutant("next pass reads the slot before last", ADVANCE, "  state.state_src = state.state_dst;\n", "", *MODES),
        Mutant("padded row belongs to its sequence", ADVANCE, "pass.row_sequence[row] = valid ? sequence_idx : -1;",
               "pass.row_sequence[row] = sequence_idx;", *MODES),
    ],
}

TIMEOUT_S = 240


def run(command, folder, **options):
    return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                          **options)


class Harness:
    def __init__(self, arguments):
        self.source = pathlib.Path(arguments.source)
        self.build = pathlib.Path(arguments.build)
        self.work = pathlib.Path(arguments.work)
        self.ninja = arguments.ninja
        self.commands = {}

    def commands_of(self, test):
        """The commands that make a test program, in words; the last one links it."""
        if test not in self.commands:
            result = run([self.ninja, "-t", "commands", f"tests/{test}"], self.build, check=True)
            self.commands[test] = [shlex.split(line) for line in result.stdout.splitlines() if line.strip()]
        return self.commands[test]

    def make(self, folder, file, text, source, test):
        """Builds the test with `text` in place of `file`, of which `source` is built. Returns the program."""
        copy = folder / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
        if source != file:
            shutil.copy(self.source / source, folder / source)
        compilations = [list(c) for c in self.commands_of(test) if c[-2:] == ["-c", str(self.source / source)]]
        if len(compilations) != 1:
            raise RuntimeError(f"the build compiles {source} {len(compilations)} times")
        compile_command = compilations[0]
        built = folder / "mutated.o"
        compile_command[-1] = str(folder / source)
        compile_command[compile_command.index("-o") + 1] = str(built)
        compile_command[compile_command.index("-MF") + 1] = str(built) + ".d"
        # The folder's headers come first. Less optimisation and no debug information: most of the time goes to the compiler.
        compile_command[compile_command.index("-c"):compile_command.index("-c")] = ["-O1", "-g0", "-w"]
        first_include = next(i for i, word in enumerate(compile_command) if word.startswith("-I"))
        compile_command.insert(first_include, f"-I{folder}")
        result = run(compile_command, self.build)
        if result.returncode != 0:
            raise RuntimeError(f"does not compile:\n{result.stdout}")

        link_command = [word for word in self.commands_of(test)[-1] if word not in (":", "&&")]
        program = folder / test
        link_command[link_command.index("-o") + 1] = str(program)
        first_archive = next(i for i, word in enumerate(link_command) if word.endswith(".a"))
        link_command.insert(first_archive, str(built))
        result = run(link_command, self.build)
        if result.returncode != 0:
            raise RuntimeError(f"does not link:\n{result.stdout}")
        return program

    def outcome(self, program, test_filter):
        """passed, or why not; None if neither can be told."""
        try:
            result = run([str(program), "--gtest_fail_fast", f"--gtest_filter={test_filter}"], self.source, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return None, f"no end within {TIMEOUT_S} s"
        if result.returncode == 0:
            ran = re.search(r"\[  PASSED  \] (\d+) test", result.stdout)
            if ran is None or ran[1] == "0" or "SKIPPED" in result.stdout:
                return None, "no test ran"
            return True, "passed"
        found = re.search(r"^CUDA emulation: .*$|^bebop: CHECK failed.*$|^\S+: Failure$|^\[  FAILED  \] \S+", result.stdout,
                          re.MULTILINE)
        if found is None:
            return None, f"exit status {result.returncode}:\n{result.stdout[-2000:]}"
        return False, found[0].replace(f"{self.source}/", "")[:160]

    def try_control(self, file, source, cases):
        """`cases`: the (test, filter) of the file's mutants."""
        text = (self.source / file).read_text()
        for test, test_filter in cases:
            try:
                passed, detail = self.outcome(self.make(self.work / "unchanged", file, text, source, test), test_filter)
            except RuntimeError as error:
                passed, detail = False, str(error)
            finally:
                shutil.rmtree(self.work / "unchanged", ignore_errors=True)
            if not passed:
                return False, f"unchanged {file}: {test} {test_filter}: {detail}"
        return True, f"unchanged {file}: passes"

    def try_mutant(self, mutant):
        text = (self.source / mutant.file).read_text()
        if text.count(mutant.old) != 1:
            return False, f"{mutant.name}: the text to replace occurs {text.count(mutant.old)} times in {mutant.file}"
        folder = self.work / "mutant"
        try:
            text = text.replace(mutant.old, mutant.new)
            program = self.make(folder, mutant.file, text, mutant.source or mutant.file, mutant.test)
            passed, detail = self.outcome(program, mutant.filter)
        except RuntimeError as error:
            return False, f"{mutant.name}: {error}"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if passed is None:
            return False, f"{mutant.name}: {detail}"
        if passed:
            return False, f"{mutant.name}: SURVIVED {mutant.test} {mutant.filter}"
        return True, f"{mutant.name}: caught ({detail})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operator", choices=MUTANTS)
    parser.add_argument("--source", required=True, help="the root of the repository")
    parser.add_argument("--build", required=True, help="a build tree with BEBOP_EMULATE_CUDA, by Ninja, with the tests built")
    parser.add_argument("--work", required=True, help="a folder that may be deleted")
    parser.add_argument("--ninja", default="ninja")
    parser.add_argument("--only", default="", help="mutants whose name contains this, without the unchanged files")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.work, ignore_errors=True)
    harness = Harness(arguments)
    mutants = [mutant for mutant in MUTANTS[arguments.operator] if arguments.only in mutant.name]
    controls = collections.defaultdict(dict)
    for mutant in mutants:
        source = mutant.source or mutant.file
        filters = controls[source].setdefault(mutant.test, [])
        if mutant.filter not in filters:
            filters.append(mutant.filter)
    failures = 0

    def report(good, message):
        nonlocal failures
        failures += not good
        print(("ok    " if good else "FAIL  ") + message, flush=True)

    if not arguments.only:
        for source, tests in controls.items():
            report(*harness.try_control(source, source, [(test, ":".join(filters)) for test, filters in tests.items()]))
    for mutant in mutants:
        report(*harness.try_mutant(mutant))
    shutil.rmtree(arguments.work, ignore_errors=True)
    print(f"{len(mutants)} mutants, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
