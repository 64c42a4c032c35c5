# SPDX-License-Identifier: Apache-2.0
"""Plays problems against the server: one or more turns of the model, the environment's tokens between them, a reward at the end."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import random
from typing import Any

import numpy as np
from bundled import tasks

# A sample that the server cut short says nothing about the policy; LENGTH is the model's own doing and is judged like STOP.
JUDGED = ("STOP", "LENGTH")


@dataclasses.dataclass
class Episode:
    """One sample of a problem, all its turns in one token sequence.

    The arrays have the length of `tokens`. Only tokens that the model sampled are `trained`; on the others (prompt, tool answers) logprobs
    and entropies are 0 and versions are -1.
    """

    tokens: np.ndarray  # int64
    trained: np.ndarray  # bool
    logprobs: np.ndarray  # float32: of the version that sampled the token, as the server returned them
    entropies: np.ndarray  # float32
    versions: np.ndarray  # int64: the weight version that sampled the token
    reward: float
    judged: bool  # False: the server ended it before the model did
    turns: int
    kv_mixed: bool
    spec_steps: int
    accepted_drafts: int


@dataclasses.dataclass
class Group:
    """Episodes of one problem."""

    index: int
    task: str
    kind: str
    episodes: list[Episode]

    @property
    def oldest_version(self) -> int:
        return min(int(episode.versions[episode.trained].min()) for episode in self.episodes)


class _Trace:
    """An episode under way."""

    def __init__(self, prompt: list[int]) -> None:
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.kv_mixed, self.spec_steps, self.accepted_drafts, self.turns = False, 0, 0, 0
        self.give(prompt)

    def give(self, tokens: list[int]) -> None:
        """Appends tokens that the model did not sample."""
        size = len(tokens)
        self.parts.append((np.array(tokens, np.int64), np.zeros(size, bool), np.zeros(size, np.float32), np.zeros(size, np.float32),
                           np.full(size, -1, np.int64)))

    def say(self, sample: Any) -> None:
        """Appends a turn of the model."""
        size = len(sample.token_ids)
        self.parts.append((sample.token_ids, np.ones(size, bool), sample.logprobs, sample.entropy, sample.weight_steps))
        self.kv_mixed |= sample.kv_mixed
        self.spec_steps += sample.spec.num_spec_steps
        self.accepted_drafts += sample.spec.num_accepted_draft_tokens
        self.turns += 1

    def tokens(self) -> list[int]:
        return np.concatenate([part[0] for part in self.parts]).tolist()

    def end(self, reward: float, judged: bool) -> Episode:
        tokens, trained, logprobs, entropies, versions = (np.concatenate(column) for column in zip(*self.parts))
        return Episode(tokens, trained, logprobs, entropies, versions, reward, judged, self.turns, self.kv_mixed, self.spec_steps,
                       self.accepted_drafts)


def parse_mix(text: str) -> dict[tuple[str, str | None], float]:
    """"code/if=0.5,math=0.5" -> weights of (task, kind); a task alone draws its kinds as tasks.py does."""
    mix: dict[tuple[str, str | None], float] = {}
    for entry in text.split(","):
        name, _, weight = entry.partition("=")
        task, _, kind = name.strip().partition("/")
        if task not in tasks.TASKS:
            raise ValueError(f"mix: unknown task {task!r} in {entry!r}; known: {', '.join(tasks.TASKS)}")
        mix[task, kind or None] = float(weight or 1)
    return mix


def draw(task: str, kind: str | None, rng: random.Random, split: str) -> tasks.Problem:
    """A random problem; `kind` None: any of the task's."""
    for _ in range(1000):
        problem = tasks.draw_problem(task, rng, split)
        if kind in (None, problem.meta["kind"]):
            return problem
    raise ValueError(f"mix: task {task!r} has no kind {kind!r}")


def seed_of(*names: object) -> int:
    """A seed that depends on the names alone, so that a run can be repeated whatever order its requests come in."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, names)).encode()).digest()[:8], "big")


class Player:
    """Turns problems into groups of episodes. `client` is a bebop.AsyncClient; `params` go into every generate call."""

    def __init__(self, client: Any, tokenizer: Any, **params: Any) -> None:
        self._client, self._tokenizer, self._params = client, tokenizer, params

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    async def play(self, index: int, problem: tasks.Problem, samples: int, seed: object, **weights: Any) -> Group:
        """All samples of the first turn are one request; each goes on with its next turn as soon as it has ended.

        weights: which versions may sample (min_step, max_step_spread, ...).
        """
        prompt = self.encode(problem.prompt())
        going_on: list[asyncio.Task[Episode]] = []
        try:
            async for sample in self._generate(prompt, samples, seed_of(seed, index), weights):
                trace = _Trace(prompt)
                rest = self._go_on(trace, sample, problem, seed_of(seed, index, sample.sample_index), weights)
                going_on.append(asyncio.create_task(rest))
            return Group(index, problem.task, problem.meta["kind"], list(await asyncio.gather(*going_on)))
        finally:
            for task in going_on:
                task.cancel()

    def _generate(self, prompt: list[int], samples: int, seed: int, weights: dict[str, Any]) -> Any:
        return self._client.generate_stream(prompt, n=samples, seed=seed, logprobs=True, entropy=True, weights=weights, **self._params)

    async def _go_on(self, trace: _Trace, sample: Any, problem: tasks.Problem, seed: int, weights: dict[str, Any]) -> Episode:
        """Plays from a finished first turn to the end of the episode."""
        meta, text = problem.meta, problem.prompt()
        while True:
            trace.say(sample)
            if sample.finish.reason not in JUDGED:
                return trace.end(0.0, False)
            said = self._tokenizer.decode(sample.token_ids.tolist(), skip_special_tokens=False)
            following = tasks.next_turn(meta, text, said) if problem.task == "tools" and sample.finish.reason == "STOP" else None
            if following is None:
                return trace.end(float(tasks.check(problem.task, meta, said)), True)
            # The sampled ids stay as they are, and only the environment's text is tokenized: encoding the whole transcript again could split
            # the model's words in another way than it did, and the behaviour log-probabilities would belong to other tokens.
            given = following[1][len(text) + len(said.split(tasks.IM_END, 1)[0] + tasks.IM_END):]
            trace.give(self.encode(given))
            meta, text = following
            async for event in self._generate(trace.tokens(), 1, seed_of(seed, trace.turns), weights):
                sample = event
