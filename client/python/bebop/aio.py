# SPDX-License-Identifier: Apache-2.0
"""The asyncio client: the methods of Client as coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from bebop import requests
from bebop.client import HEALTH_METHOD, Client, Event, stream_event
from bebop.control import ControlState, pause_request, speculation_request, tag_list
from bebop.errors import BebopError
from bebop.results import GroupResult, SampleResult, SequenceScore
from bebop.rpc import health_pb2
from bebop.transport import CHANNEL_OPTIONS, UNSET, Deadline, Endpoint, RetryPolicy, Tls, read_token, require_admin
from bebop.v1 import control_pb2, control_pb2_grpc, info_pb2, info_pb2_grpc, rollout_pb2, rollout_pb2_grpc
from bebop.weights import AsyncWeights

if TYPE_CHECKING:
    from google.protobuf.message import Message


def connect(endpoint: Endpoint) -> grpc.aio.Channel:
    if endpoint.tls is not None:
        return grpc.aio.secure_channel(endpoint.address, endpoint.tls.credentials(), CHANNEL_OPTIONS)
    return grpc.aio.insecure_channel(endpoint.address, CHANNEL_OPTIONS)


async def side_by_side(call: Callable[[Any], Awaitable[Any]], arguments: Sequence[Any]) -> list[Any]:
    """One call for each argument, at the same time. The first failure cancels the others."""
    tasks = [asyncio.ensure_future(call(argument)) for argument in arguments]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


class AsyncClient:
    """Typed calls to one server for asyncio. Arguments and errors as Client's.

    Connects at the first call and belongs to the event loop of that call; a pickled or copied client connects anew. Cancelling the task
    of a call cancels the request.
    """

    def __init__(self, rollout: str = "127.0.0.1:50051", admin: str | None = None, *, tls: Tls | None = None, token: str | None = None,
                 token_file: str | None = None, timeout: float | None = None, retry: RetryPolicy | None = RetryPolicy()):
        token = read_token(token, token_file)
        self._setup(Endpoint(rollout, tls, token), Endpoint(admin, tls, token, "admin") if admin else None, timeout, retry)

    def _setup(self, server: Endpoint, admin: Endpoint | None, timeout: float | None, retry: RetryPolicy | None) -> None:
        self._state = (server, admin, timeout, retry)
        self._server, self._admin, self._timeout, self._retry = self._state
        self._channel: grpc.aio.Channel | None = None
        self._admin_channel: grpc.aio.Channel | None = None

    def _connect(self) -> None:
        # Not in the constructor: a channel of grpc.aio binds to the running loop.
        if self._channel is not None:
            return
        self._channel = connect(self._server)
        self._admin_channel = connect(self._admin) if self._admin else self._channel

    @property
    def _rollout(self) -> rollout_pb2_grpc.RolloutStub:
        self._connect()
        return rollout_pb2_grpc.RolloutStub(self._channel)

    @property
    def _info(self) -> info_pb2_grpc.InfoStub:
        self._connect()
        return info_pb2_grpc.InfoStub(self._admin_channel)

    @property
    def _health(self) -> grpc.aio.UnaryUnaryMultiCallable:
        self._connect()
        return self._admin_channel.unary_unary(HEALTH_METHOD, request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                                               response_deserializer=health_pb2.HealthCheckResponse.FromString)

    def __getstate__(self):
        return self._state

    def __setstate__(self, state):
        self._setup(*state)

    def __repr__(self) -> str:
        return f"bebop.AsyncClient({self._server.address!r})"

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels calls in flight and disconnects."""
        if self._channel is not None:
            await self._channel.close()
            if self._admin_channel is not self._channel:
                await self._admin_channel.close()
            self._channel = self._admin_channel = None

    async def _call(self, method: Callable[..., Any], request: Message, timeout: float | None, endpoint: Endpoint | None = None,
                    retry: RetryPolicy | None = UNSET) -> Any:
        policy = self._retry if retry is UNSET else retry
        deadline = Deadline(self._timeout if timeout is None else timeout)
        endpoint = endpoint or self._server
        metadata = endpoint.metadata()
        attempt = 0
        while True:
            attempt += 1
            try:
                return await method(request, timeout=deadline.remaining(), metadata=metadata)
            except grpc.RpcError as rpc_error:
                error = endpoint.error(rpc_error)
                delay = policy.delay(error, attempt, deadline.elapsed()) if policy else None
                if delay is None or not deadline.allows(delay):
                    raise error from None
                await asyncio.sleep(delay)

    @property
    def weights(self) -> AsyncWeights:
        """New weights while generation runs (admin port)."""
        return AsyncWeights(self)

    def _with_retry(self, retry: RetryPolicy | None) -> AsyncClient:
        """This client, on the same connections."""
        self._connect()
        twin = object.__new__(AsyncClient)
        twin.__dict__.update(self.__dict__, _retry=retry)
        return twin

    def _once(self) -> AsyncClient:
        """The same, but trying each call once."""
        return self._with_retry(None)

    def _blocking_twin(self) -> Client:
        twin = Client.__new__(Client)
        twin._setup(*self._state)
        return twin

    async def _steer(self, method: str, request: Message, timeout: float | None) -> ControlState:
        endpoint = require_admin(self._admin)
        self._connect()
        stub = control_pb2_grpc.ControlStub(self._admin_channel)
        return ControlState.from_proto(await self._call(getattr(stub, method), request, timeout, endpoint))

    # ---- rollouts ----

    async def generate(self, prompt_token_ids: requests.TokenIds, *, n: int = 1, timeout: float | None = None, **params: Any) -> GroupResult:
        """As Client.generate."""
        request = requests.generate_request(prompt_token_ids, n=n, **params)
        return GroupResult.from_proto(await self._call(self._rollout.Generate, request, timeout), request)

    async def resume_samples(self, partial: GroupResult | Iterable[SampleResult], prompt_token_ids: requests.TokenIds | None = None, *,
                             timeout: float | None = None, **params: Any) -> GroupResult:
        """As Client.resume_samples."""
        resumed, ended = requests.resumed_requests(partial, prompt_token_ids, params)

        async def one(request: rollout_pb2.GenerateRequest) -> GroupResult:
            return GroupResult.from_proto(await self._call(self._rollout.Generate, request, timeout), request)

        return GroupResult.merged(partial, await side_by_side(one, resumed), ended)

    async def generate_stream(self, prompt_token_ids: requests.TokenIds, *, n: int = 1, timeout: float | None = None, events: bool = False,
                              **params: Any) -> AsyncIterator[Event]:
        """As Client.generate_stream: `async for sample in client.generate_stream(...)`."""
        request = requests.generate_request(prompt_token_ids, n=n, **params)
        deadline = Deadline(self._timeout if timeout is None else timeout)
        call = self._rollout.GenerateStream(request, timeout=deadline.remaining(), metadata=self._server.metadata())
        try:
            async for message in call:
                event = stream_event(message, request.output)
                if event is not None and (events or isinstance(event, SampleResult)):
                    yield event
        except grpc.RpcError as rpc_error:
            raise self._server.error(rpc_error) from None
        finally:
            call.cancel()

    async def score(self, sequences: Sequence[requests.TokenIds], *, timeout: float | None = None, **params: Any) -> list[SequenceScore]:
        """As Client.score."""
        result = await self._call(self._rollout.Score, requests.score_request(sequences, **params), timeout)
        return [SequenceScore.from_proto(score) for score in result.scores]

    async def abort(self, request_ids: str | Sequence[str], *, timeout: float | None = None) -> list[str]:
        """As Client.abort."""
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        return list((await self._call(self._rollout.Abort, rollout_pb2.AbortRequest(request_ids=ids), timeout)).aborted_request_ids)

    # ---- control (admin port) ----

    async def pause(self, mode: str = "keep", *, clear_cache: bool = False, timeout: float | None = None) -> ControlState:
        """As Client.pause."""
        return await self._steer("PauseGeneration", pause_request(mode, clear_cache), timeout)

    async def resume(self, *, timeout: float | None = None) -> ControlState:
        """As Client.resume."""
        return await self._steer("ResumeGeneration", control_pb2.ResumeGenerationRequest(), timeout)

    async def sleep(self, tags: str | Iterable[str] = (), *, timeout: float | None = None) -> ControlState:
        """As Client.sleep."""
        return await self._steer("Sleep", control_pb2.SleepRequest(tags=tag_list(tags)), timeout)

    async def wake_up(self, tags: str | Iterable[str] = (), *, timeout: float | None = None) -> ControlState:
        """As Client.wake_up."""
        return await self._steer("WakeUp", control_pb2.WakeUpRequest(tags=tag_list(tags)), timeout)

    async def flush_cache(self, *, timeout: float | None = None) -> ControlState:
        """As Client.flush_cache."""
        return await self._steer("FlushCache", control_pb2.FlushCacheRequest(), timeout)

    async def drain(self, deadline: float | None = None, *, timeout: float | None = None) -> ControlState:
        """As Client.drain."""
        return await self._steer("Drain", control_pb2.DrainRequest(deadline_seconds=deadline), timeout)

    async def set_speculation(self, speculation: Mapping[str, Any] | str | None = None, *, num_draft_tokens: int | None = None,
                        timeout: float | None = None) -> ControlState:
        """As Client.set_speculation."""
        return await self._steer("SetSpeculation", speculation_request(speculation, num_draft_tokens), timeout)

    # ---- information ----

    async def tokenize(self, text: str, *, parse_special: bool = False, timeout: float | None = None) -> list[int]:
        """As Client.tokenize."""
        request = info_pb2.TokenizeRequest(text=text, parse_special=parse_special)
        return list((await self._call(self._info.Tokenize, request, timeout, self._admin)).token_ids)

    async def detokenize(self, token_ids: requests.TokenIds, *, skip_special: bool = False, timeout: float | None = None) -> str:
        """As Client.detokenize."""
        request = info_pb2.DetokenizeRequest(token_ids=[int(token) for token in token_ids], skip_special=skip_special)
        return (await self._call(self._info.Detokenize, request, timeout, self._admin)).text

    async def server_info(self, *, timeout: float | None = None) -> info_pb2.ServerInfo:
        """As Client.server_info."""
        return await self._call(self._info.GetServerInfo, info_pb2.GetServerInfoRequest(), timeout, self._admin)

    async def model_info(self, *, timeout: float | None = None) -> info_pb2.ModelInfo:
        """As Client.model_info."""
        return await self._call(self._info.GetModelInfo, info_pb2.GetModelInfoRequest(), timeout, self._admin)

    async def loads(self, *, timeout: float | None = None) -> info_pb2.Loads:
        """As Client.loads."""
        return await self._call(self._info.GetLoads, info_pb2.GetLoadsRequest(), timeout, self._admin)

    async def health(self, service: str = "", *, timeout: float | None = None) -> str:
        """As Client.health."""
        reply = await self._call(self._health, health_pb2.HealthCheckRequest(service=service), timeout, self._admin)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)

    async def wait_until_serving(self, timeout: float = 300.0) -> None:
        """As Client.wait_until_serving."""
        deadline = Deadline(timeout)
        while True:
            error: Exception | None = None
            try:
                if await self.health(timeout=min(5.0, timeout)) == "SERVING":
                    return
            except BebopError as failure:
                error = failure
            if not deadline.allows(0.1):
                raise error or TimeoutError(f"{self._server.address}: not SERVING after {timeout} s")
            await asyncio.sleep(0.1)
