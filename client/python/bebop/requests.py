# SPDX-License-Identifier: Apache-2.0
"""Keyword arguments to request messages: one place for both clients. Values are checked by the server; names are checked here."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union

import numpy as np

from bebop.v1 import rollout_pb2

TokenIds = Union[Sequence[int], np.ndarray]

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")
_STOPPING = ("max_new_tokens", "min_new_tokens", "stop_token_ids", "stop", "ignore_eos")
_OUTPUT = ("prompt", "logprobs", "raw_logprobs", "entropy", "token_source", "draft_logprobs", "spec_detail", "stream_tokens")
_SPECULATION = ("mode", "num_draft_tokens", "synthetic_acceptance")
# Of all handles of one request together: what the server takes.
MAX_RESUME_BYTES = 32 << 20

_WEIGHTS = ("min_step", "wait_for_step", "max_step_spread", "on_update")


def _token_ids(name: str, ids: TokenIds) -> list[int]:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"{name}: expected a flat sequence of integers, got shape {array.shape} of {array.dtype}")
    if array.size and int(array.min()) < 0:
        raise ValueError(f"{name}: {int(array.min())} is negative")
    return array.tolist()


def _pick(name: str, given: Mapping[str, Any], allowed: Iterable[str]) -> dict[str, Any]:
    allowed = tuple(allowed)
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise TypeError(f"{name}: unknown field {unknown[0]!r}; known: {', '.join(allowed)}")
    return {key: value for key, value in given.items() if value is not None}


def enum_value(name: str, given: Any, names: Any) -> int:
    """The number of an enumeration's value, given by name in either case."""
    word = str(given).upper()
    if word not in names.keys()[1:]:
        raise ValueError(f"{name}: {given!r} is none of {', '.join(key.lower() for key in names.keys()[1:])}")
    return names.Value(word)


def speculation_params(speculation: Mapping[str, Any] | str) -> rollout_pb2.SpeculationParams:
    """From "off", "target_only", "rejection" or "coupled", or from dict(mode, num_draft_tokens, synthetic_acceptance)."""
    fields = {"mode": speculation} if isinstance(speculation, str) else _pick("speculation", speculation, _SPECULATION)
    if "mode" in fields:
        fields["mode"] = enum_value("speculation.mode", fields["mode"], rollout_pb2.SpeculationParams.Mode)
    return rollout_pb2.SpeculationParams(**fields)


def resume_handles(resume: Iterable[Any]) -> list[bytes]:
    """Handles of unfinished samples, given as bytes or as SampleResults."""
    handles = []
    for entry in resume:
        handle = entry if isinstance(entry, bytes) else getattr(entry, "resume_handle", entry)
        if handle is None:
            raise ValueError(f"resume: sample {entry.sample_index} has no resume_handle; it ended with {entry.finish.reason}")
        if not isinstance(handle, bytes):
            raise TypeError(f"resume: expected SampleResults or their resume_handle, got {type(entry).__name__}")
        handles.append(handle)
    return handles


def _batches(samples: Sequence[Any]) -> list[list[Any]]:
    """The samples, in order, in as few runs as MAX_RESUME_BYTES lets their handles be sent in."""
    batches: list[list[Any]] = []
    room = 0
    for sample, handle in zip(samples, resume_handles(samples)):
        if not batches or len(handle) > room:
            batches.append([])
            room = MAX_RESUME_BYTES
        batches[-1].append(sample)
        room -= len(handle)
    return batches


def resumed_requests(partial: Any, prompt_token_ids: TokenIds | None,
                     params: Mapping[str, Any]) -> tuple[list[rollout_pb2.GenerateRequest], list[Any]]:
    """The requests that go on with the unfinished samples of `partial`, and the samples that need none. One request, unless their handles are more
    than one may bring.

    A GroupResult brings its request along; of samples, prompt and parameters are the caller's to repeat.
    """
    samples = list(getattr(partial, "samples", partial))
    unfinished = [sample for sample in samples if sample.resume_handle is not None]
    ended = [sample for sample in samples if sample.resume_handle is None]
    before = getattr(partial, "request", None)
    if prompt_token_ids is None:
        if before is None:
            raise TypeError("resume_samples: single samples do not know their request; give prompt_token_ids and the parameters that it had")
        if params:
            raise TypeError(f"resume_samples: {sorted(params)[0]!r} is the group's own; the parameters must be as they were")
        common = rollout_pb2.GenerateRequest()
        common.CopyFrom(before)
        common.request_id = uuid.uuid4().hex
    else:
        common = generate_request(prompt_token_ids, **params)
    del common.resume[:]
    requests = []
    for i, batch in enumerate(_batches(unfinished)):
        request = rollout_pb2.GenerateRequest()
        request.CopyFrom(common)
        if i > 0:  # the same for the same, so that repeats of a caller's own id find theirs
            request.request_id = uuid.uuid5(uuid.NAMESPACE_OID, f"{common.request_id}/{i}").hex
        request.num_samples = len(batch)
        request.resume.extend(resume_handles(batch))
        requests.append(request)
    return requests, ended


def generate_request(prompt_token_ids: TokenIds, *, n: int = 1, request_id: str | None = None, sampling: Mapping[str, Any] | None = None,
                     stopping: Mapping[str, Any] | None = None, speculation: Mapping[str, Any] | str | None = None, priority: int | None = None,
                     prompt: bool = False, logprobs: bool = False, raw_logprobs: bool = False, entropy: bool = False,
                     token_source: bool = False, draft_logprobs: bool = False, spec_detail: bool = False, stream_tokens: bool = False,
                     weights: Mapping[str, Any] | None = None, detach: bool = False, resume: Iterable[Any] = (), **more: Any) -> rollout_pb2.GenerateRequest:
    """`more` takes the fields of `sampling` and `stopping` directly: temperature=0.7, max_new_tokens=64, ..."""
    sampling, stopping = dict(sampling or {}), dict(stopping or {})
    # max_new_tokens and its kin are often written among the sampling parameters.
    for source in (more, {key: sampling.pop(key) for key in _STOPPING if key in sampling}):
        for key, value in source.items():
            target = sampling if key in _SAMPLING else stopping if key in _STOPPING else None
            if target is None:
                raise TypeError(f"generate: unknown argument {key!r}; known: n, timeout, request_id, priority, speculation, weights, detach, resume, "
                                f"{', '.join(_OUTPUT)}, "
                                f"{', '.join(_SAMPLING + _STOPPING)}")
            if key in target:
                raise TypeError(f"generate: {key} is given twice")
            target[key] = value
    request = rollout_pb2.GenerateRequest(
        # An id of our own makes the call safe to repeat: the server attaches a repeat to the request it already has.
        request_id=request_id or uuid.uuid4().hex, prompt_token_ids=_token_ids("prompt_token_ids", prompt_token_ids), num_samples=n,
        detach=detach, resume=resume_handles(resume),
        output=rollout_pb2.OutputParams(prompt=prompt, logprobs=logprobs, raw_logprobs=raw_logprobs, entropy=entropy, token_source=token_source,
                                        draft_logprobs=draft_logprobs, spec_detail=spec_detail, stream_tokens=stream_tokens))
    if priority is not None:
        request.priority = priority
    request.sampling.CopyFrom(rollout_pb2.SamplingParams(**_pick("sampling", sampling, _SAMPLING)))
    stops = _pick("stopping", stopping, _STOPPING)
    if isinstance(stops.get("stop"), str):
        stops["stop"] = [stops["stop"]]
    request.stopping.CopyFrom(rollout_pb2.StoppingParams(**stops))
    if speculation is not None:
        request.speculation.CopyFrom(speculation_params(speculation))
    if weights is not None:
        fields = _pick("weights", weights, _WEIGHTS)
        if "on_update" in fields:
            fields["on_update"] = enum_value("weights.on_update", fields["on_update"], rollout_pb2.WeightParams.OnUpdate)
        request.weights.CopyFrom(rollout_pb2.WeightParams(**fields))
    return request


def score_request(sequences: Sequence[TokenIds], *, score_start: int = 0, temperature: float | None = None, top_logprobs: int = 0,
                  token_ids_logprob: Sequence[int] = (), entropy: bool = False, draft_depth: int = 0) -> rollout_pb2.ScoreRequest:
    request = rollout_pb2.ScoreRequest(score_start=score_start, temperature=temperature, top_logprobs=top_logprobs,
                                       token_ids_logprob=list(token_ids_logprob), entropy=entropy, draft_depth=draft_depth)
    for i, ids in enumerate(sequences):
        request.sequences.add(token_ids=_token_ids(f"sequences[{i}]", ids))
    return request
