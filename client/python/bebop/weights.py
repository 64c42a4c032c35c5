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
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from bebop.errors import BebopError, FailedPreconditionError
from bebop.progress import open_progress
from bebop.tensors import to_host
from bebop.transport import Deadline, require_admin
from bebop.v1 import weights_pb2, weights_pb2_grpc
from bebop.weight_plan import Frame, NamedTensors, UpdateOptions, UpdatePlan, UpdateResult, WeightCheck, WeightInfo, path_options, result_of

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from bebop.aio import AsyncClient
    from bebop.client import Client

# What is sent on one stream, and kept so that it can be sent again if the stream is lost. Its end is acknowledged.
WINDOW_BYTES = 128 << 20
_QUEUED_FRAMES = 8
_ABORT_SECONDS = 5.0
_PUSH_METHOD = "/bebop.v1.Weights/PushWeights"


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
