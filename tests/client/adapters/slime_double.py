# SPDX-License-Identifier: Apache-2.0
"""A double of what slime offers to a custom generate function: the arguments, the sample and the state of a rollout. slime is not on PyPI.

It knows the fields and calls that bebop.adapters.slime uses and is strict about them: lengths that must agree, log-probabilities that trainable
tokens must have, keys of meta_info that must be there.
"""

import asyncio
import dataclasses
import enum
import importlib
import inspect
import sys
import types
import uuid

REQUIRED_META = ("finish_reason", "weight_version", "prompt_tokens", "completion_tokens", "cached_tokens", "spec_accept_token_num",
                 "spec_draft_token_num", "spec_verify_ct", "e2e_latency", "queue_time")


def arguments(**more):
    return types.SimpleNamespace(**{
        "custom_generate_function_path": "bebop.adapters.slime.generate", "partial_rollout": False, "use_rollout_routing_replay": False,
        "rollout_temperature": 1.0, "rollout_top_p": 1.0, "rollout_top_k": -1, "rollout_max_response_len": 24, "rollout_stop": None,
        "rollout_stop_token_ids": None, "rollout_skip_special_tokens": False, **more})


def sampling_params(args):
    params = {"temperature": args.rollout_temperature, "top_p": args.rollout_top_p, "top_k": args.rollout_top_k,
              "max_new_tokens": args.rollout_max_response_len, "stop": args.rollout_stop, "stop_token_ids": args.rollout_stop_token_ids,
              "skip_special_tokens": args.rollout_skip_special_tokens, "no_stop_trim": True, "spaces_between_special_tokens": False}
    if args.rollout_top_p != 1.0:
        params["custom_params"] = {"return_top_p_token_ids": True}
    return params


class GenerateState:
    """One for the process, as in slime."""

    _only = None

    def __new__(cls, args):
        if cls._only is None:
            cls._only = super().__new__(cls)
            cls._only.aborted = False
        return cls._only


@dataclasses.dataclass
class Sample:
    class Status(enum.Enum):
        PENDING = "pending"
        COMPLETED = "completed"
        TRUNCATED = "truncated"
        ABORTED = "aborted"

    prompt: str = ""
    tokens: list = dataclasses.field(default_factory=list)
    multimodal_inputs: dict | None = None
    response: str = ""
    response_length: int = 0
    loss_mask: list | None = None
    rollout_log_probs: list | None = None
    weight_versions: list = dataclasses.field(default_factory=list)
    session_id: str | None = None
    status: Status = Status.PENDING
    spec: dict = dataclasses.field(default_factory=lambda: dict.fromkeys(("accepted", "drafted", "verifications", "tokens"), 0))

    def append_response_tokens(self, args, *, tokens, log_probs, trainable, meta_info, text):
        assert trainable and len(tokens) == len(log_probs) == meta_info["completion_tokens"]
        assert all(isinstance(token, int) for token in tokens) and all(isinstance(value, float) for value in log_probs)
        missing = [key for key in REQUIRED_META if key not in meta_info]
        assert not missing, missing
        self.tokens = self.tokens + tokens
        self.response += text
        self.response_length += len(tokens)
        self.loss_mask = (self.loss_mask or []) + [1] * len(tokens)
        self.rollout_log_probs = (self.rollout_log_probs or []) + log_probs
        self.weight_versions.append(meta_info["weight_version"])
        for ours, theirs in (("accepted", "spec_accept_token_num"), ("drafted", "spec_draft_token_num"), ("verifications", "spec_verify_ct"),
                             ("tokens", "completion_tokens")):
            self.spec[ours] += meta_info[theirs]
        self.status = {"length": Sample.Status.TRUNCATED, "abort": Sample.Status.ABORTED, "stop": Sample.Status.COMPLETED}[
            meta_info["finish_reason"]["type"]]


def install():
    """Makes the module importable that generate functions import GenerateState from."""
    for name in ("slime", "slime.rollout", "slime.rollout.sglang_rollout"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["slime.rollout.sglang_rollout"].GenerateState = GenerateState


async def generate_group(args, samples, evaluation=False, **params):
    """slime calls the function once a sample, side by side, each with its own copy of the parameters."""
    module, name = args.custom_generate_function_path.rsplit(".", 1)
    function = getattr(importlib.import_module(module), name)
    assert "evaluation" in inspect.signature(function).parameters
    for sample in samples:
        sample.session_id = sample.session_id or str(uuid.uuid4())
    return await asyncio.gather(*[function(args, sample, {**sampling_params(args), **params}, evaluation=evaluation) for sample in samples])
