# SPDX-License-Identifier: Apache-2.0
"""What a weight update is: the versions it leads from and to, its options, and the frames that carry its tensors. Nothing here talks to a server."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Union

from bebop.progress import Progress
from bebop.requests import enum_value
from bebop.tensors import ELEMENT_BYTES, ComponentDigest, WireTensor, is_draft, is_vision, plain_name
from bebop.transport import Deadline
from bebop.v1 import weights_pb2

NamedTensors = Union[Mapping[str, Any], Iterable[tuple[str, Any]]]

# Of the 4 MiB that the server takes: small enough that casting, hashing and copying find it in the cache.
CHUNK_BYTES = 1 << 20


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


def result_of(message: weights_pb2.FinishWeightUpdateResult, plan: UpdatePlan, deadline: Deadline) -> UpdateResult:
    return UpdateResult(WeightInfo.from_proto(message.info), message.stage_seconds, message.swap_seconds, message.kept_samples,
                        message.recomputed_samples, message.ended_samples, plan.sent_bytes, deadline.elapsed())


def path_options(path: str, step: int, options: Mapping[str, Any]) -> UpdateOptions:
    unfit = sorted(set(options) & {"transport", "encoding", "root", "path", "progress"})
    if unfit:
        raise TypeError(f"update_from_path: {unfit[0]} does not go with a path")
    if not path:
        raise ValueError("path: empty")
    return UpdateOptions(step, **options)
