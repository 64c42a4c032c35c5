# SPDX-License-Identifier: Apache-2.0
"""Prompts: the bundled model's three tasks, three sets that it never saw the like of, and the prompts that training rollouts start from.

    math, code, tools   held-out problems of tests/models/tasks.py, worded as in training
    digits              sums and differences of three- and four-digit numbers, one digit more than it was trained on, and two-digit products
    shuffled            the held-out problems of all three tasks, the words of the question in random order
    text                passages of the repository's LICENSE, no question and no chat format

The texts go through the server's tokenizer, so any checkpoint with the same special tokens (Qwen's) can be asked.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/models"))
import tasks  # noqa: E402

IN_DOMAIN = tasks.TASKS
OUT_OF_DOMAIN = ("digits", "shuffled", "text")
WORKLOADS = (*IN_DOMAIN, *OUT_OF_DOMAIN)
TRAINING_SHARE = {"math": 0.45, "code": 0.3, "tools": 0.25}  # of the problems, as the bundled model was trained


def heldout(workload: str, count: int) -> list[str]:
    """The first `count` prompt texts of a workload: always the same, and a longer list begins with a shorter one."""
    if workload in IN_DOMAIN:
        return [record["prompt"] for record in tasks.draw_prompts(workload, count, seed=11, split="heldout")]
    makers = {"digits": _digits, "shuffled": _shuffled, "text": _text}
    prompts = makers[workload](random.Random(f"reproduction/{workload}"))
    return [next(prompts) for _ in range(count)]


def training(count: int, seed: int) -> list[str]:
    """`count` prompt texts of the training split, tasks mixed as the bundled model saw them. Other seeds give other problems."""
    rng = random.Random(f"reproduction/training/{seed}")
    texts = []
    for _ in range(count):
        task = rng.choices(tuple(TRAINING_SHARE), tuple(TRAINING_SHARE.values()))[0]
        problem = tasks.draw_problem(task, rng, "train")
        texts.append(problem.prompt(rng.randrange(problem.num_turns)))
    return texts


def _chat(question: str) -> str:
    return f"{tasks.IM_START}user\n{question}{tasks.IM_END}\n{tasks.ASSISTANT}"


def _digits(rng: random.Random) -> Iterator[str]:
    while True:
        operator = rng.choice("+-*")
        if operator == "*":
            first, second = rng.randint(11, 99), rng.randint(11, 99)
        else:
            second, first = sorted((rng.randint(100, 9999), rng.randint(1000, 9999)))
        yield _chat(rng.choice(("What is {}?", "Compute {}.", "Find {}.")).format(f"{first}{operator}{second}"))


def _shuffled(rng: random.Random) -> Iterator[str]:
    while True:
        problem = tasks.draw_problem(rng.choice(IN_DOMAIN), rng, "heldout")
        question = re.search(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", problem.prompt(), re.DOTALL).group(1)
        words = question.split()
        rng.shuffle(words)
        yield problem.prompt().replace(question, " ".join(words))


def _text(rng: random.Random) -> Iterator[str]:
    words = (ROOT / "LICENSE").read_text(encoding="ascii").split()
    while True:
        start = rng.randrange(len(words) - 20)
        yield " ".join(words[start : start + 20])
