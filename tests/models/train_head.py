#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains bebop-tiny's shipped MTP head: end-to-end TV on the model's own samples, from the cross-entropy head of train.py.

    python tests/models/train_head.py --bin build/cpu-release/bin --work DIR

Leaves DIR/head.safetensors and writes model.safetensors anew with it; --dry-run leaves the model alone. What is in DIR already is not made again. Where
bebop-tiny has no mtp-ce.safetensors, as after a fresh train.py, it is first made from the model's own head.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "reproduction"))
import workloads  # noqa: E402

MODEL = HERE / "bebop-tiny"
START = MODEL / "mtp-ce.safetensors"
PROMPTS, SEED, HELD_BACK = 16000, 100, 400  # the last lines of the rollouts are kept for evaluation


def make_data(programs: Path, work: Path, port: int) -> tuple[Path, Path]:
    """Rollouts at temperature 1 on training-split prompts, as (training, evaluation) files."""
    training, evaluation = work / "train.jsonl", work / "eval.jsonl"
    if evaluation.exists():
        return training, evaluation
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    prompts, rollouts = work / "prompts.jsonl", work / "rollouts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_token_ids": tokenizer.encode(text).ids}) + "\n" for text in workloads.training(PROMPTS, SEED)))
    server = subprocess.Popen([programs / "bebop-server", "--model", MODEL, "--port", str(port), "--admin-port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        if "ready" not in server.stdout.readline():
            raise RuntimeError("bebop-server did not start")
        subprocess.run([programs / "bebop", "--server", f"127.0.0.1:{port}", "rollouts", "--prompts", prompts, "--out", rollouts, "--mode", "off",
                        "--max-new-tokens", "160", "--concurrency", "96", "--seed", str(SEED + 1)], check=True)
    finally:
        server.terminate()
        server.wait()
    lines = rollouts.read_text().splitlines(keepends=True)
    training.write_text("".join(lines[:-HELD_BACK]))
    evaluation.write_text("".join(lines[-HELD_BACK:]))
    return training, evaluation


def write_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    save_file(dict(sorted(tensors.items())), temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)  # safetensors creates it for the owner alone
    temporary.replace(path)


def keep_start() -> None:
    if not START.exists():
        write_tensors(START, {name: tensor for name, tensor in load_file(MODEL / "model.safetensors").items() if name.startswith("mtp.")})


def replace_head(head: Path) -> None:
    """Writes model.safetensors anew with the mtp.* tensors of `head`."""
    path = MODEL / "model.safetensors"
    tensors, trained = load_file(path), load_file(head)
    names = {name for name in tensors if name.startswith("mtp.")}
    if names != set(trained):
        raise ValueError(f"{head}: expected the tensors {sorted(names)[:2]}..., got {sorted(trained)[:2]}...")
    write_tensors(path, tensors | trained)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bin", type=Path, required=True, help="folder with bebop-server, bebop and bebop-train-mtp")
    parser.add_argument("--work", type=Path, required=True, help="folder for rollouts and the head")
    parser.add_argument("--port", type=int, default=50971)
    parser.add_argument("--dry-run", action="store_true", help="leave model.safetensors as it is")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    keep_start()
    training, evaluation = make_data(arguments.bin, arguments.work, arguments.port)
    head = arguments.work / "head.safetensors"
    if not head.exists():
        with open(arguments.work / "log.jsonl", "w", encoding="utf-8") as log:
            subprocess.run([arguments.bin / "bebop-train-mtp", "--model", MODEL, "--mtp", START, "--data", training,
                            "--eval-data", evaluation, "--out", head, "--loss", "e2e_tv", "--num-steps-ahead", "5", "--lr", "5e-4",
                            "--warmup-ratio", "0.03", "--decay", "linear", "--epochs", "2", "--batch-tokens", "2048", "--seed", "0",
                            "--threads", "1", "--eval-every", "200", "--json", "--resume"], check=True, stdout=log)
    if not arguments.dry_run:
        replace_head(head)
    return 0


if __name__ == "__main__":
    sys.exit(main())
