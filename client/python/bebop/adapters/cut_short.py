# SPDX-License-Identifier: Apache-2.0
"""What the adapters make of samples that did not end by themselves."""

from __future__ import annotations

from bebop.results import SampleResult

# The tokens so far are valid, and the sample may be gone on with.
CUT_SHORT = frozenset({"ABORTED", "TIME_BUDGET", "SUPERSEDED", "WEIGHT_POLICY", "DRAINED"})


def refuse_non_finite(sample: SampleResult, request_id: str) -> None:
    """A policy that produces NaN will do so again: training on what came before it hides the failure."""
    if sample.finish.reason == "NON_FINITE":
        raise FloatingPointError(f"request {request_id}, sample {sample.sample_index}: the model produced a value that is not finite after "
                                 f"{len(sample.token_ids)} tokens, under weight step {sample.weight_spans[-1].step if sample.weight_spans else 'unknown'}")
