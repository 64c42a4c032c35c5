#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Samples bebop-tiny at temperature 1 on held-out prompts: solved %, entropy, and a teacher-forced accept length.

    evaluate.py [--model DIR] [--n 500] [--seed 0] [--task math|code|tools|all] [--json]

The accept length here is *teacher-forced*: on the model's own samples, with the true tokens fed as drafts, the acceptance
of draft k is the overlap sum_v min(target_prob, draft_prob), and the accept length is the mean over bases of
1 + a_1 + a_1 a_2 + a_1 a_2 a_3. Real decoding weights positions by iteration; the server measures that one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import data
import modeling
import sampling
import tasks
import torch


def _batches(documents: Sequence[data.Document], rows: int = 16, length: int = 256) -> Iterator[data.Batch]:
    """All documents, in order, packed. Few enough are taken at a time that every one fits."""
    group: list[data.Document] = []
    for document in documents:
        group.append(document)
        # First fit can strand at most the longest document's length per row.
        if sum(len(item.tokens) for item in group) > rows * length // 3:
            yield data.pack(group, rows, length, patience=1)
            group = []
    if group:
        yield data.pack(group, rows, length, patience=1)


@torch.no_grad()
def teacher_forced_acceptance(
    weights: modeling.Weights, config: modeling.ModelConfig, documents: Sequence[data.Document], gamma: int
) -> dict[str, Any]:
    """`overlap_per_position` (mean overlap of draft k = 1..gamma) and `accept_length` over bases with a whole chain.

    A base t counts when token t + 1 was generated: draft k predicts token t + k + 1, judged by the target's row t + k.
    """
    sums, counts = torch.zeros(gamma), torch.zeros(gamma)
    length_sum = length_count = 0.0
    for batch in _batches(documents):
        where = (batch.tokens, batch.positions, batch.documents)
        hidden = modeling.backbone(weights, *where, config)
        target_probs = modeling.logits_of(weights, hidden).softmax(-1)
        _, generated = data.targets_at(batch, 1)
        product = torch.ones(batch.tokens.shape)
        emitted = torch.ones(batch.tokens.shape)
        for index, output in enumerate(modeling.mtp_chain(weights, hidden, *where, config, gamma)):
            draft_probs = modeling.logits_of(weights, output).softmax(-1)
            overlap = torch.minimum(modeling.shift_left(target_probs, index + 1), draft_probs).sum(-1)
            _, counted = data.targets_at(batch, index + 2)
            counted = counted & generated
            sums[index] += overlap[counted].sum()
            counts[index] += counted.sum()
            product = product * overlap
            emitted = emitted + product
        length_sum += emitted[counted].sum().item()  # counted: the whole chain lies in the completion
        length_count += counted.sum().item()
    return {
        "overlap_per_position": [round(value, 4) for value in (sums / counts).tolist()],
        "accept_length_teacher_forced": round(length_sum / max(length_count, 1.0), 4),
    }


def evaluate_task(
    task: str, weights: modeling.Weights, config: modeling.ModelConfig, tokenizer: Any, arguments: argparse.Namespace
) -> dict[str, Any]:
    """All numbers of one task."""
    prompts = list(tasks.draw_prompts(task, arguments.n, arguments.seed, arguments.split))
    encoded = [tokenizer.encode(prompt["prompt"]).ids for prompt in prompts]
    generator = torch.Generator().manual_seed(arguments.seed)
    eos = tokenizer.token_to_id(tasks.IM_END)
    drawn: list[sampling.Sample] = []
    for start in range(0, len(encoded), arguments.rows):
        rows = encoded[start : start + arguments.rows]
        drawn += sampling.sample(weights, config, rows, eos, arguments.max_new_tokens, generator)
    solved: dict[str, list[bool]] = {}
    for prompt, item in zip(prompts, drawn, strict=True):
        completion = tokenizer.decode(item.tokens, skip_special_tokens=False)
        solved.setdefault(prompt["meta"]["kind"], []).append(tasks.check(task, prompt["meta"], completion))
    flat = [value for values in solved.values() for value in values]
    entropies = [value for item in drawn for value in item.entropies]
    documents = [
        data.Document(item.prompt + item.tokens, [False] * len(item.prompt) + [True] * len(item.tokens))
        for item in drawn
        if len(item.prompt) + len(item.tokens) <= 256
    ]
    return {
        "task": task,
        "samples": len(drawn),
        "solved_percent": round(100 * sum(flat) / len(flat), 2),
        "solved_percent_by_kind": {kind: round(100 * sum(v) / len(v), 1) for kind, v in sorted(solved.items())},
        "mean_entropy_nats": round(sum(entropies) / len(entropies), 4),
        "mean_completion_tokens": round(len(entropies) / len(drawn), 1),
        "finished_percent": round(100 * sum(item.finished for item in drawn) / len(drawn), 2),
        **teacher_forced_acceptance(weights, config, documents, arguments.gamma),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "bebop-tiny")
    parser.add_argument("--task", choices=(*tasks.TASKS, "all"), default="all")
    parser.add_argument("--split", choices=tasks.SPLITS, default="heldout")
    parser.add_argument("--n", type=int, default=500, help="prompts per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gamma", type=int, default=3)
    parser.add_argument("--rows", type=int, default=250, help="sequences decoded together")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--show", type=int, default=0, help="print this many samples per task to stderr")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weights, config, tokenizer = data.load_model(arguments.model)
    for task in tasks.TASKS if arguments.task == "all" else (arguments.task,):
        start = time.monotonic()
        result = evaluate_task(task, weights, config, tokenizer, arguments)
        result["seconds"] = round(time.monotonic() - start, 1)
        if arguments.json:
            print(json.dumps(result), flush=True)
        else:
            print("\n".join(f"{key:30} {value}" for key, value in result.items()) + "\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
