# SPDX-License-Identifier: Apache-2.0
"""What fleets keep track of, asking nobody: their errors, which replicas get work, and how far an update has come."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bebop.errors import BebopError, UnavailableError
from bebop.transport import Deadline
from bebop.weight_plan import UpdateOptions, UpdatePlan, UpdateResult, WeightInfo, result_of
from bebop.weights import PushFailed, may_have_begun

# How long a replica may take to answer whether it is back.
PROBE_SECONDS = 2.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0


class FleetError(BebopError):
    """A call to all replicas that failed on some.

    Attributes: errors: BebopError by address; results: what the others answered, by address. `code` and `reason` are the first failure's.
    """

    def __init__(self, what: str, errors: Mapping[str, BebopError], results: Mapping[str, Any]):
        first = next(iter(errors.values()))
        failures = "; ".join(f"{address}: {error}" for address, error in errors.items())
        super().__init__(f"{what} failed on {len(errors)} of {len(errors) + len(results)} replicas: {failures}", code=first.code,
                         reason=first.reason, metadata=first.metadata)
        self.what, self.errors, self.results = what, dict(errors), dict(results)

    def __reduce__(self):
        return type(self), (self.what, self.errors, self.results)


class FleetUpdateError(FleetError):
    """A weight update that failed on some replicas.

    Attributes:
      stage: "start", "push" or "finish". Before "finish" no replica has the new weights.
      updated, unchanged, unknown: addresses, by what is loaded there now: the new weights, the old ones, or nobody knows. Those of `unknown` are
        out of rotation until their weights agree with a replica's in rotation; before "finish" they are those that could not be asked.
      versions: WeightInfo by address; None for unknown.
    """

    def __init__(self, stage: str, errors: Mapping[str, BebopError], results: Mapping[str, Any], versions: Mapping[str, WeightInfo | None],
                 update_id: str):
        super().__init__(f"weight update ({stage})", errors, results)
        self.stage, self.versions, self.update_id = stage, dict(versions), update_id
        known = {address: info for address, info in versions.items() if info is not None}
        self.updated = [address for address, info in known.items() if info.update_id == update_id]
        self.unchanged = [address for address in known if address not in self.updated]
        self.unknown = [address for address, info in versions.items() if info is None]
        self.message += f". Steps now: {', '.join(f'{a}: {i.target_step if i else chr(63)}' for a, i in versions.items())}"

    def __reduce__(self):
        return type(self), (self.stage, self.errors, self.results, self.versions, self.update_id)


@dataclasses.dataclass(eq=False)
class Replica:
    client: Any
    address: str
    in_flight: int = 0  # samples sent by this fleet
    ready: bool = True
    probe_at: float = 0.0  # monotonic; of one that is not ready
    pause: float = _FIRST_PAUSE


class Rotation:
    """Who may get work, and who gets the next. Thread safe; asks nobody anything."""

    def __init__(self, replicas: list[Replica], balance: str):
        if balance not in ("least_loaded", "round_robin"):
            raise ValueError(f"balance: {balance!r} is none of least_loaded, round_robin")
        self.replicas = replicas
        self._balance = balance
        self._lock = threading.Lock()
        self._turn = 0
        self._step = 0  # highest that a replica in rotation is known to have had

    def pick(self, affinity: str | None, tried: Iterable[Replica]) -> Replica | None:
        """A ready replica that was not tried. The same `affinity` gives the same one as long as it is ready, whatever the others do."""
        with self._lock:
            ready = [replica for replica in self.replicas if replica.ready and replica not in tried]
            if not ready:
                return None
            if affinity is not None:
                return max(ready, key=lambda replica: hashlib.sha256(f"{affinity}\0{replica.address}".encode()).digest())
            self._turn += 1
            order = [self.replicas[(self._turn + i) % len(self.replicas)] for i in range(len(self.replicas))]
            order = [replica for replica in order if replica in ready]
            return order[0] if self._balance == "round_robin" else min(order, key=lambda replica: replica.in_flight)

    @contextlib.contextmanager
    def using(self, replica: Replica, samples: int) -> Iterator[None]:
        """Counts samples as running there, for those who look for the least loaded."""
        with self._lock:
            replica.in_flight += samples
        try:
            yield
        finally:
            with self._lock:
                replica.in_flight -= samples

    def failed(self, replica: Replica, error: BebopError, moves_when_full: bool = True) -> bool:
        """Notes a failure; whether another replica may do what this one did not. Nothing is repeated that may have been delivered: the caller's
        matter."""
        if error.code == "UNAVAILABLE":
            self.suspend(replica)
            return True
        # min_step: another replica may have the weights already.
        return error.reason == "STEP_NOT_REACHED" or (error.code == "RESOURCE_EXHAUSTED" and error.retry_after is not None and moves_when_full)

    def suspend(self, replica: Replica) -> None:
        with self._lock:
            if not replica.ready:
                replica.pause = min(_LONGEST_PAUSE, 2 * replica.pause)
            replica.ready = False
            replica.probe_at = time.monotonic() + replica.pause

    def restore(self, replica: Replica, step: int = 0) -> None:
        with self._lock:
            replica.ready, replica.pause = True, _FIRST_PAUSE
            self._step = max(self._step, step)

    def loaded(self, step: int) -> None:
        """An update was finished on every replica; its step may be a lower one."""
        with self._lock:
            self._step = step

    def due(self) -> tuple[list[Replica], list[Replica]]:
        """Replicas to be asked whether they are back, each by one caller, and those in rotation, which tell what weights to expect."""
        now = time.monotonic()
        with self._lock:
            due = [replica for replica in self.replicas if not replica.ready and replica.probe_at <= now]
            for replica in due:
                replica.pause = min(_LONGEST_PAUSE, 2 * replica.pause)
                replica.probe_at = now + replica.pause + PROBE_SECONDS
            return due, [replica for replica in self.replicas if replica.ready] if due else []

    def judge(self, answers: Mapping[Replica, tuple], references: Iterable[tuple]) -> None:
        """`answers`: versions of replicas that answered; a version begins with its step. Restores those that agree."""
        references = list(references)
        for replica, version in answers.items():
            if version in references if references else version[0] >= self._step:
                self.restore(replica, version[0])

    def why_none(self) -> UnavailableError:
        names = ", ".join(replica.address for replica in self.replicas)
        return UnavailableError(f"no replica in rotation ({names}): unreachable, draining, or with other weights than step {self._step}")


def clients_of(kind: type, replicas: Sequence[Any], options: Mapping[str, Any]) -> list[Replica]:
    if not replicas:
        raise ValueError("Fleet: no replicas")
    out = []
    for entry in replicas:
        if isinstance(entry, kind):
            client = entry
        elif isinstance(entry, str):
            client = kind(entry, **options)
        elif isinstance(entry, (tuple, list)) and len(entry) == 2:
            client = kind(*entry, **options)
        else:
            raise TypeError(f"Fleet: expected a {kind.__name__}, an address, or (rollout, admin), got {entry!r}")
        out.append(Replica(client, client._server.address))
    addresses = [replica.address for replica in out]
    if len(set(addresses)) < len(addresses):
        raise ValueError(f"Fleet: an address occurs twice among {', '.join(addresses)}")
    return out


def _check_same_model(infos: Mapping[str, WeightInfo]) -> None:
    (first, reference), *others = infos.items()
    for address, info in others:
        for one, other in zip(reference.tensors, info.tensors):
            if one != other:
                raise ValueError(f"{first} has {one}, but {address} has {other}: not the same model in the same types")
        if len(reference.tensors) != len(info.tensors):
            raise ValueError(f"{first} has {len(reference.tensors)} tensors, but {address} has {len(info.tensors)}: not the same model")


def split(outcomes: Mapping[str, Any]) -> tuple[dict[str, BebopError], dict[str, Any]]:
    errors = {address: outcome for address, outcome in outcomes.items() if isinstance(outcome, BebopError)}
    return errors, {address: outcome for address, outcome in outcomes.items() if address not in errors}


def _settled(outcome: WeightInfo | BebopError, update_id: str) -> WeightInfo | None:
    """What is loaded after a finish that failed; None while that is open."""
    if isinstance(outcome, BebopError) or (outcome.update is not None and outcome.update.update_id == update_id):
        return None
    return outcome


class UpdateStages:
    """The course of an update over several servers, as far as nobody has to be asked."""

    def __init__(self, rotation: Rotation, options: UpdateOptions, infos: Mapping[str, WeightInfo], named_tensors: Any):
        _check_same_model(infos)
        self.rotation, self.infos = rotation, infos
        self.plan = UpdatePlan(options, next(iter(infos.values())), named_tensors)
        self.stage = "start"
        self._refused: set[str] = set()  # addresses; what is open there under our id is somebody else's

    def note_start(self, client: Any, failure: BaseException) -> None:
        """A start that failed."""
        if not may_have_begun(failure):
            self._refused.add(client._server.address)

    @property
    def begun(self) -> list[Replica]:
        """Replicas where the update is, or may be, open."""
        return [replica for replica in self.rotation.replicas if replica.address not in self._refused]

    def failed_before_finish(self, failure: BaseException) -> BaseException:
        """What to raise for it."""
        if isinstance(failure, PushFailed):
            failed = self.rotation.replicas[failure.index]
            errors = {failed.address: failure.error}
            if failure.error.code == "UNAVAILABLE":
                self.rotation.suspend(failed)
        elif isinstance(failure, FleetError):
            errors = failure.errors
        else:
            return failure
        return FleetUpdateError(self.stage, errors, {address: info for address, info in self.infos.items() if address not in errors}, self.infos,
                                self.plan.update_id)

    def after_finish(self, outcomes: Mapping[str, Any], settled: Mapping[str, Any], deadline: Deadline) -> dict[str, UpdateResult]:
        """`outcomes`: FinishWeightUpdateResult or BebopError by address; `settled`: WeightInfo or BebopError of those that failed."""
        errors, messages = split(outcomes)
        results = {address: result_of(message, self.plan, deadline) for address, message in messages.items()}
        versions: dict[str, WeightInfo | None] = {address: result.info for address, result in results.items()}
        versions.update({address: _settled(settled[address], self.plan.update_id) for address in errors})
        if not errors:
            self.rotation.loaded(self.plan.options.step)
        for replica in self.rotation.replicas:
            if replica.address in results:
                self.rotation.restore(replica, results[replica.address].info.target_step)
            elif versions[replica.address] is None:
                self.rotation.suspend(replica)
        if errors:
            raise FleetUpdateError("finish", errors, results, {address: versions[address] for address in self.infos}, self.plan.update_id)
        return results
