# SPDX-License-Identifier: Apache-2.0
"""New weights for servers that go on generating: `client.weights`.

    client.weights.update(model.state_dict(), step=42)

The tensors go over one gRPC stream a server, cast to the server's types on the way, each hashed (SHA-256) while the one before it is being
sent. Nothing of an update is visible before its last step, which checks every byte and swaps target and draft together; whatever fails or is
interrupted before that is undone, and the server serves on with what it had.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import queue
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union

import grpc

from bebop.errors import BebopError, FailedPreconditionError
from bebop.progress import Progress, open_progress
from bebop.requests import enum_value
from bebop.tensors import ELEMENT_BYTES, ComponentDigest, WireTensor, is_draft, is_vision, plain_name, to_host
from bebop.transport import Deadline, require_admin
from bebop.v1 import weights_pb2, weights_pb2_grpc

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from bebop.aio import AsyncClient
    from bebop.client import Client

NamedTensors = Union[Mapping[str, Any], Iterable[tuple[str, Any]]]

# Of the 4 MiB that the server takes: small enough that casting, hashing and copying find it in the cache.
CHUNK_BYTES = 1 << 20
# What is sent on one stream, and kept so that it can be sent again if the stream is lost. Its end is acknowledged.
WINDOW_BYTES = 128 << 20
_QUEUED_FRAMES = 8
_ABORT_SECONDS = 5.0
_PUSH_METHOD = "/bebop.v1.Weights/PushWeights"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor as an update must bring it: name as in the checkpoint, dtype "BF16" or "F32"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype] * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class OpenUpdate:
    """An update that has begun. `missing`: (tensor, offset of the first byte that is not there), at most 64 of them."""

    update_id: str
    target_step: int
    received_bytes: int
    expected_bytes: int
    complete_tensors: int
    num_tensors: int
    missing: tuple[tuple[str, int], ...]

    @staticmethod
    def from_proto(message: weights_pb2.WeightUpdate) -> OpenUpdate:
        return OpenUpdate(message.update_id, message.target_step, message.received_bytes, message.expected_bytes, message.complete_tensors,
                          message.num_tensors, tuple((tensor.name, tensor.next_offset) for tensor in message.missing))


@dataclasses.dataclass(frozen=True)
class WeightInfo:
    """Which weights a server runs. Steps are 0 for the checkpoint loaded at start; digests are hexadecimal SHA-256.

    update_id, label: of the last finished update. update: the open one. tensors: with info(tensors=True), what a full update brings.
    """

    target_step: int
    draft_step: int
    label: str | None
    target_digest: str
    draft_digest: str
    update_id: str
    update: OpenUpdate | None
    num_updates: int
    staging_bytes: int
    staging_limit_bytes: int
    tensors: tuple[TensorSpec, ...] = dataclasses.field(default=(), repr=False)

    @property
    def version(self) -> tuple[int, int, str, str]:
        """What two servers with the same weights have in common."""
        return self.target_step, self.draft_step, self.target_digest, self.draft_digest

    @staticmethod
    def from_proto(message: weights_pb2.WeightInfo) -> WeightInfo:
        return WeightInfo(message.target_step, message.draft_step, message.label if message.HasField("label") else None, message.target_digest,
                          message.draft_digest, message.update_id, OpenUpdate.from_proto(message.update) if message.HasField("update") else None,
                          message.num_updates, message.staging_bytes, message.staging_limit_bytes,
                          tuple(TensorSpec(spec.name, spec.dtype, tuple(spec.shape)) for spec in message.tensors))


@dataclasses.dataclass(frozen=True)
class WeightCheck:
    """Resident weights hashed again: do they match what the server reports?"""

    target_matches: bool
    draft_matches: bool
    target_digest: str
    draft_digest: str

    @staticmethod
    def from_proto(message: weights_pb2.CheckWeightsResult) -> WeightCheck:
        return WeightCheck(message.target_matches, message.draft_matches, message.target_digest, message.draft_digest)


@dataclasses.dataclass(frozen=True)
class UpdateResult:
    """A finished update.

    stage_seconds: from its start to the swap, on the server. swap_seconds: generation stood still. kept, recomputed, ended: samples that were
    running at the swap. sent_bytes: of tensors, over the wire or to disk, repeats not counted. seconds: the whole call.
    """

    info: WeightInfo
    stage_seconds: float
    swap_seconds: float
    kept_samples: int
    recomputed_samples: int
    ended_samples: int
    sent_bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Frame:
    """A serialised WeightChunk: bytes [begin, end) of a tensor."""

    tensor: str
    begin: int
    end: int
    message: bytes


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_frame(update_id: str, tensor: str, offset: int, data: memoryview, digest: bytes) -> Frame:
    """One copy of the data, where the message's own constructor and serialiser would make two."""
    head = weights_pb2.WeightChunk(update_id=update_id, tensor=tensor, offset=offset, digest=digest).SerializeToString()
    tag = weights_pb2.WeightChunk.DATA_FIELD_NUMBER << 3 | 2
    return Frame(tensor, offset, offset + len(data), b"".join((head, _varint(tag), _varint(len(data)), data)))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclasses.dataclass
class UpdateOptions:
    """Arguments of Weights.update, checked as far as no server is needed."""

    step: int
    label: str | None = None
    components: str | Sequence[str] | None = None
    in_flight: str = "keep"
    encoding: str = "full"
    base_step: int | None = None
    rewind: bool = False
    transport: str = "stream"
    path: str | None = None
    root: str | os.PathLike | None = None
    deadline: float | None = None
    progress: Any = False
    update_id: str | None = None
    timeout: float | None = None

    def __post_init__(self):
        self.update_id = self.update_id or uuid.uuid4().hex
        if self.components is not None:
            names = [self.components] if isinstance(self.components, str) else list(self.components)
            self.components = [enum_value("components", name, weights_pb2.WeightComponent.Type) for name in names]
            if not self.components:
                raise ValueError("components: empty; None means all that the model has")
        self.in_flight = enum_value("in_flight", self.in_flight, weights_pb2.InFlight.Mode)
        encodings = {"full": weights_pb2.WeightEncoding.FULL, "delta": weights_pb2.WeightEncoding.OVERWRITE_DELTA}
        if self.encoding not in encodings:
            raise ValueError(f"encoding: {self.encoding!r} is none of {', '.join(encodings)}")
        self.encoding = encodings[self.encoding]
        if self.is_delta and self.base_step is None:
            raise ValueError('encoding="delta" needs base_step: the step whose tensors stay where none are given')
        if self.transport not in ("stream", "disk"):
            raise ValueError(f"transport: {self.transport!r} is none of stream, disk")
        if self.transport == "disk" and (self.path is None or self.root is None):
            raise ValueError('transport="disk" needs path, beneath the server\'s --weights-root, and root, that folder as this machine sees it')
        if self.transport == "disk" and self.is_delta:
            raise ValueError('transport="disk" writes whole checkpoints; encoding="delta" goes with transport="stream"')
        if self.transport == "stream" and not (self.path is None and self.root is None):
            raise ValueError('path and root go with transport="disk"; update_from_path reads what is there already')

    @property
    def is_delta(self) -> bool:
        return self.encoding == weights_pb2.WeightEncoding.OVERWRITE_DELTA


class UpdatePlan:
    """One update as a learner's tensors and a server's list of tensors make it: what is announced, what is sent, what it must add up to.

    Raises ValueError or TypeError for tensors that do not fit: before anything is sent for a mapping, else as they come.
    """

    def __init__(self, options: UpdateOptions, info: WeightInfo, named_tensors: NamedTensors | None):
        self.options = options
        self.update_id = options.update_id
        has_draft = any(is_draft(spec.name) for spec in info.tensors)
        types = weights_pb2.WeightComponent
        chosen = options.components or ([types.TARGET, types.DRAFT] if has_draft else [types.TARGET])
        self._target, self._draft = types.TARGET in chosen, types.DRAFT in chosen
        if self._draft and not has_draft:
            raise ValueError('components: "draft" is asked for, but the server\'s model has no MTP layer')
        wanted = [spec for spec in info.tensors if (self._draft if is_draft(spec.name) else self._target)]
        self._specs = {plain_name(spec.name): spec for spec in wanted}
        self._ties_lm_head = not any(plain_name(spec.name) == "lm_head.weight" for spec in info.tensors)
        self._sent: dict[str, bytes] = {}  # digests, by plain name
        self._lm_head_digest: bytes | None = None
        self.sent_bytes = 0
        if named_tensors is None:
            self._manifest = wanted
            return
        if isinstance(named_tensors, Mapping) or isinstance(named_tensors, Sequence):
            self._check(named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors)
        elif options.is_delta:
            raise TypeError('encoding="delta" announces its tensors first: give a mapping or a list of (name, tensor), not an iterator')
        if options.is_delta:
            pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
            self._manifest = [spec for spec in (self._accept(name) for name, _ in pairs) if spec is not None]
        else:
            self._manifest = wanted

    @property
    def total_bytes(self) -> int:
        """Of all tensors that will come."""
        return sum(spec.num_bytes for spec in self._manifest)

    def start_request(self) -> weights_pb2.StartWeightUpdateRequest:
        """Announces the update and its tensors."""
        options = self.options
        request = weights_pb2.StartWeightUpdateRequest(
            update_id=self.update_id, base_step=options.base_step, target_step=options.step, label=options.label, components=options.components,
            encoding=options.encoding, in_flight=options.in_flight, rewind=options.rewind,
            deadline_ms=None if options.deadline is None else round(options.deadline * 1000))
        for spec in self._manifest:
            request.manifest.add(name=spec.name, dtype=spec.dtype, shape=spec.shape)
        return request

    def finish_request(self) -> weights_pb2.FinishWeightUpdateRequest:
        """With the digests that the result must have, if this plan has seen every tensor of a component."""
        request = weights_pb2.FinishWeightUpdateRequest(update_id=self.update_id)
        if self.options.is_delta or len(self._sent) < len(self._specs):
            return request
        for draft, wanted in ((False, self._target), (True, self._draft)):
            if not wanted:
                continue
            digest = ComponentDigest()
            for plain, spec in self._specs.items():
                if is_draft(plain) == draft:
                    digest.add(spec.name, spec.dtype, spec.shape, self._sent[plain])
            setattr(request, "expect_draft_digest" if draft else "expect_target_digest", digest.hex())
        return request

    def frames(self, named_tensors: NamedTensors) -> Iterator[Frame]:
        """Reads every tensor once, in the order given. The frames hold copies, so a tensor's memory may be used again when the next is asked for."""
        for spec, wire in self.tensors(named_tensors):
            digest = hashlib.sha256()
            for offset, data in wire.chunks(CHUNK_BYTES):
                digest.update(data)
                last = offset + len(data) == wire.num_bytes
                yield encode_frame(self.update_id, spec.name, offset, data, digest.digest() if last else b"")
                self.sent_bytes += len(data)
            self._sent[plain_name(spec.name)] = digest.digest()
        self._check_all_came()

    def write(self, named_tensors: NamedTensors, root: str | os.PathLike, path: str, progress: Progress, check: Callable[[], None]) -> None:
        """The same tensors as a safetensors file: root/path, or model.safetensors in that folder. In place only when it is whole."""
        file = pathlib.Path(root) / path
        if not path.endswith(".safetensors"):
            file = file / "model.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        header, begins, end = {}, {}, 0
        for spec in self._manifest:
            header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [end, end + spec.num_bytes]}
            begins[spec.name] = end
            end += spec.num_bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        partial = file.with_name(f".{file.name}.{self.update_id}.partial")
        try:
            with open(partial, "xb") as out:
                out.write(struct.pack("<Q", len(text)) + text)
                for spec, wire in self.tensors(named_tensors):
                    digest = hashlib.sha256()
                    out.seek(8 + len(text) + begins[spec.name])
                    for _, data in wire.chunks(CHUNK_BYTES):
                        check()
                        digest.update(data)
                        out.write(data)
                        self.sent_bytes += len(data)
                        progress.update(self.sent_bytes, spec.name)
                    self._sent[plain_name(spec.name)] = digest.digest()
                self._check_all_came()
                out.flush()
                os.fsync(out.fileno())
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)

    def tensors(self, named_tensors: NamedTensors) -> Iterator[tuple[TensorSpec, WireTensor]]:
        """Those that are sent, each with the server's tensor of its name. A tied lm_head is only hashed, to be compared at the end."""
        came: set[str] = set()
        for name, tensor in named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors:
            plain = plain_name(name)
            if plain in came:
                raise ValueError(f"{name}: came before, perhaps under another prefix")
            came.add(plain)
            spec = self._accept(name)
            if spec is not None:
                yield spec, WireTensor(name, tensor, spec.dtype, spec.shape)
            elif plain == "lm_head.weight" and self._target:
                embedding = self._specs["embed_tokens.weight"]
                digest = hashlib.sha256()
                for _, data in WireTensor(name, tensor, embedding.dtype, embedding.shape).chunks(CHUNK_BYTES):
                    digest.update(data)
                self._lm_head_digest = digest.digest()

    def _accept(self, name: str) -> TensorSpec | None:
        """The server's tensor of that name; None for one that is left out: vision, other components, a tied lm_head."""
        plain = plain_name(name)
        if plain in self._specs:
            return self._specs[plain]
        if is_vision(name) or not (self._draft if is_draft(name) else self._target) or (plain == "lm_head.weight" and self._ties_lm_head):
            return None
        raise ValueError(f"{name}: the server's model has no such tensor; it has {_some([spec.name for spec in self._specs.values()])}")

    def _check(self, pairs: Iterable[tuple[str, Any]]) -> None:
        came = set()
        for name, tensor in pairs:
            spec = self._accept(name)
            if plain_name(name) in came:
                raise ValueError(f"{name}: came before, perhaps under another prefix")
            came.add(plain_name(name))
            shape = getattr(tensor, "shape", None)
            if spec is not None and shape is not None and tuple(shape) != spec.shape:
                raise ValueError(f"{name}: shape {list(shape)}, but the server's tensor has {list(spec.shape)}")
        if not self.options.is_delta:
            self._refuse_missing(came)

    def _refuse_missing(self, came: Iterable[str]) -> None:
        missing = [spec.name for plain, spec in self._specs.items() if plain not in came]
        if not missing:
            return
        if all(is_draft(name) for name in missing) and self.options.components is None:
            raise ValueError(f"missing: {_some(missing)}, of the MTP layer that the server drafts with. Give them with the others, or "
                             'components=["target"] to keep the draft that is loaded')
        raise ValueError(f'missing: {_some(missing)}. A full update brings every tensor; encoding="delta" may leave some out')

    def _check_all_came(self) -> None:
        if not self.options.is_delta:
            self._refuse_missing(self._sent)
        if self._lm_head_digest is not None and self._lm_head_digest != self._sent.get("embed_tokens.weight"):
            raise ValueError("lm_head.weight: differs from embed_tokens.weight, but the server's model ties the two")


class _Stream:
    """One PushWeights call: frames go in at the caller's pace, a few are kept ready for grpc's thread that sends."""

    _END = object()

    def __init__(self, client: Client, timeout: float | None):
        self._frames: queue.Queue = queue.Queue(_QUEUED_FRAMES)
        endpoint = require_admin(client._admin)
        method = client._admin_channel.stream_unary(_PUSH_METHOD, request_serializer=None,
                                                    response_deserializer=weights_pb2.PushWeightsResult.FromString)
        self.call = method.future(iter(self._frames.get, self._END), timeout=timeout, metadata=endpoint.metadata())

    def put(self, message: Any, check: Callable[[], None]) -> None:
        """Raises grpc.RpcError when the call has ended."""
        while True:
            check()
            if self.call.done():
                self.call.result()  # raises, but for a server that had enough
                raise BebopError("the server ended the stream before it was whole")
            try:
                return self._frames.put(message, timeout=0.1)
            except queue.Full:
                pass

    def finish(self, check: Callable[[], None]) -> None:
        self.put(self._END, check)
        while True:
            check()
            try:
                self.call.result(timeout=0.1)
                return
            except grpc.FutureTimeoutError:
                pass

    def close(self) -> None:
        """Ends the call, and the thread that waits for frames."""
        self.call.cancel()
        while True:
            try:
                self._frames.put_nowait(self._END)
                return
            except queue.Full:
                try:
                    self._frames.get_nowait()
                except queue.Empty:
                    pass


class Push:
    """Feeds the open update of one server, over as many streams as it takes.

    What has not been acknowledged is kept, at most WINDOW_BYTES, and sent again after a lost stream: what the server has of it, it says, and
    it ignores repeats. Failures that a repeat cannot cure (RetryPolicy) are raised as BebopError.
    """

    def __init__(self, client: Client, update_id: str, deadline: Deadline, check: Callable[[], None]):
        self._client, self._update_id, self._deadline, self._check = client, update_id, deadline, check
        self._window: list[Frame] = []
        self._window_bytes = 0
        self._stream: _Stream | None = None
        # Of a stream that was lost and has not got further since.
        self._attempt = 0
        self._failing_since = 0.0
        self._frames_left = 0

    def put(self, frame: Frame) -> None:
        self._window.append(frame)
        self._window_bytes += len(frame.message)
        self._try(lambda: self._open().put(frame.message, self._check), resend=False)
        if self._window_bytes >= WINDOW_BYTES:
            self.flush()

    def flush(self) -> None:
        """Returns when the server has everything so far."""
        if self._window:
            self._try(lambda: self._open().finish(self._check), resend=True)
        self._stream = None
        self._window.clear()
        self._window_bytes = 0

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _open(self) -> _Stream:
        if self._stream is None:
            self._stream = _Stream(self._client, self._deadline.remaining())
        return self._stream

    def _try(self, step: Callable[[], None], resend: bool) -> None:
        """Does `step`; after a lost stream, sends the window again (whose last frame `step` may be) and, with `resend`, repeats the step."""
        failed = False
        while True:
            try:
                if failed:
                    frames = self._unacknowledged()
                    if len(frames) != self._frames_left:
                        self._frames_left, self._attempt = len(frames), 0
                    for frame in frames:
                        self._open().put(frame.message, self._check)
                if not failed or (resend and self._stream is not None):
                    step()
                return
            except grpc.RpcError as rpc_error:
                error = require_admin(self._client._admin).error(rpc_error)
            except BebopError as failure:
                error = failure
            self.close()
            failed = True
            self._attempt += 1
            if self._attempt == 1:
                self._failing_since = time.monotonic()
            policy = self._client._retry
            delay = policy.delay(error, self._attempt, time.monotonic() - self._failing_since) if policy else None
            if delay is None or not self._deadline.allows(delay):
                raise error from None
            wait_checked(delay, self._check)

    def _unacknowledged(self) -> list[Frame]:
        """Frames of the window that the server still needs."""
        message = self._client._call(weights_pb2_grpc.WeightsStub(self._client._admin_channel).GetWeightInfo, weights_pb2.GetWeightInfoRequest(),
                                     self._deadline.remaining(), self._client._admin, retry=None)
        if message.update.update_id != self._update_id:
            raise FailedPreconditionError(f"the update {self._update_id} is no longer open on {self._client._admin.address}: the server was "
                                          "restarted, or its deadline passed; begin a new one", reason="NO_UPDATE")
        missing = {tensor.name: tensor.next_offset for tensor in message.update.missing}
        every = len(missing) < 64  # otherwise the list may have been cut
        return [frame for frame in self._window if frame.end > missing.get(frame.tensor, frame.end if every else 0)]


def wait_checked(seconds: float, check: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(left, 0.1))


def push_all(clients: Sequence[Client], plan: UpdatePlan, named_tensors: NamedTensors, deadline: Deadline,
             check: Callable[[], None] = lambda: None) -> None:
    """Sends every tensor, read once, to all servers. Raises PushFailed for the first server that fails."""
    options = plan.options
    with open_progress(options.progress, plan.total_bytes, f"weights {options.step}") as progress:
        if options.transport == "disk":
            plan.write(named_tensors, options.root, options.path, progress, check)
            return
        pushes = [Push(client, plan.update_id, deadline, check) for client in clients]
        try:
            for frame in plan.frames(named_tensors):
                for i, push in enumerate(pushes):
                    _of(i, lambda: push.put(frame))
                progress.update(plan.sent_bytes + frame.end - frame.begin, frame.tensor)
            for i, push in enumerate(pushes):
                _of(i, push.flush)
        finally:
            for push in pushes:
                push.close()


class PushFailed(Exception):
    """Which of the servers failed, and how."""

    def __init__(self, index: int, error: BebopError):
        super().__init__(index, error)
        self.index, self.error = index, error


def _of(index: int, step: Callable[[], None]) -> None:
    try:
        step()
    except BebopError as error:
        raise PushFailed(index, error) from error


def result_of(message: weights_pb2.FinishWeightUpdateResult, plan: UpdatePlan, deadline: Deadline) -> UpdateResult:
    return UpdateResult(WeightInfo.from_proto(message.info), message.stage_seconds, message.swap_seconds, message.kept_samples,
                        message.recomputed_samples, message.ended_samples, plan.sent_bytes, deadline.elapsed())


def may_have_begun(failure: BaseException) -> bool:
    """Whether a start that failed may have opened the update. One that was refused must not be aborted: another learner's may be open under its id."""
    return not (isinstance(failure, BebopError) and failure.is_refusal)


class Weights:
    """The weights of one server: `client.weights`. Needs the client's admin address."""

    def __init__(self, client: Client):
        self._client = client

    def _call(self, method: str, request: Message, timeout: float | None, **more: Any) -> Any:
        endpoint = require_admin(self._client._admin)
        stub = weights_pb2_grpc.WeightsStub(self._client._admin_channel)
        return self._client._call(getattr(stub, method), request, timeout, endpoint, **more)

    def info(self, *, tensors: bool = False, timeout: float | None = None) -> WeightInfo:
        """Steps and digests of what is loaded, and the open update; with `tensors` also the list of tensors that an update brings."""
        return WeightInfo.from_proto(self._call("GetWeightInfo", weights_pb2.GetWeightInfoRequest(tensors=tensors), timeout))

    def check(self, *, timeout: float | None = None) -> WeightCheck:
        """Has the server hash its resident weights again."""
        return WeightCheck.from_proto(self._call("CheckWeights", weights_pb2.CheckWeightsRequest(), timeout))

    def abort(self, update_id: str = "", *, timeout: float | None = None) -> str:
        """Has the server forget an update, or whichever is open. Returns its id; "" if there was none.

        FailedPreconditionError (COMMITTING): it is being swapped in, or waits for running samples.
        """
        return self._call("AbortWeightUpdate", weights_pb2.AbortWeightUpdateRequest(update_id=update_id), timeout).update_id

    def update(self, named_tensors: NamedTensors, step: int, **options: Any) -> UpdateResult:
        """Brings new weights and returns when they are in use.

        Args:
          named_tensors: a mapping (model.state_dict()) or an iterable of (name, tensor), which is consumed lazily and once, in this thread.
            torch tensors or numpy arrays: float32, float16, float64 or bfloat16 (uint16 arrays are bfloat16 bits); cast to the server's types,
            ties to even. Tensors on a device are copied to the host one at a time. Names as in the checkpoint; what wrappers put in front is
            understood (bebop.tensors.plain_name). model.visual.* and a tied lm_head.weight are left out.
          step: the learner's version, above the loaded one unless rewind.
          label: the learner's own name for it; comes back with every sample.
          components: ["target"] keeps the loaded MTP layer, ["draft"] the model; None: both, and then the mtp.* tensors are needed.
          in_flight: what running samples do at the swap: "keep" their cache (kv_mixed tells), "recompute" it, "abort" (end, SUPERSEDED), or
            "wait" (the swap waits for them). A request's own weights.on_update goes first, except over "abort".
          encoding: "full", or "delta": tensors that are not given stay as in base_step, which must be loaded; needs a mapping or a list.
          base_step: the step that must be loaded now; None: any.
          rewind: allow a step that is not newer.
          transport: "stream", or "disk": writes a safetensors file to `root`/`path`, the server reads `path` beneath its --weights-root.
          deadline: seconds without any progress after which the server forgets the update; None: 600.
          progress: True for a bar on a terminal, or a callable (sent_bytes, total_bytes, tensor_name).
          update_id: a name never used before; None: one is made.
          timeout: seconds for the whole update; None: no limit.

        A lost stream goes on where it broke. Any other failure before the last step, KeyboardInterrupt included, aborts the update: the server keeps
        the weights it had. In the last step it is too late for that: after DeadlineExceededError, UnavailableError or an interrupt of it, only
        info() tells which weights are in use. A server that refuses to begin is left alone, with whatever update it has open.

        Raises ValueError or TypeError naming the tensor that does not fit (for a mapping before anything is sent), and BebopError:
        AbortedError (UPDATE_IN_PROGRESS), AlreadyExistsError (UPDATE_ID_REUSED), FailedPreconditionError (WRONG_BASE_STEP, STEP_NOT_NEWER),
        InvalidArgumentError (NON_FINITE, ...), ResourceExhaustedError (STAGING_BUDGET), DataLossError (DIGEST_MISMATCH).
        """
        return self._run(UpdateOptions(step, **options), named_tensors)

    def update_from_path(self, path: str, step: int, **options: Any) -> UpdateResult:
        """Has the server read a checkpoint beneath its --weights-root: a folder or a safetensors file. Options as of update, but for transport,
        encoding, root and progress. PermissionDeniedError: NO_WEIGHTS_ROOT, OUTSIDE_ROOT."""
        return self._run(path_options(path, step, options), None, path)

    def _run(self, options: UpdateOptions, named_tensors: NamedTensors | None, path: str | None = None) -> UpdateResult:
        deadline = Deadline(options.timeout)
        plan = UpdatePlan(options, self.info(tensors=True, timeout=deadline.remaining()), named_tensors)
        begun = False
        try:
            self._call("StartWeightUpdate", plan.start_request(), deadline.remaining())
            begun = True
            if named_tensors is not None:
                push_all([self._client], plan, named_tensors, deadline)
            source = path if named_tensors is None else options.path
            if source is not None:
                self._call("UpdateWeights", weights_pb2.UpdateWeightsRequest(update_id=plan.update_id, path=source), deadline.no_limit())
            finished = self._call("FinishWeightUpdate", plan.finish_request(), deadline.no_limit())
        except BaseException as failure:
            if begun or may_have_begun(failure):
                self._abort_quietly(plan.update_id)
            if isinstance(failure, PushFailed):
                raise failure.error from None
            raise
        return result_of(finished, plan, deadline)

    def _abort_quietly(self, update_id: str) -> None:
        try:
            self._call("AbortWeightUpdate", weights_pb2.AbortWeightUpdateRequest(update_id=update_id), _ABORT_SECONDS, retry=None)
        except BebopError:
            pass  # the server forgets it at its deadline; what failed first is what the caller must hear


def path_options(path: str, step: int, options: Mapping[str, Any]) -> UpdateOptions:
    unfit = sorted(set(options) & {"transport", "encoding", "root", "path", "progress"})
    if unfit:
        raise TypeError(f"update_from_path: {unfit[0]} does not go with a path")
    if not path:
        raise ValueError("path: empty")
    return UpdateOptions(step, **options)


_NO_MORE = object()


class _Stopped(Exception):
    """Raised in the thread that pushes when the task that waits for it is cancelled."""


class LoopIterator:
    """Lets a worker thread take tensors that the event loop's thread produces: learners' tensors and collectives belong to their thread."""

    def __init__(self, named_tensors: Any, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._pending: concurrent.futures.Future | None = None
        self._stopped = False
        self._async = named_tensors.__aiter__() if hasattr(named_tensors, "__aiter__") else None
        self._sync = iter(named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors) if self._async is None else None

    def __iter__(self) -> LoopIterator:
        return self

    def __next__(self) -> tuple[str, Any]:
        self._pending = asyncio.run_coroutine_threadsafe(self._advance(), self._loop)
        if self._stopped:
            self._pending.cancel()
        try:
            item = self._pending.result()
        except concurrent.futures.CancelledError:
            raise _Stopped from None
        if item is _NO_MORE:
            raise StopIteration
        return item

    def stop(self) -> None:
        """Ends a wait for the next tensor, and all that would come after it. Called in the loop's thread."""
        self._stopped = True
        if self._pending is not None:
            self._pending.cancel()

    async def _advance(self):
        if self._async is not None:
            try:
                name, tensor = await self._async.__anext__()
            except StopAsyncIteration:
                return _NO_MORE
        else:
            item = next(self._sync, _NO_MORE)
            if item is _NO_MORE:
                return item
            name, tensor = item
        return name, to_host(tensor)


async def push_all_async(clients: Sequence[Client], plan: UpdatePlan, named_tensors: Any, deadline: Deadline) -> None:
    """push_all in a thread, where hashing and casting do not hold up the loop; tensors are produced in the loop's own."""
    stop = threading.Event()

    def check():
        if stop.is_set():
            raise _Stopped

    loop = asyncio.get_running_loop()
    tensors = LoopIterator(named_tensors, loop)
    work = loop.run_in_executor(None, push_all, clients, plan, tensors, deadline, check)
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        tensors.stop()
        await asyncio.wait([work])
        work.exception()  # seen: nobody else asks for it
        raise


class AsyncWeights:
    """The weights of one server for asyncio: the methods of Weights as coroutines."""

    def __init__(self, client: AsyncClient):
        self._client = client

    async def _call(self, method: str, request: Message, timeout: float | None, **more: Any) -> Any:
        endpoint = require_admin(self._client._admin)
        self._client._connect()
        stub = weights_pb2_grpc.WeightsStub(self._client._admin_channel)
        return await self._client._call(getattr(stub, method), request, timeout, endpoint, **more)

    async def info(self, *, tensors: bool = False, timeout: float | None = None) -> WeightInfo:
        """As Weights.info."""
        return WeightInfo.from_proto(await self._call("GetWeightInfo", weights_pb2.GetWeightInfoRequest(tensors=tensors), timeout))

    async def check(self, *, timeout: float | None = None) -> WeightCheck:
        """As Weights.check."""
        return WeightCheck.from_proto(await self._call("CheckWeights", weights_pb2.CheckWeightsRequest(), timeout))

    async def abort(self, update_id: str = "", *, timeout: float | None = None) -> str:
        """As Weights.abort."""
        return (await self._call("AbortWeightUpdate", weights_pb2.AbortWeightUpdateRequest(update_id=update_id), timeout)).update_id

    async def update(self, named_tensors: Any, step: int, **options: Any) -> UpdateResult:
        """As Weights.update; also takes asynchronous iterators. Tensors are produced, and copied from a device, in the loop's thread; casting,
        hashing and sending are done in another. Cancelling the task aborts the update."""
        return await self._run(UpdateOptions(step, **options), named_tensors)

    async def update_from_path(self, path: str, step: int, **options: Any) -> UpdateResult:
        """As Weights.update_from_path."""
        return await self._run(path_options(path, step, options), None, path)

    async def _run(self, options: UpdateOptions, named_tensors: Any, path: str | None = None) -> UpdateResult:
        deadline = Deadline(options.timeout)
        plan = UpdatePlan(options, await self.info(tensors=True, timeout=deadline.remaining()), named_tensors)
        begun = False
        try:
            await self._call("StartWeightUpdate", plan.start_request(), deadline.remaining())
            begun = True
            if named_tensors is not None:
                with self._client._blocking_twin() as twin:
                    await push_all_async([twin], plan, named_tensors, deadline)
            source = path if named_tensors is None else options.path
            if source is not None:
                await self._call("UpdateWeights", weights_pb2.UpdateWeightsRequest(update_id=plan.update_id, path=source), deadline.no_limit())
            finished = await self._call("FinishWeightUpdate", plan.finish_request(), deadline.no_limit())
        except BaseException as failure:
            if begun or may_have_begun(failure):
                await asyncio.shield(self._abort_quietly(plan.update_id))
            if isinstance(failure, PushFailed):
                raise failure.error from None
            raise
        return result_of(finished, plan, deadline)

    async def _abort_quietly(self, update_id: str) -> None:
        try:
            await self._call("AbortWeightUpdate", weights_pb2.AbortWeightUpdateRequest(update_id=update_id), _ABORT_SECONDS, retry=None)
        except BebopError:
            pass  # as in Weights
