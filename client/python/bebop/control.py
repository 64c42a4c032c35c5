# SPDX-License-Identifier: Apache-2.0
"""Pause, sleep, drain: what the admin port's Control service steers. Requests and the state it answers with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from bebop.requests import enum_value, speculation_params
from bebop.v1 import control_pb2, rollout_pb2


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How requests draft that leave it unset. `mode`: "off", "target_only", "rejection" or "coupled"; None where the server does not say."""

    mode: str | None
    num_draft_tokens: int | None


@dataclasses.dataclass(frozen=True)
class ControlState:
    """State of a server after a control call.

    sleeping: tags that gave their memory back, "weights" and "kv_cache". abort_epoch: counts the pauses that ended samples; a partial sample
    carries the epoch of its pause. aborted_samples: ended by this call.
    """

    paused: bool
    draining: bool
    sleeping: tuple[str, ...]
    speculation: Speculation
    abort_epoch: int
    aborted_samples: int
    running_requests: int
    waiting_requests: int

    @staticmethod
    def from_proto(message: control_pb2.ControlState) -> ControlState:
        params = message.speculation
        mode = rollout_pb2.SpeculationParams.Mode.Name(params.mode).lower() if params.mode else None
        speculation = Speculation(mode, params.num_draft_tokens if params.HasField("num_draft_tokens") else None)
        return ControlState(message.paused, message.draining, tuple(message.sleeping), speculation, message.abort_epoch, message.aborted_samples,
                            message.running_requests, message.waiting_requests)


def pause_request(mode: str = "keep", clear_cache: bool = False) -> control_pb2.PauseGenerationRequest:
    return control_pb2.PauseGenerationRequest(mode=enum_value("mode", mode, control_pb2.PauseGenerationRequest.Mode), clear_cache=clear_cache)


def tag_list(tags: str | Iterable[str]) -> list[str]:
    return [tags] if isinstance(tags, str) else list(tags)


def speculation_request(speculation: Mapping[str, Any] | str | None, num_draft_tokens: int | None) -> control_pb2.SetSpeculationRequest:
    given = {"mode": speculation} if speculation is None or isinstance(speculation, str) else dict(speculation)
    if num_draft_tokens is not None:
        given["num_draft_tokens"] = num_draft_tokens
    return control_pb2.SetSpeculationRequest(speculation=speculation_params(given))
