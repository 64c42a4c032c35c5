# SPDX-License-Identifier: Apache-2.0
"""Results as plain objects with numpy arrays. Per-token arrays have the length of `token_ids`, or are None when they were not asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from bebop.v1 import rollout_pb2


def _array(values, dtype, wanted: bool = True) -> np.ndarray | None:
    return np.fromiter(values, dtype=dtype, count=len(values)) if wanted else None


@dataclasses.dataclass(frozen=True)
class Finish:
    """Why a sample ended.

    `reason`: STOP (an end-of-sequence id, a stop id or a stop string), LENGTH (max_new_tokens), ABORTED (by abort or a pause), TIME_BUDGET,
    SUPERSEDED (new weights came and no mixture is wanted), WEIGHT_POLICY (max_step_spread), DRAINED (the server shut down), NON_FINITE.
    """

    reason: str
    stop_token_id: int | None = None
    stop_string: str | None = None


@dataclasses.dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    preemptions: int
    recomputed_tokens: int


@dataclasses.dataclass(frozen=True)
class SpecStats:
    """Exact counts of drafting and verification. Arrays are indexed by draft position (0 = first draft)."""

    num_spec_steps: int
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    num_trimmed_tokens: int
    drafted_per_pos: np.ndarray
    accepted_per_pos: np.ndarray
    overlap_per_pos: np.ndarray | None

    @property
    def accept_length(self) -> float:
        """Tokens a verification emits on average: 1 + accepted / verifications; nan without any."""
        return 1.0 + self.num_accepted_draft_tokens / self.num_spec_steps if self.num_spec_steps else float("nan")

    @property
    def acceptance_per_pos(self) -> np.ndarray:
        """alpha_i = accepted_per_pos / drafted_per_pos; nan where nothing was drafted."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.accepted_per_pos / self.drafted_per_pos


@dataclasses.dataclass(frozen=True)
class WeightSpan:
    """Tokens [start, end) were sampled under target version `step`, drafted under `draft_step`."""

    step: int
    label: str | None
    draft_step: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds."""

    queue: float
    prefill: float
    decode: float
    ttft: float
    e2e: float


@dataclasses.dataclass(frozen=True)
class SampleResult:
    """One finished sample of a group.

    token_ids: int64 [T], what torch and numpy index with. logprobs, raw_logprobs, entropy, draft_logprobs: float32 [T] or None.
    token_source: int32 [T] or None: 0 plain, d >= 1 accepted draft at depth d, -1 corrected, -2 bonus.
    """

    sample_index: int
    seed_used: int
    token_ids: np.ndarray
    logprobs: np.ndarray | None
    raw_logprobs: np.ndarray | None
    entropy: np.ndarray | None
    token_source: np.ndarray | None
    draft_logprobs: np.ndarray | None
    finish: Finish
    usage: Usage
    spec: SpecStats
    weight_spans: tuple[WeightSpan, ...]
    timing: Timing
    applied: Any  # the protobuf message AppliedParams: the parameters actually used
    # Some token was sampled with keys, values or states computed under other weights than its own.
    kv_mixed: bool = False
    # Of a sample that was cut short: what generate(resume=...) goes on from, on any replica. None: it has ended.
    resume_handle: bytes | None = dataclasses.field(default=None, repr=False)
    # With ABORTED by a pause: the ControlState.abort_epoch of that pause; else 0.
    abort_epoch: int = 0

    @property
    def finished(self) -> bool:
        """False for a sample that was cut short and can be resumed."""
        return self.resume_handle is None

    @property
    def weight_steps(self) -> np.ndarray:
        """int64 [T]: the target version of every token."""
        steps = np.empty(len(self.token_ids), dtype=np.int64)
        for span in self.weight_spans:
            steps[span.start:span.end] = span.step
        return steps

    def to_sglang_meta_info(self) -> dict[str, Any]:
        """The `meta_info` that SGLang's /generate returns, with the keys that slime reads."""
        kinds = {"STOP": {"type": "stop", "matched": self.finish.stop_string or self.finish.stop_token_id},
                 "LENGTH": {"type": "length", "length": len(self.token_ids)}}
        return {
            "id": str(self.sample_index),
            "finish_reason": kinds.get(self.finish.reason, {"type": "abort", "message": self.finish.reason}),
            "weight_version": str(self.weight_spans[-1].step) if self.weight_spans else None,
            "prompt_tokens": self.usage.prompt_tokens,
            "completion_tokens": self.usage.completion_tokens,
            "cached_tokens": self.usage.cached_tokens,
            "e2e_latency": self.timing.e2e,
            "queue_time": self.timing.queue,
            "spec_verify_ct": self.spec.num_spec_steps,
            "spec_accept_token_num": self.spec.num_accepted_draft_tokens,
            "spec_draft_token_num": self.spec.num_draft_tokens,
            "output_token_logprobs": None if self.logprobs is None
            else [(float(value), int(token), None) for value, token in zip(self.logprobs, self.token_ids)],
        }

    def to_vllm_choice(self) -> dict[str, Any]:
        """A choice as vLLM's OpenAI server returns it, with token ids."""
        reasons = {"STOP": "stop", "LENGTH": "length"}
        return {
            "index": self.sample_index,
            "token_ids": self.token_ids.tolist(),
            "finish_reason": reasons.get(self.finish.reason, "abort"),
            "stop_reason": self.finish.stop_string or self.finish.stop_token_id,
            "weight_versions": [{"version": str(span.step), "start": span.start, "end": span.end} for span in self.weight_spans],
            "logprobs": None if self.logprobs is None else {"token_logprobs": self.logprobs.tolist()},
        }

    def to_tinker(self) -> dict[str, Any]:
        """A sequence of a Tinker sample response: tokens, logprobs, stop_reason."""
        return {"tokens": self.token_ids.tolist(), "logprobs": None if self.logprobs is None else self.logprobs.tolist(),
                "stop_reason": "length" if self.finish.reason == "LENGTH" else "stop"}

    @staticmethod
    def from_proto(message: rollout_pb2.SampleResult, output: rollout_pb2.OutputParams | None = None) -> SampleResult:
        """`output` tells an array that was not asked for from one that is empty; None: absent arrays of a sample with tokens are None."""
        has_tokens = len(message.token_ids) > 0

        def values(name: str, dtype, flag: str) -> np.ndarray | None:
            field = getattr(message, name)
            return _array(field, dtype, getattr(output, flag) if output is not None and not has_tokens else len(field) > 0)

        matched = message.finish.WhichOneof("matched")
        finish = Finish(rollout_pb2.Finish.Reason.Name(message.finish.reason), **({matched: getattr(message.finish, matched)} if matched else {}))
        spec, usage, timing = message.spec, message.usage, message.timing
        return SampleResult(
            sample_index=message.sample_index, seed_used=message.seed_used, token_ids=_array(message.token_ids, np.int64),
            logprobs=values("logprobs", np.float32, "logprobs"), raw_logprobs=values("raw_logprobs", np.float32, "raw_logprobs"),
            entropy=values("entropy", np.float32, "entropy"), token_source=values("token_source", np.int32, "token_source"),
            draft_logprobs=values("draft_logprobs", np.float32, "draft_logprobs"), finish=finish,
            usage=Usage(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, usage.preemptions, usage.recomputed_tokens),
            spec=SpecStats(spec.num_spec_steps, spec.num_draft_tokens, spec.num_accepted_draft_tokens, spec.num_trimmed_tokens,
                           _array(spec.drafted_per_pos, np.int32), _array(spec.accepted_per_pos, np.int32),
                           _array(spec.overlap_per_pos, np.float64, len(spec.overlap_per_pos) > 0)),
            weight_spans=tuple(WeightSpan(span.step, span.label if span.HasField("label") else None, span.draft_step, span.start, span.end)
                               for span in message.weight_spans),
            timing=Timing(timing.queue, timing.prefill, timing.decode, timing.ttft, timing.e2e), applied=message.applied,
            kv_mixed=message.kv_mixed, resume_handle=message.resume_handle or None, abort_epoch=message.abort_epoch)


@dataclasses.dataclass(frozen=True)
class GroupResult:
    """The samples of one prompt, in order of sample_index."""

    request_id: str
    samples: tuple[SampleResult, ...]
    prompt_token_ids: np.ndarray | None = None
    request: Any = dataclasses.field(default=None, repr=False)  # the protobuf message GenerateRequest, for resume_samples

    @property
    def unfinished(self) -> tuple[SampleResult, ...]:
        """Samples that were cut short and can be resumed."""
        return tuple(sample for sample in self.samples if not sample.finished)

    @staticmethod
    def from_proto(message: rollout_pb2.GenerateResult, request: rollout_pb2.GenerateRequest | None = None) -> GroupResult:
        output = request.output if request is not None else None
        samples = (SampleResult.from_proto(sample, output) for sample in message.samples)
        return GroupResult(message.request_id, tuple(sorted(samples, key=lambda sample: sample.sample_index)),
                           _array(message.prompt_token_ids, np.int64, len(message.prompt_token_ids) > 0), request)

    @staticmethod
    def merged(partial: GroupResult | Iterable[SampleResult], groups: Sequence[GroupResult], ended: Iterable[SampleResult]) -> GroupResult:
        """The whole group: what requests have gone on with (`groups`), and the samples of `partial` that had ended."""
        if not groups:
            return partial if isinstance(partial, GroupResult) else GroupResult("", tuple(ended))
        samples = [*ended, *(sample for group in groups for sample in group.samples)]
        return dataclasses.replace(groups[0], samples=tuple(sorted(samples, key=lambda sample: sample.sample_index)))


@dataclasses.dataclass(frozen=True)
class Admitted:
    """Stream event: the group left the queue."""

    request_id: str


@dataclasses.dataclass(frozen=True)
class TokenChunk:
    """Stream event: tokens [start, start + len(token_ids)) of a running sample."""

    sample_index: int
    start: int
    token_ids: np.ndarray
    logprobs: np.ndarray | None

    @staticmethod
    def from_proto(message: rollout_pb2.TokenChunk) -> TokenChunk:
        return TokenChunk(message.sample_index, message.start, _array(message.token_ids, np.int64),
                          _array(message.logprobs, np.float32, len(message.logprobs) > 0))


@dataclasses.dataclass(frozen=True)
class DraftScore:
    """One recurrent MTP step, teacher-forced, for positions start .. T-1; float32 arrays of one length."""

    depth: int
    start: int
    logprobs: np.ndarray
    overlap: np.ndarray
    argmax_prob: np.ndarray
    entropy: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class SequenceScore:
    """Teacher-forced values for positions max(score_start, 1) .. T-1 of one sequence; float32 arrays."""

    logprobs: np.ndarray
    entropy: np.ndarray | None
    top_token_ids: tuple[np.ndarray, ...] | None
    top_logprobs: tuple[np.ndarray, ...] | None
    token_ids_logprobs: np.ndarray | None  # [positions, len(token_ids_logprob)]
    draft: tuple[DraftScore, ...]
    weight_step: int

    @staticmethod
    def from_proto(message: rollout_pb2.SequenceScore) -> SequenceScore:
        top = message.top_logprobs
        chosen = message.token_ids_logprobs
        return SequenceScore(
            logprobs=_array(message.logprobs, np.float32), entropy=_array(message.entropy, np.float32, len(message.entropy) > 0),
            top_token_ids=tuple(_array(entry.token_ids, np.int64) for entry in top) if top else None,
            top_logprobs=tuple(_array(entry.logprobs, np.float32) for entry in top) if top else None,
            token_ids_logprobs=np.stack([_array(entry.logprobs, np.float32) for entry in chosen]) if chosen else None,
            draft=tuple(DraftScore(entry.depth, entry.start, _array(entry.logprobs, np.float32), _array(entry.overlap, np.float32),
                                   _array(entry.argmax_prob, np.float32), _array(entry.entropy, np.float32, len(entry.entropy) > 0))
                        for entry in message.draft),
            weight_step=message.weight_step)
