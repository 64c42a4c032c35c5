# SPDX-License-Identifier: Apache-2.0
"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Union

import grpc

from bebop import requests
from bebop.errors import BebopError, from_rpc_error
from bebop.results import Admitted, GroupResult, SampleResult, SequenceScore, TokenChunk
from bebop.rpc import health_pb2
from bebop.transport import CHANNEL_OPTIONS, Deadline, Endpoint, RetryPolicy, Tls, read_token
from bebop.v1 import info_pb2, info_pb2_grpc, rollout_pb2, rollout_pb2_grpc

Event = Union[Admitted, TokenChunk, SampleResult]
HEALTH_METHOD = "/grpc.health.v1.Health/Check"


def connect(endpoint: Endpoint) -> grpc.Channel:
    if endpoint.tls is not None:
        return grpc.secure_channel(endpoint.address, endpoint.tls.credentials(), CHANNEL_OPTIONS)
    return grpc.insecure_channel(endpoint.address, CHANNEL_OPTIONS)


class Client:
    """Typed, blocking calls to one server. Thread safe; connects at the first call; a context manager; can be pickled.

    Args:
      server: "host:port" of the rollout port.
      admin: "host:port" of the admin port, where health and information are answered while the rollout port is busy; None: use `server`.
      tls: certificates, or None for plain text.
      token, token_file: bearer token, or a file with it (also: the file that BEBOP_TOKEN_FILE names).
      timeout: default seconds for each call, repeats included; None: no limit. Methods take their own.
      retry: when to try again; None: never.

    Every method raises BebopError.
    """

    def __init__(self, server: str = "127.0.0.1:50051", admin: str | None = None, *, tls: Tls | None = None, token: str | None = None,
                 token_file: str | None = None, timeout: float | None = None, retry: RetryPolicy | None = RetryPolicy()):
        token = read_token(token, token_file)
        self._setup(Endpoint(server, tls, token), Endpoint(admin, tls, token) if admin else None, timeout, retry)

    def _setup(self, server: Endpoint, admin: Endpoint | None, timeout: float | None, retry: RetryPolicy | None) -> None:
        self._state = (server, admin, timeout, retry)
        self._server, self._admin, self._timeout, self._retry = self._state
        self._channel = connect(server)
        self._admin_channel = connect(admin) if admin else self._channel
        self._rollout = rollout_pb2_grpc.RolloutStub(self._channel)
        self._info = info_pb2_grpc.InfoStub(self._admin_channel)
        self._health = self._admin_channel.unary_unary(HEALTH_METHOD, request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                                                       response_deserializer=health_pb2.HealthCheckResponse.FromString)

    def __getstate__(self):
        return self._state

    def __setstate__(self, state):
        self._setup(*state)

    def __repr__(self) -> str:
        return f"bebop.Client({self._server.address!r})"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Cancels calls in flight and disconnects."""
        self._channel.close()
        if self._admin_channel is not self._channel:
            self._admin_channel.close()

    def _call(self, method, request, timeout: float | None, endpoint: Endpoint | None = None):
        deadline = Deadline(self._timeout if timeout is None else timeout)
        metadata = (endpoint or self._server).metadata()
        attempt = 0
        while True:
            attempt += 1
            try:
                return method(request, timeout=deadline.remaining(), metadata=metadata)
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error)
                delay = self._retry.delay(error, attempt, deadline.elapsed()) if self._retry else None
                if delay is None or not deadline.allows(delay):
                    raise error from None
                time.sleep(delay)

    # ---- rollouts ----

    def generate(self, prompt_token_ids: requests.TokenIds, *, n: int = 1, timeout: float | None = None, **params: Any) -> GroupResult:
        """Generates a whole group and returns when its last sample has ended.

        Args:
          prompt_token_ids: the prompt, a sequence or array of ids.
          n: samples of the group.
          timeout: seconds; when they pass the request is cancelled.
          params: request_id, priority; sampling=dict(temperature, top_p, top_k, min_p, seed) and stopping=dict(max_new_tokens, min_new_tokens,
            stop_token_ids, stop, ignore_eos), or those fields themselves; speculation="rejection" or dict(mode, num_draft_tokens,
            synthetic_acceptance); and what to return: logprobs, raw_logprobs, entropy, token_source, draft_logprobs, spec_detail, prompt.
        """
        request = requests.generate_request(prompt_token_ids, n=n, **params)
        return GroupResult.from_proto(self._call(self._rollout.Generate, request, timeout), request.output)

    def generate_stream(self, prompt_token_ids: requests.TokenIds, *, n: int = 1, timeout: float | None = None,
                        events: bool = False, **params: Any) -> Iterator[Event]:
        """The same group as an iterator of SampleResult, each as it ends; with `events` also Admitted and, with stream_tokens=True, TokenChunk.

        Closing the iterator cancels the request. A stream that breaks is not repeated.
        """
        request = requests.generate_request(prompt_token_ids, n=n, **params)
        deadline = Deadline(self._timeout if timeout is None else timeout)
        call = self._rollout.GenerateStream(request, timeout=deadline.remaining(), metadata=self._server.metadata())
        try:
            for message in call:
                event = stream_event(message, request.output)
                if event is not None and (events or isinstance(event, SampleResult)):
                    yield event
        except grpc.RpcError as rpc_error:
            raise from_rpc_error(rpc_error) from None
        finally:
            call.cancel()

    def score(self, sequences: Sequence[requests.TokenIds], *, timeout: float | None = None, **params: Any) -> list[SequenceScore]:
        """Teacher-forced log-probabilities of token sequences, one result each.

        params: score_start, temperature, top_logprobs, token_ids_logprob, entropy, draft_depth.
        """
        result = self._call(self._rollout.Score, requests.score_request(sequences, **params), timeout)
        return [SequenceScore.from_proto(score) for score in result.scores]

    def abort(self, request_ids: str | Sequence[str], *, timeout: float | None = None) -> list[str]:
        """Ends requests; their callers get the tokens so far with finish reason ABORTED. Returns the ids that were running or waiting."""
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        return list(self._call(self._rollout.Abort, rollout_pb2.AbortRequest(request_ids=ids), timeout).aborted_request_ids)

    # ---- information ----

    def tokenize(self, text: str, *, parse_special: bool = False, timeout: float | None = None) -> list[int]:
        """Token ids of `text` with the checkpoint's tokenizer; with parse_special, special tokens in it become their ids."""
        request = info_pb2.TokenizeRequest(text=text, parse_special=parse_special)
        return list(self._call(self._info.Tokenize, request, timeout, self._admin).token_ids)

    def detokenize(self, token_ids: requests.TokenIds, *, skip_special: bool = False, timeout: float | None = None) -> str:
        request = info_pb2.DetokenizeRequest(token_ids=[int(token) for token in token_ids], skip_special=skip_special)
        return self._call(self._info.Detokenize, request, timeout, self._admin).text

    def server_info(self, *, timeout: float | None = None) -> info_pb2.ServerInfo:
        return self._call(self._info.GetServerInfo, info_pb2.GetServerInfoRequest(), timeout, self._admin)

    def model_info(self, *, timeout: float | None = None) -> info_pb2.ModelInfo:
        return self._call(self._info.GetModelInfo, info_pb2.GetModelInfoRequest(), timeout, self._admin)

    def loads(self, *, timeout: float | None = None) -> info_pb2.Loads:
        """Running and waiting work, memory in use, and counters since the start."""
        return self._call(self._info.GetLoads, info_pb2.GetLoadsRequest(), timeout, self._admin)

    def health(self, service: str = "", *, timeout: float | None = None) -> str:
        """"SERVING" or "NOT_SERVING" of one service ("bebop.v1.Rollout"), or of the whole server."""
        reply = self._call(self._health, health_pb2.HealthCheckRequest(service=service), timeout, self._admin)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)

    def wait_until_serving(self, timeout: float = 300.0) -> None:
        """Returns when the server answers SERVING; raises the last error after `timeout` seconds."""
        deadline = Deadline(timeout)
        while True:
            error: Exception | None = None
            try:
                if self.health(timeout=min(5.0, timeout)) == "SERVING":
                    return
            except BebopError as failure:
                error = failure
            if not deadline.allows(0.1):
                raise error or TimeoutError(f"{self._server.address}: not SERVING after {timeout} s")
            time.sleep(0.1)


def stream_event(message: rollout_pb2.GenerateEvent, output: rollout_pb2.OutputParams) -> Event | None:
    kind = message.WhichOneof("event")
    if kind == "sample_result":
        return SampleResult.from_proto(message.sample_result, output)
    if kind == "token_chunk":
        return TokenChunk.from_proto(message.token_chunk)
    if kind == "admitted":
        return Admitted(message.admitted.request_id)
    return None
