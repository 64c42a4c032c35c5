# SPDX-License-Identifier: Apache-2.0
"""The reinforcement-learning part as two stages: policies, online updates and decoding; then tables and plots. Wants trained heads.

    work/rl/POLICY/policy/        what the example kept: checkpoints, rollouts, manifest.json
    work/rl/POLICY/data/          the rollouts that online heads are updated on
    work/rl/POLICY/heads/ARM/     online heads by version
    work/records/rl.jsonl         a line a decoding

Both may be called again: what is there is kept.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import harness
import measures
import rl_analyse
import rl_replay
import rl_run
import workloads
from settings import Context

STAGE = "rl"


def check_same(context: Context, settings: rl_run.RlSettings) -> None:
    """Refuses a folder of other settings: records of two settings must not mix."""
    path = context.work / "rl/settings.json"
    now = json.loads(json.dumps(dataclasses.asdict(settings)))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    before = json.loads(path.read_text(encoding="utf-8"))
    for name in sorted(set(before) | set(now)):
        if before.get(name) != now.get(name):
            raise ValueError(f"{path.parent}: was made with {name} = {before.get(name)}, now it is {now.get(name)}; remove it and records/{STAGE}.jsonl")


def measure(context: Context) -> None:
    """All that is not there yet. Does nothing for a model that the learner example cannot train."""
    if context.model != rl_run.MODEL:
        context.say(f"rl: left out, the learner example trains {rl_run.MODEL} alone")
        return
    settings = rl_run.settings_of(context)
    check_same(context, settings)
    for policy in settings.policies:
        rl_run.run(context, policy)
        rl_replay.update_all(context, settings, policy)
    store = harness.Store(measures.records_path(context, STAGE))
    try:
        rl_replay.decode_all(context, settings, store)
    finally:
        store.close()


def analyse(context: Context, out: Path) -> tuple[dict[str, Any], dict[str, str], list[Path]]:
    """(numbers, tables in Markdown by name, plots) of what was measured; plots are written to `out`. ValueError: a policy is not there."""
    settings = rl_run.settings_of(context)
    manifests = {policy.name: rl_run.manifest_of(context, policy) for policy in settings.policies}
    missing = [name for name, manifest in manifests.items() if manifest is None]
    if missing:
        raise ValueError(f"policy {missing[0]} has not been trained to its end; run the stage {STAGE}")
    records, decoded = (harness.read_records(measures.records_path(context, stage)) for stage in (STAGE, "decode"))
    return rl_analyse.report(records, decoded, manifests, workloads.IN_DOMAIN, out)
