# SPDX-License-Identifier: Apache-2.0
"""Runs the bundled model's tasks through a running bebop-server by the `bebop` command line and prints one comparison table.

Standard library only. Every number comes from the server's replies: accept length and acceptance per position are its counts of real
decoding (accepted / drafted), entropy is the mean over emitted tokens, solved % is the tasks' own exact checkers.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "models"))
import tasks  # noqa: E402  (the bundled model's task generators and checkers)

MODES = ["OFF", "TARGET_ONLY", "COUPLED", "REJECTION"]
TASKS = ["math", "code", "tools"]
NUM_DRAFT_TOKENS = 3


def bebop(args, verb, lines):
    """Runs one verb over JSON lines; returns the parsed reply lines. Exits with the tool's own message when it fails."""
    command = [args.bebop, "--server", args.server, "--json", verb, "--requests", "-"]
    reply = subprocess.run(command, input="\n".join(json.dumps(line) for line in lines) + "\n", text=True, capture_output=True)
    if reply.returncode != 0:
        sys.exit(f"error: {' '.join(command)} exited with {reply.returncode}\n{reply.stderr}{reply.stdout[:2000]}")
    return [json.loads(line) for line in reply.stdout.splitlines()]


def run_cell(args, prompts, prompt_ids, mode, max_new_tokens):
    """One task in one mode: a dict of the table's numbers."""
    requests = [
        {
            "prompt_token_ids": ids,
            "num_samples": args.samples,
            "sampling": {"temperature": 1.0, "seed": str(1000 + i)},
            "stopping": {"max_new_tokens": max_new_tokens},
            "output": {"entropy": True},
            "speculation": {"mode": mode, "num_draft_tokens": 0 if mode == "OFF" else NUM_DRAFT_TOKENS},
        }
        for i, ids in enumerate(prompt_ids)
    ]
    start = time.monotonic()
    results = bebop(args, "generate", requests)
    seconds = time.monotonic() - start
    samples = [(prompt, sample) for prompt, result in zip(prompts, results) for sample in result["samples"]]
    tokens = sum(len(sample["token_ids"]) for _, sample in samples)
    entropy = sum(sum(sample["entropy"]) for _, sample in samples)
    texts = bebop(args, "detokenize", [{"token_ids": sample["token_ids"], "skip_special": False} for _, sample in samples])
    solved = sum(tasks.check(prompt["task"], prompt["meta"], text["text"]) for (prompt, _), text in zip(samples, texts))
    accepted = [0] * NUM_DRAFT_TOKENS
    drafted = [0] * NUM_DRAFT_TOKENS
    steps = 0
    for _, sample in samples:
        steps += sample["spec"]["num_spec_steps"]
        for i, count in enumerate(sample["spec"]["accepted_per_pos"][:NUM_DRAFT_TOKENS]):
            accepted[i] += count
        for i, count in enumerate(sample["spec"]["drafted_per_pos"][:NUM_DRAFT_TOKENS]):
            drafted[i] += count
    return {
        "samples_per_second": len(samples) / seconds,
        "tokens_per_second": tokens / seconds,
        "accept_length": 1 + sum(accepted) / steps if steps else None,
        "acceptance": [a / d if d else None for a, d in zip(accepted, drafted)] if steps else [],
        "entropy": entropy / max(tokens, 1),
        "solved": 100.0 * solved / len(samples),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bebop", required=True, help="path of the bebop client")
    parser.add_argument("--server", required=True, help="HOST:PORT of the rollout port")
    parser.add_argument("--prompts", type=int, default=12, help="prompts a task")
    parser.add_argument("--samples", type=int, default=4, help="samples a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    args = parser.parse_args()

    header = f"{'task':6} {'mode':12} {'samples/s':>9} {'tokens/s':>9} {'accept len':>10} {'acceptance per position':>24} {'entropy':>8} {'solved %':>9}"
    print(header)
    print("-" * len(header))
    for task in TASKS:
        prompts = list(tasks.draw_prompts(task, args.prompts, seed=7, split="heldout"))
        tokenized = bebop(args, "tokenize", [{"text": prompt["prompt"], "parse_special": True} for prompt in prompts])
        prompt_ids = [line["token_ids"] for line in tokenized]
        for mode in MODES:
            cell = run_cell(args, prompts, prompt_ids, mode, args.max_new_tokens)
            length = f"{cell['accept_length']:.2f}" if cell["accept_length"] else "-"
            acceptance = " ".join(f"{a:.2f}" if a is not None else "-" for a in cell["acceptance"]) or "-"
            print(f"{task:6} {mode.lower():12} {cell['samples_per_second']:9.1f} {cell['tokens_per_second']:9.0f} {length:>10} "
                  f"{acceptance:>24} {cell['entropy']:8.3f} {cell['solved']:9.1f}", flush=True)
    samples = args.prompts * args.samples
    print(f"\n{samples} samples a row with fixed seeds: solved % is good to about ±{100 / samples ** 0.5:.0f} points, and no way of drafting changes its "
          "distribution.\nThe model is so small that a target pass costs as little as drafting; what drafts save grows with the model "
          "(docs/benchmarks.md).")


if __name__ == "__main__":
    main()
