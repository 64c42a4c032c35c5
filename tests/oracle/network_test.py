# SPDX-License-Identifier: Apache-2.0
"""The real Model against transformers (tests/golden/network_oracle.py), end to end from a checkpoint on disk.

For every configuration it writes a checkpoint to a temporary directory, runs tests/oracle/forward_dump on it and judges:

  float32   max |difference of log p| over all positions and the whole vocabulary <= 2e-4 against float64 transformers, for
            prefill in one ragged pass, chunked prefill, decode, verify windows, and teacher-forced MTP depths 1 .. 5.
  bfloat16  mean KL(reference || ours) <= 1.5 x that of transformers' own bfloat16 run, for the same four target modes, and for
            MTP depth 1 against the same wiring of transformers' layer in bfloat16.
  wiring    MTP fed with hidden states from before the final norm must differ from the right wiring, in the reference and in ours.

Exit status: 0 passed, 1 failed, 77 skipped (torch or transformers is missing).
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "golden"))
try:
    import numpy as np

    import network_oracle
except ImportError as error:
    print(f"SKIPPED: {error}")
    sys.exit(77)

FLOAT32_TOLERANCE = 2e-4
BF16_KL_RATIO = 1.5
# Far above the tolerance, far below what a wrong wiring gives (2 or more in every configuration).
PRENORM_DIFFERENCE = 0.05
TARGET_MODES = ("prefill", "chunked", "decode", "verify")


def log_softmax(logits):
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def mean_kl(reference, other):
    return float((np.exp(reference) * (reference - other)).sum(-1).mean())


def dump(program, dtype, checkpoint, tokens_file, out):
    out.mkdir()
    subprocess.run(
        [program, checkpoint, dtype, tokens_file, out, str(network_oracle.MAX_CHAIN_LENGTH)], check=True, timeout=120
    )


class Judge:
    def __init__(self):
        self.failures = []

    def expect(self, good, message):
        if not good:
            self.failures.append(message)
            print(f"FAILED: {message}")


def check(spec, program, directory, judge):
    reference = network_oracle.build(spec, directory / "checkpoint")
    tokens_file = directory / "tokens.txt"
    tokens_file.write_text("".join(" ".join(map(str, tokens)) + "\n" for tokens in reference.tokens))
    target = np.concatenate(reference.target)
    target_bf16 = np.concatenate(reference.target_bf16)

    def read(dtype, mode, expected):
        values = np.fromfile(directory / dtype / mode, dtype=np.float32)
        judge.expect(values.size == expected.size, f"{spec.name} {dtype} {mode}: {values.size} values, not {expected.size}")
        return log_softmax(values.reshape(expected.shape)) if values.size == expected.size else np.full(expected.shape, np.nan)

    def largest(actual, expected):
        return float(np.abs(actual - expected).max())

    dump(program, "float32", directory / "checkpoint", tokens_file, directory / "float32")
    columns = []
    for mode in TARGET_MODES:
        delta = largest(read("float32", mode, target), target)
        columns.append(f"{mode} {delta:.1e}")
        judge.expect(delta <= FLOAT32_TOLERANCE, f"{spec.name} float32 {mode}: max |dlogp| {delta:.3e} > {FLOAT32_TOLERANCE}")
    if spec.mtp:
        for depth in range(network_oracle.MAX_DEPTH):
            expected = np.concatenate([depths[depth] for depths in reference.mtp if len(depths) > depth])
            delta = largest(read("float32", f"mtp.{depth + 1}", expected), expected)
            columns.append(f"mtp{depth + 1} {delta:.1e}")
            judge.expect(delta <= FLOAT32_TOLERANCE, f"{spec.name} float32 MTP depth {depth + 1}: max |dlogp| {delta:.3e}")
        first = np.concatenate([depths[0] for depths in reference.mtp if depths])
        wrong = np.concatenate(reference.mtp_prenorm)
        actual = read("float32", "mtp.1", first)
        actual_wrong = read("float32", "mtp_prenorm", wrong)
        delta = largest(actual, wrong)
        columns.append(f"prenorm {delta:.2f}")
        judge.expect(delta >= PRENORM_DIFFERENCE, f"{spec.name}: the MTP layer seems to be fed pre-norm states ({delta:.3e})")
        judge.expect(largest(actual_wrong, first) >= PRENORM_DIFFERENCE, f"{spec.name}: the test cannot see pre-norm wiring")
        delta = largest(actual_wrong, wrong)
        judge.expect(delta <= FLOAT32_TOLERANCE, f"{spec.name}: pre-norm, too, must agree with its reference ({delta:.3e})")
    print(f"{spec.name:12s} float32  max |dlogp|: " + ", ".join(columns))

    dump(program, "bfloat16", directory / "checkpoint", tokens_file, directory / "bfloat16")
    yardstick = mean_kl(target, target_bf16)
    columns = [f"transformers {yardstick:.2e}"]
    for mode in TARGET_MODES:
        kl = mean_kl(target, read("bfloat16", mode, target))
        columns.append(f"{mode} {kl:.2e} ({kl / yardstick:.2f}x)")
        judge.expect(
            kl <= BF16_KL_RATIO * yardstick, f"{spec.name} bfloat16 {mode}: mean KL {kl:.3e} > {BF16_KL_RATIO} x {yardstick:.3e}"
        )
    if spec.mtp:
        yardstick = mean_kl(first, np.concatenate(reference.mtp_bf16))
        kl = mean_kl(first, read("bfloat16", "mtp.1", first))
        columns.append(f"mtp1 {kl:.2e} ({kl / yardstick:.2f}x of {yardstick:.2e})")
        judge.expect(
            kl <= BF16_KL_RATIO * yardstick, f"{spec.name} bfloat16 MTP: mean KL {kl:.3e} > {BF16_KL_RATIO} x {yardstick:.3e}"
        )
    print(f"{spec.name:12s} bfloat16 mean KL: " + ", ".join(columns), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=pathlib.Path, required=True, help="the forward_dump program")
    parser.add_argument("--only", nargs="*", help="names of configurations (default: all)")
    arguments = parser.parse_args()
    judge = Judge()
    names = [spec.name for spec in network_oracle.SPECS]
    for name in arguments.only or []:
        judge.expect(name in names, f"no configuration {name}")
    for spec in network_oracle.SPECS:
        if arguments.only and spec.name not in arguments.only:
            continue
        with tempfile.TemporaryDirectory(prefix="bebop_network") as directory:
            check(spec, arguments.program, pathlib.Path(directory), judge)
    print("passed" if not judge.failures else f"{len(judge.failures)} checks failed")
    return 1 if judge.failures else 0


if __name__ == "__main__":
    sys.exit(main())
