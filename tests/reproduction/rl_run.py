# SPDX-License-Identifier: Apache-2.0
"""The policies of the reinforcement-learning part: short GRPO runs of the learner example that leave checkpoints and rollouts behind.

A policy is trained once; rl_replay.py then takes every draft head through the same checkpoints, so that heads are compared on equal targets and
one run of training serves them all. Drafting changes no distribution, so a policy does not depend on the head that was loaded while it was trained.

Three policies: `falling` is the example as it is; `gentle` has a fifth of its learning rate, so that the policy stays near the one that the heads were
trained for, as in RL of large models; `rising` has an entropy bonus, because plain GRPO only lowers entropy here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bebop
import harness
import settings
from settings import Context

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "client/python/examples/grpo_async.py"
MODEL = ROOT / "tests/models/bebop-tiny"  # the one that the example can train


@dataclasses.dataclass(frozen=True)
class Policy:
    """A GRPO run. `flags` are the example's."""

    name: str
    steps: int
    keep_every: int
    flags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Online:
    """Heads that are trained on along the run: each begins as the head of loss `start` trained before it and is updated with loss `update`."""

    start: str
    update: str
    seeds: int


@dataclasses.dataclass(frozen=True)
class RlSettings:
    """One scale of the part."""

    policies: tuple[Policy, ...]
    seeds: dict[str, int]  # of the frozen heads, by loss
    target_only: tuple[str, ...]  # losses whose frozen heads are also decoded under target-only
    online: tuple[Online, ...]
    online_tokens: int  # of the rollouts between two checkpoints, what an update is trained on
    prompts: int  # of each task
    samples: int  # of each prompt


QUICK = RlSettings(
    policies=(Policy("falling", 2, 2, ("--groups", "4", "--samples", "4", "--warmup", "1")),), seeds={"ce": 1, "tv": 1}, target_only=("ce",),
    online=(Online("tv", "tv", 1), Online("tv", "ce", 1)), online_tokens=3000, prompts=8, samples=1)

GENTLE = ("--lr", "2e-4")
# Entropy below its target is pushed up, and the reward holds against it: above it only the reward acts.
RISING = ("--groups", "6", "--entropy-bonus", "0.5", "--entropy-target", "0.4")

FULL = RlSettings(
    policies=(Policy("falling", 240, 60), Policy("gentle", 160, 80, GENTLE), Policy("rising", 45, 15, RISING)),
    seeds={"ce": 3, "tv": 3, "e2e_tv": 3, "kl": 1, "reverse_kl": 1}, target_only=("ce", "tv"),
    online=(Online("ce", "ce", 3), Online("tv", "tv", 3), Online("tv", "ce", 3), Online("e2e_tv", "e2e_tv", 1), Online("e2e_tv", "ce", 1)),
    online_tokens=30000, prompts=100, samples=2)

# The learner trains the bundled model alone: what a GPU gives is time for a longer run, and larger updates of the heads.
GPU = dataclasses.replace(
    FULL, policies=(Policy("falling", 2000, 200), Policy("gentle", 2000, 400, GENTLE), Policy("rising", 200, 40, RISING)),
    online_tokens=400_000, prompts=400)

SCALES = {"quick": QUICK, "full": FULL, "gpu": GPU}


def settings_of(context: Context) -> RlSettings:
    """The scale that the context's settings belong to."""
    return next(SCALES[name] for name, value in settings.SCALES.items() if value == context.settings)


def folder_of(context: Context, policy: Policy) -> Path:
    return context.work / "rl" / policy.name / "policy"


def manifest_of(context: Context, policy: Policy) -> dict[str, Any] | None:
    """What the run kept; None unless it came to its end."""
    path = folder_of(context, policy) / "manifest.json"
    if not path.exists():
        return None
    manifest = json.loads(path.read_text(encoding="utf-8"))
    return manifest if manifest["ended"] else None


def run(context: Context, policy: Policy) -> None:
    """Trains the policy, unless that is done. An interrupted run begins anew: the example has no resume."""
    if manifest_of(context, policy) is not None:
        return
    folder = folder_of(context, policy)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    site = Path(bebop.__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    start = time.monotonic()
    # float32, so that the server samples with the learner's own numbers (docs/rl.md).
    with harness.Server(context.programs.server, context.model, threads=context.settings.threads, device=context.device,
                        log=folder.with_name("server.log"), flags=("--dtype", "float32")) as server:
        command = [sys.executable, str(EXAMPLE), "--server", server.rollout, "--admin", server.admin, "--model", str(context.model), "--minutes", "600",
                   "--steps", str(policy.steps), "--eval", "0", "--keep", str(folder), "--keep-every", str(policy.keep_every),
                   "--log", str(folder.with_name("log.jsonl")), *policy.flags]
        output = folder.with_name("output.log")
        with output.open("w", encoding="utf-8") as file:
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if status != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}:\n{output.read_text(encoding='utf-8')[-2000:]}")
    context.say(f"policy {policy.name}: {policy.steps} steps in {time.monotonic() - start:.0f} s")
