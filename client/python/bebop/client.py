# SPDX-License-Identifier: Apache-2.0
"""The blocking client."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union

import grpc

from bebop import requests
from bebop.control import ControlState, pause_request, speculation_request, tag_list
from bebop.errors import BebopError
from bebop.results import Admitted, GroupResult, SampleResult, SequenceScore, TokenChunk
from bebop.rpc import health_pb2
from bebop.transport import CHANNEL_OPTIONS, UNSET, Deadline, Endpoint, RetryPolicy, Tls, read_token, require_admin
from bebop.v1 import control_pb2, control_pb2_grpc, info_pb2, info_pb2_grpc, rollout_pb2, rollout_pb2_grpc
from bebop.weights import Weights

if TYPE_CHECKING:
    from google.protobuf.message import Message

Event = Union[Admitted, TokenChunk, SampleResult]
HEALTH_METHOD = "/grpc.health.v1.Health/Check"


def connect(endpoint: Endpoint) -> grpc.Channel:
    if endpoint.tls is not None:
        return grpc.secure_channel(endpoint.address, endpoint.tls.credentials(), CHANNEL_OPTIONS)
    return grpc.insecure_channel(endpoint.address, CHANNEL_OPTIONS)


def side_by_side(call: Callable[[Any], Any], arguments: Sequence[Any]) -> list[Any]:
    """One call for each argument, at the same time. A failure is raised when all have ended."""
    if len(arguments) < 2:
        return [call(argument) for argument in arguments]
    with concurrent.futures.ThreadPoolExecutor(len(arguments), thread_name_prefix="bebop-calls") as pool:
        return list(pool.map(call, arguments))


class Client:
    """Typed, blocking calls to one server. Thread safe; connects at the first call; a context manager; can be pickled.

    Args:
      rollout: "host:port" of the rollout port.
      admin: "host:port" of the admin port, which has weights and control, and answers health and information while the rollout port is busy.
        None: those two are asked on the rollout port, and weights and control raise ValueError.
      tls: certificates, or None for plain text.
      token, token_file: bearer token, or a file whose first line it is (also: the file that BEBOP_TOKEN_FILE names). The token itself is not
        taken from the environment, where other processes could read it.
      timeout: default seconds for each call, repeats included; None: no limit. Methods take their own.
      retry: when to try again; None: never.

    `weights` has what a learner needs: see bebop.weights.Weights. Every method raises BebopError.
    """

    def __init__(self, rollout: str = "127.0.0.1:50051", admin: str | None = None, *, tls: Tls | None = None, token: str | None = None,
                 token_file: str | None = None, timeout: float | None = None, retry: RetryPolicy | None = RetryPolicy()):
        token = read_token(token, token_file)
        self._setup(Endpoint(rollout, tls, token), Endpoint(admin, tls, token, "admin") if admin else None, timeout, retry)

    def _setup(self, server: Endpoint, admin: Endpoint | None, timeout: float | None, retry: RetryPolicy | None) -> None:
        self._state = (server, admin, timeout, retry)
        self._server, self._admin, self._timeout, self._retry = self._state
        self._channel = connect(server)
        self._admin_channel = connect(admin) if admin else self._channel
        self._rollout = rollout_pb2_grpc.RolloutStub(self._channel)
        self._info = info_pb2_grpc.InfoStub(self._admin_channel)
        self._control = control_pb2_grpc.ControlStub(self._admin_channel)
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

    def _call(self, method: Callable[..., Any], request: Message, timeout: float | None, endpoint: Endpoint | None = None,
              retry: RetryPolicy | None = UNSET) -> Any:
        policy = self._retry if retry is UNSET else retry
        deadline = Deadline(self._timeout if timeout is None else timeout)
        endpoint = endpoint or self._server
        metadata = endpoint.metadata()
        attempt = 0
        while True:
            attempt += 1
            try:
                return method(request, timeout=deadline.remaining(), metadata=metadata)
            except grpc.RpcError as rpc_error:
                error = endpoint.error(rpc_error)
                delay = policy.delay(error, attempt, deadline.elapsed()) if policy else None
                if delay is None or not deadline.allows(delay):
                    raise error from None
                time.sleep(delay)

    def _with_retry(self, retry: RetryPolicy | None) -> Client:
        """This client, on the same connections."""
        twin = object.__new__(Client)
        twin.__dict__.update(self.__dict__, _retry=retry)
        return twin

    def _once(self) -> Client:
        """The same, but trying each call once."""
        return self._with_retry(None)

    @property
    def weights(self) -> Weights:
        """New weights while generation runs (admin port)."""
        return Weights(self)

    def _steer(self, method: str, request: Message, timeout: float | None) -> ControlState:
        endpoint = require_admin(self._admin)
        return ControlState.from_proto(self._call(getattr(self._control, method), request, timeout, endpoint))

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
            weights=dict(min_step, wait_for_step, max_step_spread, on_update="continue", "recompute" or "stop"): which versions may sample the
            tokens. detach=True: the group runs on when this call ends; a call with the same request_id and body attaches to it.
            resume=samples or handles: go on with samples that were cut short (see resume_samples).
        """
        request = requests.generate_request(prompt_token_ids, n=n, **params)
        return GroupResult.from_proto(self._call(self._rollout.Generate, request, timeout), request)

    def resume_samples(self, partial: GroupResult | Iterable[SampleResult], prompt_token_ids: requests.TokenIds | None = None, *,
                       timeout: float | None = None, **params: Any) -> GroupResult:
        """Goes on with the samples of a group that were cut short, here or on another replica of the model, and returns the whole group.

        The tokens are those that the samples would have got undisturbed: the random stream goes on. Samples that had ended are returned as they
        are; without unfinished ones nothing is sent.

        Handles that are too large for one request (requests.MAX_RESUME_BYTES) go in several at the same time. If one of them fails, so does the
        call, once all have ended; what it was given can be given again.

        Args:
          partial: a GroupResult, which knows its request; or samples, e.g. of generate_stream: then prompt_token_ids and params are needed, and
            must be as they were (InvalidArgumentError, RESUME_MISMATCH).
        """
        resumed, ended = requests.resumed_requests(partial, prompt_token_ids, params)
        groups = side_by_side(lambda request: GroupResult.from_proto(self._call(self._rollout.Generate, request, timeout), request), resumed)
        return GroupResult.merged(partial, groups, ended)

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
            raise self._server.error(rpc_error) from None
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

    # ---- control (admin port) ----

    def pause(self, mode: str = "keep", *, clear_cache: bool = False, timeout: float | None = None) -> ControlState:
        """Stops generation between two iterations; new requests are accepted, and wait. Harmless to repeat.

        mode: "keep": running samples stand still and go on at resume; "wait": they end first; "abort": they end (ABORTED) with their tokens so
        far and a resume_handle. clear_cache: with "keep", give their caches back; they are recomputed at resume.
        """
        return self._steer("PauseGeneration", pause_request(mode, clear_cache), timeout)

    def resume(self, *, timeout: float | None = None) -> ControlState:
        """Generation goes on after pause. To go on with samples that were cut short: resume_samples."""
        return self._steer("ResumeGeneration", control_pb2.ResumeGenerationRequest(), timeout)

    def sleep(self, tags: str | Iterable[str] = (), *, timeout: float | None = None) -> ControlState:
        """Gives memory back while a learner needs it: "weights" (to host memory), "kv_cache", or both (no tags). Running samples wait."""
        return self._steer("Sleep", control_pb2.SleepRequest(tags=tag_list(tags)), timeout)

    def wake_up(self, tags: str | Iterable[str] = (), *, timeout: float | None = None) -> ControlState:
        """Takes the memory again. ResourceExhaustedError: somebody else has it; the server is still asleep."""
        return self._steer("WakeUp", control_pb2.WakeUpRequest(tags=tag_list(tags)), timeout)

    def flush_cache(self, *, timeout: float | None = None) -> ControlState:
        """Forgets what is cached of paused samples. FailedPreconditionError (NOT_PAUSED) while generation runs."""
        return self._steer("FlushCache", control_pb2.FlushCacheRequest(), timeout)

    def drain(self, deadline: float | None = None, *, timeout: float | None = None) -> ControlState:
        """Refuses new work, lets running work finish for `deadline` seconds (None: the server's --drain-timeout), then ends the rest as DRAINED
        with resume handles. Final: the process waits for its end."""
        return self._steer("Drain", control_pb2.DrainRequest(deadline_seconds=deadline), timeout)

    def set_speculation(self, speculation: Mapping[str, Any] | str | None = None, *, num_draft_tokens: int | None = None,
                        timeout: float | None = None) -> ControlState:
        """What requests get from now on that leave speculation unset: "off", "target_only", "rejection" or "coupled", or
        dict(mode, num_draft_tokens). What is not given stays."""
        return self._steer("SetSpeculation", speculation_request(speculation, num_draft_tokens), timeout)

    # ---- information ----

    def tokenize(self, text: str, *, parse_special: bool = False, timeout: float | None = None) -> list[int]:
        """Token ids of `text` with the checkpoint's tokenizer; with parse_special, special tokens in it become their ids."""
        request = info_pb2.TokenizeRequest(text=text, parse_special=parse_special)
        return list(self._call(self._info.Tokenize, request, timeout, self._admin).token_ids)

    def detokenize(self, token_ids: requests.TokenIds, *, skip_special: bool = False, timeout: float | None = None) -> str:
        """The text of `token_ids`; with skip_special without special tokens."""
        request = info_pb2.DetokenizeRequest(token_ids=[int(token) for token in token_ids], skip_special=skip_special)
        return self._call(self._info.Detokenize, request, timeout, self._admin).text

    def server_info(self, *, timeout: float | None = None) -> info_pb2.ServerInfo:
        """Version, device, limits and defaults of the server."""
        return self._call(self._info.GetServerInfo, info_pb2.GetServerInfoRequest(), timeout, self._admin)

    def model_info(self, *, timeout: float | None = None) -> info_pb2.ModelInfo:
        """What the checkpoint is: its sizes, and whether it has an MTP layer."""
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
