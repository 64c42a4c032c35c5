# SPDX-License-Identifier: Apache-2.0
"""Takes draft heads through a policy's checkpoints: updates the online ones on the rollouts in between, and decodes held-out prompts with all.

An online head of version v is the one of the version before, trained on by bebop-train-mtp on rollouts of the steps between the two with v as
the target: what a learner that trains its draft layer along would hold at that point, but for the optimizer's moments, which begin anew.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import heads
import rl_run
import workloads
from rl_run import Policy, RlSettings
from settings import Context


@dataclasses.dataclass(frozen=True)
class Arm:
    """A head on its way through a run: frozen, or updated with loss `update` at every checkpoint."""

    loss: str
    seed: int
    update: str | None = None

    @property
    def name(self) -> str:
        return f"{self.loss}-{self.seed}" + (f"+{self.update}" if self.update else "")


@dataclasses.dataclass(frozen=True)
class Job:
    """One decoding of all prompts, and one record."""

    policy: str
    version: int
    arm: Arm
    mode: str

    @property
    def key(self) -> dict[str, Any]:
        return {"policy": self.policy, "version": self.version, "mode": self.mode, **dataclasses.asdict(self.arm)}


def frozen_arms(settings: RlSettings) -> list[Arm]:
    return [Arm(loss, seed) for loss, seeds in settings.seeds.items() for seed in range(seeds)]


def online_arms(settings: RlSettings) -> list[Arm]:
    return [Arm(online.start, seed, online.update) for online in settings.online for seed in range(online.seeds)]


def head_path(context: Context, policy: Policy, arm: Arm, version: int) -> Path:
    """The head of an arm at a version that is not the run's first, or of a frozen one at any."""
    if arm.update is None:
        return heads.Head(arm.loss, arm.seed).path(context)
    return context.work / "rl" / policy.name / "heads" / arm.name / f"{version:06}.safetensors"


# ---- online updates ----


def interval_path(context: Context, policy: Policy, version: int, seed: int) -> Path:
    return context.work / "rl" / policy.name / "data" / f"{version:06}-{seed}.jsonl"


def draw_documents(lines: list[str], tokens: int, seed: str) -> list[str]:
    """Documents drawn without replacement, until they have `tokens` tokens or none is left."""
    chosen = []
    for line in random.Random(seed).sample(lines, len(lines)):
        if tokens <= 0:
            break
        chosen.append(line)
        tokens -= len(json.loads(line)["token_ids"])
    return chosen


def make_data(context: Context, settings: RlSettings, policy: Policy) -> None:
    """What updates train on, by version and seed: every arm of a seed is updated on the same documents."""
    kept = rl_run.manifest_of(context, policy)["kept"]
    for entry in kept[1:]:
        lines = None
        for seed in sorted({arm.seed for arm in online_arms(settings)}):
            path = interval_path(context, policy, entry["version"], seed)
            if path.exists():
                continue
            if lines is None:
                lines = (rl_run.folder_of(context, policy) / entry["rollouts"]).read_text(encoding="utf-8").splitlines()
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            chosen = draw_documents(lines, settings.online_tokens, f"rl/{policy.name}/{entry['version']}/{seed}")
            temporary.write_text("\n".join(chosen) + "\n", encoding="utf-8")
            temporary.replace(path)


def update(context: Context, policy: Policy, arm: Arm) -> None:
    """Makes the arm's head of every version, each from the one before."""
    kept = rl_run.manifest_of(context, policy)["kept"]
    before = heads.Head(arm.loss, arm.seed).path(context)
    start, made = time.monotonic(), 0
    for entry in kept[1:]:
        path = head_path(context, policy, arm, entry["version"])
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            heads.run_trainer(context, rl_run.folder_of(context, policy) / entry["checkpoint"], before,
                              interval_path(context, policy, entry["version"], arm.seed), path, arm.update, arm.seed, context.settings.lr)
            made += 1
        before = path
    if made:
        context.say(f"policy {policy.name}, head {arm.name}: {made} updates in {time.monotonic() - start:.0f} s")


def update_all(context: Context, settings: RlSettings, policy: Policy) -> None:
    """Every online arm, as many at a time as there are servers. The first failure stops what has not begun."""
    make_data(context, settings, policy)
    with concurrent.futures.ThreadPoolExecutor(context.settings.servers) as pool:
        futures = [pool.submit(update, context, policy, arm) for arm in online_arms(settings)]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


# ---- decoding ----


def jobs_of(settings: RlSettings, policy: Policy, version: int, first: int) -> Iterator[Job]:
    """What is decoded at a version. An online arm is its frozen one at the first."""
    for arm in frozen_arms(settings):
        yield Job(policy.name, version, arm, "rejection")
        if arm.loss in settings.target_only:
            yield Job(policy.name, version, arm, "target_only")
    if version != first:
        for arm in online_arms(settings):
            yield Job(policy.name, version, arm, "rejection")


def decode_all(context: Context, settings: RlSettings, store: harness.Store) -> None:
    """Appends a record a job that the store lacks. A server takes a version's target and then all of that version's heads."""
    versions = []
    for policy in settings.policies:
        kept = rl_run.manifest_of(context, policy)["kept"]
        versions += [(policy, entry, kept[0]["version"]) for entry in kept]
    done = {json.dumps(record["job"], sort_keys=True) for record in store.records}

    def decode_version(server: harness.Server, policy: Policy, entry: dict[str, Any], first: int) -> None:
        missing = [job for job in jobs_of(settings, policy, entry["version"], first) if json.dumps(job.key, sort_keys=True) not in done]
        if not missing:
            return
        start = time.monotonic()
        server.load(rl_run.folder_of(context, policy) / entry["checkpoint"], ["target"])
        prompts = [harness.Prompt(task, index, server.encode(text))
                   for task in workloads.IN_DOMAIN for index, text in enumerate(workloads.heldout(task, settings.prompts))]
        for job in missing:
            server.load_draft(head_path(context, policy, job.arm, entry["version"]))
            options = harness.Decoding(mode=job.mode, num_draft_tokens=context.settings.num_draft_tokens, samples=settings.samples,
                                       max_new_tokens=context.settings.max_new_tokens)
            groups = harness.decode(server, prompts, options)
            store.append({"job": job.key, "prompts": [{"workload": prompt.workload, "index": prompt.index, **harness.counts_of(group)}
                                                      for prompt, group in groups]})
        context.say(f"policy {policy.name}, version {entry['version']}: {len(missing)} decodings in {time.monotonic() - start:.0f} s")

    with heads.open_servers(context) as servers:
        harness.run_jobs(servers, [lambda server, version=version: decode_version(server, *version) for version in versions])
