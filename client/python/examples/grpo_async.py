#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Asynchronous GRPO against a running bebop-server: samples stream in while the policy trains and new weights are pushed.

    bebop-server --model tests/models/bebop-tiny --dtype float32 --threads 1
    python client/python/examples/grpo_async.py --minutes 20 --log grpo.jsonl --save trained
    python client/python/examples/plot.py run grpo.jsonl --out docs/rl

Three things go on at once: the server samples, the learner trains on what is there, and after every optimizer step the new weights are pushed
into the running server. Two bounds keep the data fresh. A group is begun only while it can still be used within --max-staleness versions,
and one whose oldest token is older than that when its turn comes is thrown away. What is left of the lag is corrected per token by the
importance ratio to the version that sampled the token, whose log-probability came with it.

docs/rl.md explains the choices, the log and the plots. Needs torch, safetensors and tokenizers besides the bebop package.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bebop
import bundled
import episodes
import keep
import learner
import numpy as np
import torch

TASKS = bundled.tasks.TASKS


class Rollouts:
    """Keeps groups of the training split in flight, and hands out finished ones.

    With B groups a step and versions counted from the start of the run, (version + 1 + max_staleness) * B groups have been begun at most:
    those that the learner has used or is using, and max_staleness batches ahead.
    """

    def __init__(self, player: episodes.Player, arguments: argparse.Namespace, first_version: int) -> None:
        self._player, self._arguments = player, arguments
        self._first_version = self._version = first_version
        self._mix = episodes.parse_mix(arguments.mix)
        self._begun = self._thrown_away = 0
        self._room = asyncio.Event()
        self._finished: asyncio.Queue[episodes.Group | Exception] = asyncio.Queue()
        self._running: set[asyncio.Task[None]] = set()

    @property
    def thrown_away(self) -> int:
        """Groups that were too old when their turn came, or that the server cut short."""
        return self._thrown_away

    @property
    def in_flight(self) -> int:
        return len(self._running)

    def begin(self) -> None:
        """Begins as many groups as the bound allows."""
        arguments = self._arguments
        bound = (self._version - self._first_version + 1 + arguments.max_staleness) * arguments.groups
        while self._begun - self._thrown_away < bound:
            task = asyncio.create_task(self._play(self._begun))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            self._begun += 1

    async def _play(self, index: int) -> None:
        arguments = self._arguments
        rng = random.Random(f"train/{arguments.seed}/{index}")
        names = rng.choices(tuple(self._mix), tuple(self._mix.values()))[0]
        try:
            problem = episodes.draw(*names, rng, "train")
            # min_step guards against a replica that missed an update; max_step_spread ends a sample that too many updates have overtaken.
            group = await self._player.play(index, problem, arguments.samples, arguments.seed, wait_for_step=True,
                                            min_step=max(0, self._version - arguments.max_staleness),
                                            max_step_spread=arguments.max_staleness)
            await self._finished.put(group)
        except Exception as error:  # the learner's loop raises it
            await self._finished.put(error)

    async def take(self) -> list[episodes.Group]:
        """The next groups that are finished, in the order in which they were begun, so that sums do not depend on who was faster."""
        batch: list[episodes.Group] = []
        while len(batch) < self._arguments.groups:
            self.begin()
            group = await self._finished.get()
            if isinstance(group, Exception):
                raise group
            group.episodes = [episode for episode in group.episodes if episode.judged]
            if len(group.episodes) < 2 or self._version - group.oldest_version > self._arguments.max_staleness:
                self._thrown_away += 1
                continue
            batch.append(group)
        return sorted(batch, key=lambda group: group.index)

    def advance(self, version: int) -> None:
        self._version = version
        self.begin()

    async def stop(self) -> None:
        for task in tuple(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


def wilson(solved: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a share."""
    z, share = 1.96, solved / total
    middle, half = share + z * z / (2 * total), z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (middle - half) / (1 + z * z / total), (middle + half) / (1 + z * z / total)


async def evaluate(player: episodes.Player, count: int) -> dict[str, Any]:
    """Held-out reward: `count` problems of every task, the same ones each time, one sample of each at temperature 1."""
    limit = asyncio.Semaphore(64)

    async def play(index: int, problem: Any) -> episodes.Group:
        async with limit:
            return await player.play(index, problem, 1, "heldout")

    rng = random.Random("heldout")
    problems = [episodes.draw(task, None, rng, "heldout") for task in TASKS for _ in range(count)]
    groups = await asyncio.gather(*(play(index, problem) for index, problem in enumerate(problems)))
    rewards: dict[str, list[float]] = collections.defaultdict(list)
    for group in groups:
        for name in ("all", group.task, f"{group.task}/{group.kind}"):
            rewards[name].append(group.episodes[0].reward)
    result = {}
    for name, values in sorted(rewards.items()):
        low, high = wilson(int(sum(values)), len(values))
        result[name] = {"n": len(values), "reward": round(float(np.mean(values)), 4), "low": round(low, 4), "high": round(high, 4)}
    return result


def summarize(groups: list[episodes.Group], version: int) -> dict[str, Any]:
    """What a batch of groups looks like to the learner at `version`."""
    played = [episode for group in groups for episode in group.episodes]
    trained = [episode.trained for episode in played]
    versions = np.concatenate([episode.versions[mask] for episode, mask in zip(played, trained)])
    entropies = np.concatenate([episode.entropies[mask] for episode, mask in zip(played, trained)])
    by_task = collections.defaultdict(list)
    for group in groups:
        by_task[group.task] += [episode.reward for episode in group.episodes]
    spec_steps = sum(episode.spec_steps for episode in played)
    return {
        "reward": float(np.mean([episode.reward for episode in played])),
        "reward_by_task": {task: float(np.mean(rewards)) for task, rewards in sorted(by_task.items())},
        "entropy": float(entropies.mean()),
        "accept_length": 1 + sum(episode.accepted_drafts for episode in played) / spec_steps if spec_steps else None,
        "groups": len(groups),
        "episodes": len(played),
        "turns": sum(episode.turns for episode in played),
        "tokens": len(versions),
        "tokens_without_version": int((versions < 0).sum()),
        "staleness_mean": float((version - versions).mean()),
        "staleness_max": int((version - versions).max()),
        "mixed_episodes": sum(len(set(episode.versions[mask])) > 1 for episode, mask in zip(played, trained)),
        "kv_mixed_episodes": sum(episode.kv_mixed for episode in played),
    }


class Log:
    """JSON lines in a file, and a short line on the terminal."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("w", encoding="utf-8") if path else None
        self._start = time.monotonic()

    def write(self, kind: str, **values: Any) -> None:
        record = {"kind": kind, "seconds": round(time.monotonic() - self._start, 3), **values}
        if self._file:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file:
            self._file.close()


def show_evaluation(version: int, result: dict[str, Any]) -> None:
    shares = "   ".join(f"{name} {100 * value['reward']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"
                        for name, value in result.items() if "/" not in name)
    print(f"version {version:4}  held-out reward %, 95 % interval:   {shares}", flush=True)


async def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    policy = learner.Learner(arguments.model, arguments.lr, arguments.clip_low, arguments.clip_high, arguments.entropy_bonus,
                             arguments.entropy_target)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    keeper = keep.Keeper(arguments.keep, arguments.keep_every, policy, settings) if arguments.keep else None
    log = Log(arguments.log)
    async with bebop.AsyncClient(arguments.server, arguments.admin, token_file=arguments.token_file) as client:
        await client.wait_until_serving(60)
        first = version = (await client.weights.info()).target_step
        if version:  # not the checkpoint that this learner starts from
            first = version = version + 1
            await client.weights.update(policy.tensors(), step=version, label=arguments.label)
        speculation = {"mode": arguments.speculation}
        if arguments.num_draft_tokens is not None:
            speculation["num_draft_tokens"] = arguments.num_draft_tokens
        player = episodes.Player(client, policy.tokenizer, temperature=1.0, max_new_tokens=arguments.max_new_tokens, speculation=speculation)
        rollouts = Rollouts(player, arguments, first)
        log.write("run", arguments=settings, version=version, load=os.getloadavg()[0])

        async def evaluation() -> None:
            print(f"version {version:4}  evaluating on {arguments.eval} held-out problems of every task (--eval)", file=sys.stderr, flush=True)
            begin = time.monotonic()
            result = await evaluate(player, arguments.eval)
            log.write("eval", version=version, reward=result, eval_seconds=round(time.monotonic() - begin, 3), load=os.getloadavg()[0])
            show_evaluation(version, result)

        try:
            if keeper:
                keeper.reached(version)
            if arguments.eval:
                await evaluation()
            begin = started = time.monotonic()
            steps = 0
            # The share of the run that is over; the learning rate falls linearly to 0 with it.
            while (over := max((started - begin) / (60 * arguments.minutes), steps / (arguments.steps or math.inf))) < 1:
                groups = await rollouts.take()
                taken = time.monotonic()
                # In a thread, so that samples keep streaming in and finished turns are answered meanwhile.
                lr_share = min(1.0, (steps + 1) / arguments.warmup) * (1 - over)
                trained = await asyncio.to_thread(policy.step, groups, lr_share)
                ready = time.monotonic()
                update = await client.weights.update(policy.tensors(), step=version + 1, label=arguments.label, in_flight=arguments.in_flight)
                pushed = time.monotonic()
                record = {"step": steps, "version": version, "lr": arguments.lr * lr_share, **summarize(groups, version), **trained}
                version, steps = version + 1, steps + 1
                rollouts.advance(version)
                if keeper:
                    keeper.add(groups)
                    await asyncio.to_thread(keeper.reached, version)
                record |= {"rollout_seconds": taken - started, "train_seconds": ready - taken, "sync_seconds": pushed - ready,
                           "step_seconds": pushed - started, "swap_seconds": update.swap_seconds, "kept_samples": update.kept_samples,
                           "recomputed_samples": update.recomputed_samples, "ended_samples": update.ended_samples,
                           "groups_thrown_away": rollouts.thrown_away, "new_version": version, "load": os.getloadavg()[0]}
                log.write("step", **record)
                accept = f"{record['accept_length']:.2f}" if record["accept_length"] else "-"
                print(f"step {steps:4}  reward {record['reward']:.3f}  entropy {record['entropy']:.3f}  accept {accept}  stale "
                      f"{record['staleness_mean']:.2f}  clipped {100 * record.get('clip_fraction', 0):.2f} %  seconds {record['step_seconds']:.2f} = "
                      f"{record['rollout_seconds']:.2f} + {record['train_seconds']:.2f} + {record['sync_seconds']:.2f}", flush=True)
                started = time.monotonic()
            await rollouts.stop()
            if keeper:
                keeper.end(version)
            if arguments.eval:
                await evaluation()
        finally:
            await rollouts.stop()
            if keeper:
                keeper.close()
            if arguments.save:
                policy.save(arguments.save)
            log.close()


def at_least(minimum: float, kind: type) -> Callable[[str], Any]:
    """An argparse type: a number that is no less."""

    def parse(text: str) -> Any:
        value = kind(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text}: expected at least {minimum}")
        return value

    parse.__name__ = kind.__name__  # named when the text is no number at all
    return parse


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", default="127.0.0.1:50051", help="rollout port")
    parser.add_argument("--admin", default="127.0.0.1:50052", help="admin port")
    parser.add_argument("--token-file", help="bearer token, if the server wants one")
    parser.add_argument("--model", type=Path, default=bundled.MODEL, help="the checkpoint that the server was started with")
    parser.add_argument("--minutes", type=at_least(0.01, float), default=20.0)
    parser.add_argument("--steps", type=at_least(1, int), help="end after this many, or --minutes if that is sooner")
    parser.add_argument("--groups", type=at_least(1, int), default=12, help="groups of a step")
    parser.add_argument("--samples", type=at_least(2, int), default=8, help="samples of a group")
    parser.add_argument("--mix", default="math=0.5,math/add3=0.2,code=0.15,tools=0.15",
                        help="share of groups by task or task/kind; default: mostly math, where sampling costs the bundled model most")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="of a turn")
    parser.add_argument("--max-staleness", type=at_least(0, int), default=1, help="versions between sampling and training; 0 alternates the two")
    parser.add_argument("--in-flight", choices=("keep", "recompute", "abort", "wait"), default="keep", help="running samples at an update")
    parser.add_argument("--speculation", choices=("coupled", "rejection", "target_only", "off"), default="rejection")
    parser.add_argument("--num-draft-tokens", type=int, help="default: the server's")
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW; falls to 0 over the run")
    parser.add_argument("--warmup", type=at_least(1, int), default=10, help="steps until the learning rate is whole")
    parser.add_argument("--clip-low", type=float, default=0.2)
    parser.add_argument("--clip-high", type=float, default=0.28)
    parser.add_argument("--entropy-bonus", type=float, default=0.0, help="times the entropy in nats a token, added to the objective")
    parser.add_argument("--entropy-target", type=float, help="the bonus rests while entropy is this or more")
    parser.add_argument("--threads", type=at_least(1, int), default=1, help="of the learner")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval", type=at_least(0, int), default=600, help="held-out problems of every task, before and after; 0: none")
    parser.add_argument("--label", help="name of the pushed versions")
    parser.add_argument("--log", type=Path, help="JSON lines")
    parser.add_argument("--save", type=Path, help="folder for the trained checkpoint")
    parser.add_argument("--keep", type=Path, help="an empty folder for checkpoints along the way and the rollouts between them")
    parser.add_argument("--keep-every", type=at_least(1, int), default=50, help="versions from one kept checkpoint to the next")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    try:
        asyncio.run(run(parse_arguments(argv)))
    except (bebop.BebopError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
