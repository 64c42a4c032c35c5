# SPDX-License-Identifier: Apache-2.0
"""The reinforcement-learning part as two stages: policies, online updates and decoding; then tables and plots. Wants trained heads.

    work/rl/POLICY/policy/        what the example kept: checkpoints, rollouts, manifest.json
    work/rl/POLICY/data/          the rollouts that online heads are updated on
    work/rl/POLICY/heads/ARM/     online heads by version
    work/records/rl.jsonl         a line a decoding

Both may be called again: what is there is kept.
"""

from __future__ import annotations

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


def measure(context: Context) -> None:
    """All that is not there yet. Does nothing for a model that the learner example cannot train."""
    if context.model != rl_run.MODEL:
        context.say(f"rl: left out, the learner example trains {rl_run.MODEL} alone")
        return
    settings = rl_run.settings_of(context)
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
    records, decoded = (rl_analyse.read(measures.records_path(context, stage)) for stage in (STAGE, "decode"))
    return rl_analyse.report(records, decoded, manifests, workloads.IN_DOMAIN, out)
