# SPDX-License-Identifier: Apache-2.0
"""What the adapters have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bebop.results import SampleResult

# The tokens so far are valid, and the sample may be gone on with.
CUT_SHORT = frozenset({"ABORTED", "TIME_BUDGET", "SUPERSEDED", "WEIGHT_POLICY", "DRAINED"})


def refuse_non_finite(sample: SampleResult, request_id: str) -> None:
    """A policy that produces NaN will do so again: training on what came before it hides the failure."""
    if sample.finish.reason == "NON_FINITE":
        step = sample.weight_spans[-1].step if sample.weight_spans else "unknown"
        raise FloatingPointError(f"request {request_id}, sample {sample.sample_index}: the model produced a value that is not finite after "
                                 f"{len(sample.token_ids)} tokens, under weight step {step}")


def loaded_step(info: Any) -> int:
    """The highest target step of what weights.info() of a client or a fleet returned."""
    return max(one.target_step for one in info.values()) if isinstance(info, Mapping) else info.target_step
