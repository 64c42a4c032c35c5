# SPDX-License-Identifier: Apache-2.0
"""slime: samples come from bebop servers.

    --custom-generate-function-path bebop.adapters.slime.generate --custom-config-path bebop.yaml

with bebop.yaml, whose keys slime adds to its arguments:

    bebop_servers: ["node1:50051,node1:50052", "node2:50051,node2:50052"]   # rollout and admin ports
    bebop_token_file: /run/secrets/bebop                                    # optional: its first line is the bearer token

A sample is one request; those of one session go to the same server. Prompts are tokenized, and responses turned into text, by the server, which
has the checkpoint's tokenizer. slime sends new weights to its own SGLang engines only: whoever writes the checkpoint must also bring it to the
servers, with client.weights.update_from_path or `bebop weights update`.

slime is not on PyPI: this is tested with a double of what slime offers to such a function.
"""

from __future__ import annotations

import asyncio
import uuid
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import bebop
from bebop.adapters.common import refuse_non_finite

_ABORT_POLL_SECONDS = 0.1
# For servers to answer an abort. One that is gone must not hold up the samples of the others.
_ABORT_SECONDS = 2.0
# What slime sends to SGLang and what has the same effect here without being said: stop tokens and strings are always kept.
_IMPLIED = {"no_stop_trim": True, "spaces_between_special_tokens": False}
_SAME_NAME = ("temperature", "top_p", "min_p", "stop", "stop_token_ids", "min_new_tokens", "ignore_eos")

# Connections belong to an event loop.
_fleets: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Any, bebop.AsyncFleet]] = weakref.WeakKeyDictionary()


def fleet_of(args: Any) -> bebop.AsyncFleet:
    """The servers of bebop.yaml, connected once in each event loop."""
    servers = getattr(args, "bebop_servers", None)
    if not servers:
        raise ValueError("bebop_servers: not given; add it to the file of --custom-config-path")
    servers = (servers,) if isinstance(servers, str) else tuple(servers)
    key = (servers, getattr(args, "bebop_token_file", None))
    loop = asyncio.get_running_loop()
    if loop not in _fleets or _fleets[loop][0] != key:
        addresses = [tuple(part.strip() for part in server.split(",")) if "," in server else server for server in servers]
        _fleets[loop] = (key, bebop.AsyncFleet(addresses, token_file=key[1]))
    return _fleets[loop][1]


def generate_params(args: Any, sampling_params: dict[str, Any], evaluation: bool) -> dict[str, Any]:
    """slime's (SGLang's) sampling parameters as bebop's; what would change the samples, and is not there, is refused."""
    if getattr(args, "use_rollout_routing_replay", False):
        raise ValueError("use_rollout_routing_replay: bebop returns no routed experts")
    given = dict(sampling_params)
    given.pop("skip_special_tokens", None)  # of the text only
    custom = given.pop("custom_params", None) or {}
    if custom and not evaluation:
        raise ValueError(f"sampling_params.custom_params: {sorted(custom)}: bebop does not return the ids that top-p kept, without which ratios of "
                         "truncated samples are wrong; train with --rollout-top-p 1.0")
    for name, value in _IMPLIED.items():
        if given.pop(name, value) != value:
            raise ValueError(f"sampling_params.{name}: bebop always behaves as with {value}")
    params = {name: value for name in _SAME_NAME if (value := given.pop(name, None)) is not None}
    if (top_k := given.pop("top_k", None)) is not None:
        params["top_k"] = max(0, top_k)  # SGLang's "all" is -1
    if (seed := given.pop("sampling_seed", None)) is not None:
        params["seed"] = seed
    params["max_new_tokens"] = given.pop("max_new_tokens")
    if given:
        raise ValueError(f"sampling_params: bebop has no {sorted(given)[0]!r}")
    return params


async def _until_aborted(call: Awaitable[Any], aborted: Callable[[], bool], abort: Callable[[], Awaitable[Any]]) -> Any:
    """The call's result. Once slime wants no more, the call is told to end with what it has."""
    task = asyncio.ensure_future(call)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_ABORT_POLL_SECONDS)
            if not task.done() and aborted():
                await abort()
        return task.result()
    finally:
        task.cancel()


async def _abort(fleet: bebop.AsyncFleet, request_id: str) -> None:
    """Ends a request, which is on one of the servers: it is enough that some answer."""
    try:
        await fleet.abort(request_id, timeout=_ABORT_SECONDS)
    except bebop.FleetError as error:
        if not error.results:
            raise


async def generate(args: Any, sample: Any, sampling_params: dict[str, Any], evaluation: bool = False) -> Any:
    """slime's custom generate function: extends `sample` by one response, or goes on with one that was aborted (--partial-rollout)."""
    if any(value is not None for value in (sample.multimodal_inputs or {}).values()):
        raise ValueError("sample.multimodal_inputs: bebop serves text")
    params = generate_params(args, sampling_params, evaluation)
    fleet = fleet_of(args)
    if not sample.tokens:
        if not isinstance(sample.prompt, str):
            raise TypeError(f"sample.prompt: {type(sample.prompt).__name__}, but bebop takes text; use --apply-chat-template")
        sample.tokens = await fleet.tokenize(sample.prompt, parse_special=True)
    params["max_new_tokens"] -= sample.response_length
    if params["max_new_tokens"] <= 0:
        sample.status = type(sample).Status.TRUNCATED
        return sample
    request_id = uuid.uuid4().hex
    call = fleet.generate(sample.tokens, request_id=request_id, affinity=sample.session_id, logprobs=True, **params)
    if getattr(args, "partial_rollout", False):
        # Without it slime cancels this coroutine, and with it the request.
        from slime.rollout.sglang_rollout import GenerateState

        group = await _until_aborted(call, lambda: GenerateState(args).aborted, lambda: _abort(fleet, request_id))
    else:
        group = await call
    result = group.samples[0]
    refuse_non_finite(result, request_id)
    tokens = result.token_ids.tolist()
    text = await fleet.detokenize(tokens, skip_special=bool(sampling_params.get("skip_special_tokens", False))) if tokens else ""
    sample.append_response_tokens(args, tokens=tokens, log_probs=result.logprobs.tolist(), trainable=True, meta_info=result.to_sglang_meta_info(),
                                  text=text)
    return sample
