# SPDX-License-Identifier: Apache-2.0
"""Several replicas of one model as one: requests go to whichever can take them, control and weights to all.

    with bebop.Fleet([("node1:50051", "node1:50052"), ("node2:50051", "node2:50052")]) as fleet:
        group = fleet.generate(prompt, n=8, max_new_tokens=512)
        fleet.weights.update(model.state_dict(), step=1)

Rotation. A replica that cannot be reached, drains, or may have other weights than it should is taken out of rotation. It comes back when it
answers and its weights are those of a replica in rotation; with none left, when its step is no lower than the last one known.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Union

from bebop import requests
from bebop.aio import AsyncClient
from bebop.aio import side_by_side as side_by_side_async
from bebop.client import Client, Event, side_by_side
from bebop.control import ControlState
from bebop.errors import BebopError
from bebop.fleet_state import PROBE_SECONDS, FleetError, FleetUpdateError, Replica, Rotation, UpdateStages, clients_of, split
from bebop.results import GroupResult, SampleResult, SequenceScore
from bebop.transport import Deadline
from bebop.v1 import rollout_pb2, weights_pb2
from bebop.weight_plan import NamedTensors, UpdateOptions, UpdatePlan, UpdateResult, WeightCheck, WeightInfo, path_options
from bebop.weights import push_all, push_all_async

# How long a call to all replicas tries to reach one: what is gone should not hold up those that are there.
_CONNECT_SECONDS = 2.0
_SETTLE_SECONDS = 5.0

Address = Union[str, tuple[str, Union[str, None]]]


class _FleetBase:
    """What both fleets share: the replicas and what is passed on when pickled."""

    _kind: type

    def __init__(self, replicas: Sequence[Any], *, balance: str = "least_loaded", **options: Any):
        """
        Args:
          replicas: addresses "host:port", pairs (rollout, admin), or clients.
          balance: "least_loaded", by the samples that this fleet has running, or "round_robin".
          options: of the clients that are made here: tls, token, token_file, timeout, retry.
        """
        self._setup(clients_of(self._kind, replicas, options), balance)

    def _setup(self, replicas: list[Replica], balance: str) -> None:
        self._balance = balance
        self._rotation = Rotation(replicas, balance)
        self._timeout = replicas[0].client._timeout
        self._retry = replicas[0].client._retry

    def __getstate__(self):
        return [replica.client for replica in self._rotation.replicas], self._balance

    def __setstate__(self, state):
        clients, balance = state
        self._setup(clients_of(self._kind, clients, {}), balance)

    def __repr__(self) -> str:
        return f"bebop.{type(self).__name__}({self.addresses!r})"

    @property
    def addresses(self) -> list[str]:
        return [replica.address for replica in self._rotation.replicas]

    @property
    def clients(self) -> list[Any]:
        return [replica.client for replica in self._rotation.replicas]

    @property
    def in_rotation(self) -> list[str]:
        """Addresses that get requests now."""
        return [replica.address for replica in self._rotation.replicas if replica.ready]

    def _briefly(self, client: Any) -> Any:
        """`client`, which soon gives up on a server that cannot be reached."""
        retry = client._retry
        return client if retry is None else client._with_retry(dataclasses.replace(retry, connect_seconds=min(retry.connect_seconds, _CONNECT_SECONDS)))

    def _note(self, outcomes: Mapping[str, Any]) -> tuple[dict[str, BebopError], dict[str, Any]]:
        """Errors and results by address; who could not be reached is taken out of rotation."""
        errors, results = split(outcomes)
        for replica in self._rotation.replicas:
            if replica.address in errors and errors[replica.address].code == "UNAVAILABLE":
                self._rotation.suspend(replica)
        return errors, results

    def _results(self, what: str, outcomes: Mapping[str, Any]) -> dict[str, Any]:
        errors, results = self._note(outcomes)
        if errors:
            raise FleetError(what, errors, results)
        return results

    def _infos(self, outcomes: Mapping[str, Any], update_id: str) -> dict[str, WeightInfo]:
        """What an update begins with: an answer of every replica."""
        errors, infos = self._note(outcomes)
        if errors:
            raise FleetUpdateError("start", errors, infos, {address: infos.get(address) for address in outcomes}, update_id)
        return infos

    def _give_up_or_wait(self, error: BebopError | None, attempt: int, deadline: Deadline) -> float:
        """Seconds until all are tried again; raises when no repeat can help."""
        if error is None or error.reason == "DRAINING":  # others may come back
            error = self._rotation.why_none()
        delay = self._retry.delay(error, attempt, deadline.elapsed()) if self._retry else None
        if delay is None or not deadline.allows(delay):
            raise error
        return delay


class Fleet(_FleetBase):
    """Several servers as one: the methods of Client. Thread safe; a context manager; can be pickled.

    generate, generate_stream, score: one replica each. A replica that is unreachable, drains or has a full queue is passed over, unless something
    was delivered already. With affinity="..." the same replica as long as it is in rotation, however full it is. That saves no computation: servers
    keep no cache from one request to the next.
    pause, resume, sleep, ...: every replica; results by address. FleetError when some failed, after all were asked; one that cannot be reached is
    tried for 2 s. To go on without it, make a fleet of the others' clients.
    weights.update: every replica; all or, if one fails before the last step, none.
    """

    _kind = Client

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Closes every client, those that were given included."""
        for client in self.clients:
            client.close()

    @property
    def weights(self) -> FleetWeights:
        """New weights for every replica."""
        return FleetWeights(self)

    # ---- one replica ----

    def _pick(self, affinity: str | None, tried: Iterable[Replica]) -> Replica | None:
        due, ready = self._rotation.due()
        if due:
            answers = _each(due + ready, lambda client: _version(client, PROBE_SECONDS))
            found = {replica: answers[replica.address] for replica in due + ready if not isinstance(answers[replica.address], BebopError)}
            self._rotation.judge({replica: found[replica] for replica in due if replica in found},
                                 [found[replica] for replica in ready if replica in found])
        return self._rotation.pick(affinity, tried)

    def _route(self, send: Callable[[Client, float | None], Any], samples: int, affinity: str | None, timeout: float | None) -> Any:
        deadline = Deadline(self._timeout if timeout is None else timeout)
        tried: list[Replica] = []
        error: BebopError | None = None
        attempt = 0
        while True:
            replica = self._pick(affinity, tried)
            if replica is None:
                attempt += 1
                time.sleep(self._give_up_or_wait(error, attempt, deadline))
                tried = []
                continue
            try:
                with self._rotation.using(replica, samples):
                    return send(replica.client, deadline.remaining())
            except BebopError as failure:
                if not self._rotation.failed(replica, failure):
                    raise
                error = failure
                # The same replica was asked for: a full queue is waited for.
                tried = self._rotation.replicas if affinity is not None and failure.code == "RESOURCE_EXHAUSTED" else [*tried, replica]

    def generate(self, prompt_token_ids: requests.TokenIds, *, n: int = 1, affinity: str | None = None, timeout: float | None = None,
                 **params: Any) -> GroupResult:
        """As Client.generate, on one replica."""
        request = requests.generate_request(prompt_token_ids, n=n, **params)
        return self._generate(request, affinity, timeout)

    def resume_samples(self, partial: GroupResult | Iterable[SampleResult], prompt_token_ids: requests.TokenIds | None = None, *,
                       affinity: str | None = None, timeout: float | None = None, **params: Any) -> GroupResult:
        """As Client.resume_samples, on any replica."""
        resumed, ended = requests.resumed_requests(partial, prompt_token_ids, params)
        return GroupResult.merged(partial, side_by_side(lambda request: self._generate(request, affinity, timeout), resumed), ended)

    def _generate(self, request: rollout_pb2.GenerateRequest, affinity: str | None, timeout: float | None) -> GroupResult:
        def send(client: Client, remaining: float | None):
            return client._call(client._rollout.Generate, request, remaining, retry=None)

        return GroupResult.from_proto(self._route(send, request.num_samples, affinity, timeout), request)

    def generate_stream(self, prompt_token_ids: requests.TokenIds, *, n: int = 1, affinity: str | None = None, timeout: float | None = None,
                        **params: Any) -> Iterator[Event]:
        """As Client.generate_stream. Another replica is tried only while nothing was delivered."""
        params.setdefault("request_id", uuid.uuid4().hex)

        def begin(client: Client, remaining: float | None):
            stream = client.generate_stream(prompt_token_ids, n=n, timeout=remaining, **params)
            return client, stream, next(stream, None)  # the first event tells that the replica took it

        client, stream, first = self._route(begin, n, affinity, timeout)
        replica = next(replica for replica in self._rotation.replicas if replica.client is client)
        with self._rotation.using(replica, n), contextlib.closing(stream):
            if first is not None:
                yield first
                yield from stream

    def score(self, sequences: Sequence[requests.TokenIds], *, affinity: str | None = None, timeout: float | None = None,
              **params: Any) -> list[SequenceScore]:
        """As Client.score, on one replica."""
        request = requests.score_request(sequences, **params)

        def send(client: Client, remaining: float | None):
            return client._call(client._rollout.Score, request, remaining, retry=None)

        return [SequenceScore.from_proto(score) for score in self._route(send, len(request.sequences), affinity, timeout).scores]

    def tokenize(self, text: str, *, parse_special: bool = False, timeout: float | None = None) -> list[int]:
        """As Client.tokenize."""
        return self._route(lambda client, remaining: client._once().tokenize(text, parse_special=parse_special, timeout=remaining), 0, None, timeout)

    def detokenize(self, token_ids: requests.TokenIds, *, skip_special: bool = False, timeout: float | None = None) -> str:
        """As Client.detokenize."""
        return self._route(lambda client, remaining: client._once().detokenize(token_ids, skip_special=skip_special, timeout=remaining), 0, None, timeout)

    def model_info(self, *, timeout: float | None = None):
        """As Client.model_info, of one replica."""
        return self._route(lambda client, remaining: client._once().model_info(timeout=remaining), 0, None, timeout)

    # ---- every replica ----

    def _all(self, what: str, call: Callable[[Client], Any]) -> dict[str, Any]:
        return self._results(what, self._ask(call))

    def _ask(self, call: Callable[[Client], Any]) -> dict[str, Any]:
        return _each(self._rotation.replicas, lambda client: call(self._briefly(client)))

    def abort(self, request_ids: str | Sequence[str], *, timeout: float | None = None) -> list[str]:
        """As Client.abort, wherever the requests are."""
        answers = self._all("abort", lambda client: client.abort(request_ids, timeout=timeout))
        return sorted({request_id for ids in answers.values() for request_id in ids})

    def pause(self, mode: str = "keep", *, clear_cache: bool = False, timeout: float | None = None) -> dict[str, ControlState]:
        """As Client.pause, on every replica; by address."""
        return self._all("pause", lambda client: client.pause(mode, clear_cache=clear_cache, timeout=timeout))

    def resume(self, *, timeout: float | None = None) -> dict[str, ControlState]:
        """As Client.resume, on every replica; by address."""
        return self._all("resume", lambda client: client.resume(timeout=timeout))

    def sleep(self, tags: str | Iterable[str] = (), *, timeout: float | None = None) -> dict[str, ControlState]:
        """As Client.sleep, on every replica; by address."""
        tags = [tags] if isinstance(tags, str) else list(tags)
        return self._all("sleep", lambda client: client.sleep(tags, timeout=timeout))

    def wake_up(self, tags: str | Iterable[str] = (), *, timeout: float | None = None) -> dict[str, ControlState]:
        """As Client.wake_up, on every replica; by address."""
        tags = [tags] if isinstance(tags, str) else list(tags)
        return self._all("wake_up", lambda client: client.wake_up(tags, timeout=timeout))

    def flush_cache(self, *, timeout: float | None = None) -> dict[str, ControlState]:
        """As Client.flush_cache, on every replica; by address."""
        return self._all("flush_cache", lambda client: client.flush_cache(timeout=timeout))

    def drain(self, deadline: float | None = None, *, timeout: float | None = None) -> dict[str, ControlState]:
        """As Client.drain, on every replica; by address."""
        return self._all("drain", lambda client: client.drain(deadline, timeout=timeout))

    def set_speculation(self, speculation: Mapping[str, Any] | str | None = None, *, num_draft_tokens: int | None = None,
                        timeout: float | None = None) -> dict[str, ControlState]:
        """As Client.set_speculation, on every replica; by address."""
        return self._all("set_speculation", lambda client: client.set_speculation(speculation, num_draft_tokens=num_draft_tokens, timeout=timeout))

    def server_info(self, *, timeout: float | None = None) -> dict[str, Any]:
        """As Client.server_info, on every replica; by address."""
        return self._all("server_info", lambda client: client.server_info(timeout=timeout))

    def loads(self, *, timeout: float | None = None) -> dict[str, Any]:
        """As Client.loads, on every replica; by address."""
        return self._all("loads", lambda client: client.loads(timeout=timeout))

    def health(self, service: str = "", *, timeout: float | None = 5.0) -> dict[str, str]:
        """"SERVING" or "NOT_SERVING" by address, or the code of the failure; raises nothing."""
        answers = self._ask(lambda client: client.health(service, timeout=timeout))
        return {address: answer.code if isinstance(answer, BebopError) else answer for address, answer in answers.items()}

    def wait_until_serving(self, timeout: float = 300.0) -> None:
        """Returns when every replica answers SERVING."""
        self._all("wait_until_serving", lambda client: client.wait_until_serving(timeout))


def _version(client: Client, timeout: float) -> tuple:
    """What tells whether two replicas have the same weights; begins with the step."""
    if client._admin is None:
        return (client._once().server_info(timeout=timeout).weight_step,)
    return client._once().weights.info(timeout=timeout).version


def _each(replicas: Sequence[Replica], call: Callable[[Client], Any]) -> dict[str, Any]:
    """Calls all at once; by address, the answer or the BebopError."""
    def one(replica: Replica) -> Any:
        try:
            return call(replica.client)
        except BebopError as error:
            return error

    if len(replicas) < 2:
        return {replica.address: one(replica) for replica in replicas}
    pool = concurrent.futures.ThreadPoolExecutor(len(replicas), thread_name_prefix="bebop-fleet")
    try:
        return dict(zip([replica.address for replica in replicas], pool.map(one, replicas)))
    finally:
        pool.shutdown(wait=False)  # an interrupt leaves at once; otherwise all have ended


def _start(stages: UpdateStages, client: Client, timeout: float | None) -> None:
    try:
        client.weights._call("StartWeightUpdate", stages.plan.start_request(), timeout)
    except BaseException as failure:
        stages.note_start(client, failure)
        raise


async def _start_async(stages: UpdateStages, client: AsyncClient, timeout: float | None) -> None:
    try:
        await client.weights._call("StartWeightUpdate", stages.plan.start_request(), timeout)
    except BaseException as failure:
        stages.note_start(client, failure)
        raise


def _read(plan: UpdatePlan, path: str, client: Any, timeout: float | None) -> Any:
    return client.weights._call("UpdateWeights", weights_pb2.UpdateWeightsRequest(update_id=plan.update_id, path=path), timeout)


def _finish(plan: UpdatePlan, client: Any, timeout: float | None) -> Any:
    return client.weights._call("FinishWeightUpdate", plan.finish_request(), timeout)


class FleetWeights:
    """`fleet.weights`: the methods of Weights over every replica; results by address."""

    def __init__(self, fleet: Fleet):
        self._fleet = fleet

    def info(self, *, tensors: bool = False, timeout: float | None = None) -> dict[str, WeightInfo]:
        """As Weights.info, on every replica; by address."""
        return self._fleet._all("weights.info", lambda client: client.weights.info(tensors=tensors, timeout=timeout))

    def check(self, *, timeout: float | None = None) -> dict[str, WeightCheck]:
        """As Weights.check, on every replica; by address."""
        return self._fleet._all("weights.check", lambda client: client.weights.check(timeout=timeout))

    def abort(self, update_id: str = "", *, timeout: float | None = None) -> dict[str, str]:
        """As Weights.abort, on every replica; by address."""
        return self._fleet._all("weights.abort", lambda client: client.weights.abort(update_id, timeout=timeout))

    def update(self, named_tensors: NamedTensors, step: int, **options: Any) -> dict[str, UpdateResult]:
        """As Weights.update on every replica: each tensor is read, cast and hashed once and sent to all at the same time.

        If a replica fails before the last step, the update is aborted on all. If the last step fails on some, the others have the new weights:
        FleetUpdateError tells who has what.
        """
        return self._run(UpdateOptions(step, **options), named_tensors)

    def update_from_path(self, path: str, step: int, **options: Any) -> dict[str, UpdateResult]:
        """As Weights.update_from_path on every replica; each reads `path` beneath its own --weights-root."""
        return self._run(path_options(path, step, options), None, path)

    def _run(self, options: UpdateOptions, named_tensors: NamedTensors | None, path: str | None = None) -> dict[str, UpdateResult]:
        fleet, deadline = self._fleet, Deadline(options.timeout)
        answers = fleet._ask(lambda client: client.weights.info(tensors=True, timeout=deadline.remaining()))
        stages = UpdateStages(fleet._rotation, options, fleet._infos(answers, options.update_id), named_tensors)
        plan = stages.plan
        try:
            fleet._all("start", lambda client: _start(stages, client, deadline.remaining()))
            stages.stage = "push"
            if named_tensors is not None:
                push_all(fleet.clients, plan, named_tensors, deadline)
            source = path if named_tensors is None else options.path
            if source is not None:
                fleet._all("push", lambda client: _read(plan, source, client, deadline.no_limit()))
        except BaseException as failure:
            self._abort_quietly(plan.update_id, stages.begun)
            reason = stages.failed_before_finish(failure)
            if reason is failure:
                raise
            raise reason from failure
        replicas = fleet._rotation.replicas
        try:
            outcomes = _each(replicas, lambda client: _finish(plan, client, deadline.no_limit()))
            settled: dict[str, Any] = {}
            if any(isinstance(outcome, BebopError) for outcome in outcomes.values()):
                self._abort_quietly(plan.update_id, replicas)
                settled = _each(replicas, lambda client: client.weights.info(timeout=_SETTLE_SECONDS))
        except BaseException:
            self._abort_quietly(plan.update_id, replicas)
            for replica in replicas:
                fleet._rotation.suspend(replica)  # nobody waited for what they answer
            raise
        return stages.after_finish(outcomes, settled, deadline)

    def _abort_quietly(self, update_id: str, replicas: Sequence[Replica]) -> None:
        _each(replicas, lambda client: client.weights._abort_quietly(update_id))


class AsyncFleet(_FleetBase):
    """Fleet for asyncio: the methods of AsyncClient."""

    _kind = AsyncClient

    async def __aenter__(self) -> AsyncFleet:
        return self

    async def __aexit__(self, *exc) -> None:
        await self.close()

    async def close(self) -> None:
        """As Fleet.close."""
        for client in self.clients:
            await client.close()

    @property
    def weights(self) -> AsyncFleetWeights:
        """New weights for every replica."""
        return AsyncFleetWeights(self)

    # ---- one replica ----

    async def _pick(self, affinity: str | None, tried: Iterable[Replica]) -> Replica | None:
        due, ready = self._rotation.due()
        if due:
            answers = await _each_async(due + ready, lambda client: _version_async(client, PROBE_SECONDS))
            found = {replica: answers[replica.address] for replica in due + ready if not isinstance(answers[replica.address], BebopError)}
            self._rotation.judge({replica: found[replica] for replica in due if replica in found},
                                 [found[replica] for replica in ready if replica in found])
        return self._rotation.pick(affinity, tried)

    async def _route(self, send: Callable[[AsyncClient, float | None], Awaitable[Any]], samples: int, affinity: str | None,
                     timeout: float | None) -> Any:
        deadline = Deadline(self._timeout if timeout is None else timeout)
        tried: list[Replica] = []
        error: BebopError | None = None
        attempt = 0
        while True:
            replica = await self._pick(affinity, tried)
            if replica is None:
                attempt += 1
                await asyncio.sleep(self._give_up_or_wait(error, attempt, deadline))
                tried = []
                continue
            try:
                with self._rotation.using(replica, samples):
                    return await send(replica.client, deadline.remaining())
            except BebopError as failure:
                if not self._rotation.failed(replica, failure):
                    raise
                error = failure
                tried = self._rotation.replicas if affinity is not None and failure.code == "RESOURCE_EXHAUSTED" else [*tried, replica]

    async def generate(self, prompt_token_ids: requests.TokenIds, *, n: int = 1, affinity: str | None = None, timeout: float | None = None,
                       **params: Any) -> GroupResult:
        """As Fleet.generate."""
        return await self._generate(requests.generate_request(prompt_token_ids, n=n, **params), affinity, timeout)

    async def resume_samples(self, partial: GroupResult | Iterable[SampleResult], prompt_token_ids: requests.TokenIds | None = None, *,
                             affinity: str | None = None, timeout: float | None = None, **params: Any) -> GroupResult:
        """As Fleet.resume_samples."""
        resumed, ended = requests.resumed_requests(partial, prompt_token_ids, params)
        return GroupResult.merged(partial, await side_by_side_async(lambda request: self._generate(request, affinity, timeout), resumed), ended)

    async def _generate(self, request: rollout_pb2.GenerateRequest, affinity: str | None, timeout: float | None) -> GroupResult:
        async def send(client: AsyncClient, remaining: float | None):
            return await client._call(client._rollout.Generate, request, remaining, retry=None)

        return GroupResult.from_proto(await self._route(send, request.num_samples, affinity, timeout), request)

    async def generate_stream(self, prompt_token_ids: requests.TokenIds, *, n: int = 1, affinity: str | None = None,
                              timeout: float | None = None, **params: Any) -> AsyncIterator[Event]:
        """As Fleet.generate_stream."""
        params.setdefault("request_id", uuid.uuid4().hex)

        async def begin(client: AsyncClient, remaining: float | None):
            stream = client.generate_stream(prompt_token_ids, n=n, timeout=remaining, **params)
            try:
                return client, stream, await stream.__anext__()
            except StopAsyncIteration:
                return client, stream, None

        client, stream, first = await self._route(begin, n, affinity, timeout)
        replica = next(replica for replica in self._rotation.replicas if replica.client is client)
        with self._rotation.using(replica, n):
            try:
                if first is not None:
                    yield first
                    async for event in stream:
                        yield event
            finally:
                await stream.aclose()

    async def score(self, sequences: Sequence[requests.TokenIds], *, affinity: str | None = None, timeout: float | None = None,
                    **params: Any) -> list[SequenceScore]:
        """As Fleet.score."""
        request = requests.score_request(sequences, **params)

        async def send(client: AsyncClient, remaining: float | None):
            return await client._call(client._rollout.Score, request, remaining, retry=None)

        return [SequenceScore.from_proto(score) for score in (await self._route(send, len(request.sequences), affinity, timeout)).scores]

    async def tokenize(self, text: str, *, parse_special: bool = False, timeout: float | None = None) -> list[int]:
        """As Fleet.tokenize."""
        return await self._route(lambda client, remaining: client._once().tokenize(text, parse_special=parse_special, timeout=remaining), 0, None, timeout)

    async def detokenize(self, token_ids: requests.TokenIds, *, skip_special: bool = False, timeout: float | None = None) -> str:
        """As Fleet.detokenize."""
        return await self._route(lambda client, remaining: client._once().detokenize(token_ids, skip_special=skip_special, timeout=remaining), 0, None,
                                 timeout)

    async def model_info(self, *, timeout: float | None = None):
        """As Fleet.model_info."""
        return await self._route(lambda client, remaining: client._once().model_info(timeout=remaining), 0, None, timeout)

    # ---- every replica ----

    async def _all(self, what: str, call: Callable[[AsyncClient], Awaitable[Any]]) -> dict[str, Any]:
        return self._results(what, await self._ask(call))

    async def _ask(self, call: Callable[[AsyncClient], Awaitable[Any]]) -> dict[str, Any]:
        return await _each_async(self._rotation.replicas, lambda client: call(self._briefly(client)))

    async def abort(self, request_ids: str | Sequence[str], *, timeout: float | None = None) -> list[str]:
        """As Fleet.abort."""
        answers = await self._all("abort", lambda client: client.abort(request_ids, timeout=timeout))
        return sorted({request_id for ids in answers.values() for request_id in ids})

    async def pause(self, mode: str = "keep", *, clear_cache: bool = False, timeout: float | None = None) -> dict[str, ControlState]:
        """As Fleet.pause."""
        return await self._all("pause", lambda client: client.pause(mode, clear_cache=clear_cache, timeout=timeout))

    async def resume(self, *, timeout: float | None = None) -> dict[str, ControlState]:
        """As Fleet.resume."""
        return await self._all("resume", lambda client: client.resume(timeout=timeout))

    async def sleep(self, tags: str | Iterable[str] = (), *, timeout: float | None = None) -> dict[str, ControlState]:
        """As Fleet.sleep."""
        tags = [tags] if isinstance(tags, str) else list(tags)
        return await self._all("sleep", lambda client: client.sleep(tags, timeout=timeout))

    async def wake_up(self, tags: str | Iterable[str] = (), *, timeout: float | None = None) -> dict[str, ControlState]:
        """As Fleet.wake_up."""
        tags = [tags] if isinstance(tags, str) else list(tags)
        return await self._all("wake_up", lambda client: client.wake_up(tags, timeout=timeout))

    async def flush_cache(self, *, timeout: float | None = None) -> dict[str, ControlState]:
        """As Fleet.flush_cache."""
        return await self._all("flush_cache", lambda client: client.flush_cache(timeout=timeout))

    async def drain(self, deadline: float | None = None, *, timeout: float | None = None) -> dict[str, ControlState]:
        """As Fleet.drain."""
        return await self._all("drain", lambda client: client.drain(deadline, timeout=timeout))

    async def set_speculation(self, speculation: Mapping[str, Any] | str | None = None, *, num_draft_tokens: int | None = None,
                              timeout: float | None = None) -> dict[str, ControlState]:
        """As Fleet.set_speculation."""
        return await self._all("set_speculation",
                               lambda client: client.set_speculation(speculation, num_draft_tokens=num_draft_tokens, timeout=timeout))

    async def server_info(self, *, timeout: float | None = None) -> dict[str, Any]:
        """As Fleet.server_info."""
        return await self._all("server_info", lambda client: client.server_info(timeout=timeout))

    async def loads(self, *, timeout: float | None = None) -> dict[str, Any]:
        """As Fleet.loads."""
        return await self._all("loads", lambda client: client.loads(timeout=timeout))

    async def health(self, service: str = "", *, timeout: float | None = 5.0) -> dict[str, str]:
        """As Fleet.health."""
        answers = await self._ask(lambda client: client.health(service, timeout=timeout))
        return {address: answer.code if isinstance(answer, BebopError) else answer for address, answer in answers.items()}

    async def wait_until_serving(self, timeout: float = 300.0) -> None:
        """As Fleet.wait_until_serving."""
        await self._all("wait_until_serving", lambda client: client.wait_until_serving(timeout))


async def _version_async(client: AsyncClient, timeout: float) -> tuple:
    if client._admin is None:
        return ((await client._once().server_info(timeout=timeout)).weight_step,)
    return (await client._once().weights.info(timeout=timeout)).version


async def _each_async(replicas: Sequence[Replica], call: Callable[[AsyncClient], Awaitable[Any]]) -> dict[str, Any]:
    async def one(replica: Replica) -> Any:
        try:
            return await call(replica.client)
        except BebopError as error:
            return error

    return dict(zip([replica.address for replica in replicas], await asyncio.gather(*map(one, replicas))))


class AsyncFleetWeights:
    """`fleet.weights` for asyncio: the methods of FleetWeights as coroutines."""

    def __init__(self, fleet: AsyncFleet):
        self._fleet = fleet

    async def info(self, *, tensors: bool = False, timeout: float | None = None) -> dict[str, WeightInfo]:
        """As FleetWeights.info."""
        return await self._fleet._all("weights.info", lambda client: client.weights.info(tensors=tensors, timeout=timeout))

    async def check(self, *, timeout: float | None = None) -> dict[str, WeightCheck]:
        """As FleetWeights.check."""
        return await self._fleet._all("weights.check", lambda client: client.weights.check(timeout=timeout))

    async def abort(self, update_id: str = "", *, timeout: float | None = None) -> dict[str, str]:
        """As FleetWeights.abort."""
        return await self._fleet._all("weights.abort", lambda client: client.weights.abort(update_id, timeout=timeout))

    async def update(self, named_tensors: Any, step: int, **options: Any) -> dict[str, UpdateResult]:
        """As FleetWeights.update; tensors are produced in the loop's thread, as AsyncWeights.update has it."""
        return await self._run(UpdateOptions(step, **options), named_tensors)

    async def update_from_path(self, path: str, step: int, **options: Any) -> dict[str, UpdateResult]:
        """As FleetWeights.update_from_path."""
        return await self._run(path_options(path, step, options), None, path)

    async def _run(self, options: UpdateOptions, named_tensors: Any, path: str | None = None) -> dict[str, UpdateResult]:
        fleet, deadline = self._fleet, Deadline(options.timeout)
        answers = await fleet._ask(lambda client: client.weights.info(tensors=True, timeout=deadline.remaining()))
        stages = UpdateStages(fleet._rotation, options, fleet._infos(answers, options.update_id), named_tensors)
        plan = stages.plan
        try:
            await fleet._all("start", lambda client: _start_async(stages, client, deadline.remaining()))
            stages.stage = "push"
            if named_tensors is not None:
                with contextlib.ExitStack() as twins:
                    blocking = [twins.enter_context(client._blocking_twin()) for client in fleet.clients]
                    await push_all_async(blocking, plan, named_tensors, deadline)
            source = path if named_tensors is None else options.path
            if source is not None:
                await fleet._all("push", lambda client: _read(plan, source, client, deadline.no_limit()))
        except BaseException as failure:
            await asyncio.shield(self._abort_quietly(plan.update_id, stages.begun))
            reason = stages.failed_before_finish(failure)
            if reason is failure:
                raise
            raise reason from failure
        replicas = fleet._rotation.replicas
        try:
            outcomes = await _each_async(replicas, lambda client: _finish(plan, client, deadline.no_limit()))
            settled: dict[str, Any] = {}
            if any(isinstance(outcome, BebopError) for outcome in outcomes.values()):
                await self._abort_quietly(plan.update_id, replicas)
                settled = await _each_async(replicas, lambda client: client.weights.info(timeout=_SETTLE_SECONDS))
        except BaseException:
            await asyncio.shield(self._abort_quietly(plan.update_id, replicas))
            for replica in replicas:
                fleet._rotation.suspend(replica)  # nobody waited for what they answer
            raise
        return stages.after_finish(outcomes, settled, deadline)

    async def _abort_quietly(self, update_id: str, replicas: Sequence[Replica]) -> None:
        await _each_async(replicas, lambda client: client.weights._abort_quietly(update_id))
