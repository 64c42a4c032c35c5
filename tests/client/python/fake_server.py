# SPDX-License-Identifier: Apache-2.0
"""The Weights and Control services as weights.proto and control.proto describe them, in this process, with faults to order.

Small and strict: what it does not check, the tests with the real server do.
"""

import concurrent.futures
import hashlib
import json
import threading

import grpc
import numpy as np

from bebop.rpc import health_pb2, status_pb2
from bebop.v1 import control_pb2, control_pb2_grpc, info_pb2, info_pb2_grpc, rollout_pb2, rollout_pb2_grpc, weights_pb2, weights_pb2_grpc

# A model in little: another prefix than some learners export, float32 and bfloat16, an MTP layer, one tensor of several chunks.
SPECS = [("model.language_model.embed_tokens.weight", "BF16", (96, 32)), ("model.language_model.layers.0.mlp.up_proj.weight", "BF16", (3000, 1500)),
         ("model.language_model.layers.0.linear_attn.A_log", "F32", (8,)), ("model.language_model.norm.weight", "BF16", (32,)),
         ("mtp.fc.weight", "BF16", (32, 64)), ("mtp.norm.weight", "BF16", (32,))]


def fail(context, code, reason, message, **metadata):
    info = status_pb2.ErrorInfo(reason=reason, domain="bebop", metadata=metadata)
    status = status_pb2.Status(code=code.value[0], message=message)
    status.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=info.SerializeToString())
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, message)


def element_bytes(dtype):
    return 2 if dtype == "BF16" else 4


def component_digest(tensors, specs, draft):
    lines = sorted((name, f"{name} {dtype} {','.join(map(str, shape))} {hashlib.sha256(tensors[name]).hexdigest()}\n")
                   for name, dtype, shape in specs if name.startswith("mtp.") == draft)
    return hashlib.sha256("".join(line for _, line in lines).encode()).hexdigest() if lines else ""


class FakeServer(weights_pb2_grpc.WeightsServicer, control_pb2_grpc.ControlServicer, rollout_pb2_grpc.RolloutServicer, info_pb2_grpc.InfoServicer):
    """Attributes that order faults: lose_stream_after (list of chunk counts: each stream ends so, once), start_errors (list of codes, each once: the
    reply is lost), finish_errors (list of codes, each once), finish_gate (an Event that a finish waits for), weights_root (a folder), generate_error
    (code of every generate), max_resume_bytes (more handles are refused)."""

    def __init__(self, specs=SPECS, token=None):
        self.specs = list(specs)
        self.tensors = {name: bytes(element_bytes(dtype) * int(np.prod(shape))) for name, dtype, shape in self.specs}
        self.step, self.draft_step, self.label, self.update_id, self.num_updates = 0, 0, None, "", 0
        self.open = None  # the StartWeightUpdateRequest
        self.staged = {}  # name -> (bytearray, list of received flags by byte range)
        self.finished = {}
        self.calls, self.streams, self.chunks, self.digests = [], 0, [], {}
        self.lose_stream_after, self.start_errors, self.finish_errors, self.generate_error = [], [], [], None
        self.finish_gate = self.weights_root = None
        self.metadata = {}
        self.state = control_pb2.ControlState()
        self.requests = []
        self.max_resume_bytes = 32 << 20
        self.lock = threading.Lock()
        self.server = grpc.server(concurrent.futures.ThreadPoolExecutor(16), options=[("grpc.max_receive_message_length", 16 << 20)])
        for add in (weights_pb2_grpc.add_WeightsServicer_to_server, control_pb2_grpc.add_ControlServicer_to_server,
                    rollout_pb2_grpc.add_RolloutServicer_to_server, info_pb2_grpc.add_InfoServicer_to_server):
            add(self, self.server)
        check = grpc.unary_unary_rpc_method_handler(lambda request, context: health_pb2.HealthCheckResponse(status=1),
                                                    health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString)
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check}),))
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{self.port}"
        self.server.start()

    def stop(self):
        if self.finish_gate is not None:
            self.finish_gate.set()
        self.server.stop(None).wait()

    # ---- weights ----

    def _info(self, tensors=False):
        info = weights_pb2.WeightInfo(target_step=self.step, draft_step=self.draft_step, label=self.label, update_id=self.update_id,
                                      target_digest=component_digest(self.tensors, self.specs, False),
                                      draft_digest=component_digest(self.tensors, self.specs, True), num_updates=self.num_updates)
        if self.open is not None:
            info.update.CopyFrom(self._progress())
        if tensors:
            for name, dtype, shape in self.specs:
                info.tensors.add(name=name, dtype=dtype, shape=shape)
        return info

    def _progress(self):
        update = weights_pb2.WeightUpdate(update_id=self.open.update_id, target_step=self.open.target_step, num_tensors=len(self.open.manifest))
        for spec in self.open.manifest:
            data, came = self.staged[spec.name]
            update.received_bytes += int(came.sum())
            update.expected_bytes += len(data)
            if came.all():
                update.complete_tensors += 1
            elif len(update.missing) < 64:
                update.missing.add(name=spec.name, next_offset=int(np.argmin(came)))
        return update

    def GetWeightInfo(self, request, context):
        self.metadata = dict(context.invocation_metadata())
        with self.lock:
            return self._info(request.tensors)

    def StartWeightUpdate(self, request, context):
        with self.lock:
            self.calls.append("start")
            if self.open is not None and request != self.open and request.update_id == self.open.update_id:
                fail(context, grpc.StatusCode.ALREADY_EXISTS, "UPDATE_ID_REUSED", f"update {request.update_id} is open with another body")
            if self.open is not None and request != self.open:
                fail(context, grpc.StatusCode.ABORTED, "UPDATE_IN_PROGRESS", f"update {self.open.update_id} is open")
            if request.HasField("base_step") and request.base_step != self.step:
                fail(context, grpc.StatusCode.FAILED_PRECONDITION, "WRONG_BASE_STEP", f"base_step {request.base_step}, loaded {self.step}")
            if request.target_step <= self.step and not request.rewind:
                fail(context, grpc.StatusCode.FAILED_PRECONDITION, "STEP_NOT_NEWER", f"target_step {request.target_step}, loaded {self.step}")
            if self.open is None:
                self.open, self.digests = request, {}
                known = {name: (dtype, shape) for name, dtype, shape in self.specs}
                for spec in request.manifest:
                    assert known[spec.name] == (spec.dtype, tuple(spec.shape)), spec
                delta = request.encoding == weights_pb2.WeightEncoding.OVERWRITE_DELTA
                self.staged = {spec.name: (bytearray(self.tensors[spec.name]), np.full(len(self.tensors[spec.name]), False)) for spec in request.manifest}
                if not delta:
                    targets = [name for name, _, _ in self.specs if not request.components or (2 if name.startswith("mtp.") else 1) in request.components]
                    assert sorted(self.staged) == sorted(targets)
            if self.start_errors:
                context.abort(self.start_errors.pop(0), "ordered, after it was opened")
            return self._progress()

    def PushWeights(self, request_iterator, context):
        self.streams += 1
        limit = self.lose_stream_after.pop(0) if self.lose_stream_after else None
        for count, chunk in enumerate(request_iterator):
            if count == limit:
                context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
            with self.lock:
                if self.open is None or chunk.update_id != self.open.update_id:
                    fail(context, grpc.StatusCode.FAILED_PRECONDITION, "NO_UPDATE", f"update {chunk.update_id} is not open")
                self.chunks.append((chunk.tensor, chunk.offset, len(chunk.data)))
                if chunk.digest and self.digests.setdefault(chunk.tensor, chunk.digest) != chunk.digest:
                    fail(context, grpc.StatusCode.ALREADY_EXISTS, "CHUNK_CONFLICT", f"{chunk.tensor}: another digest came before")
                assert len(chunk.data) <= 4 << 20
                data, came = self.staged[chunk.tensor]
                end = chunk.offset + len(chunk.data)
                values = np.frombuffer(chunk.data, "<u2").astype(np.uint32) << 16 if len(data) % 4 or self._dtype(chunk.tensor) == "BF16" \
                    else np.frombuffer(chunk.data, "<u4")
                if not np.isfinite(values.view(np.float32)).all():
                    fail(context, grpc.StatusCode.INVALID_ARGUMENT, "NON_FINITE", f"{chunk.tensor}: not finite", field=chunk.tensor)
                data[chunk.offset:end] = chunk.data
                came[chunk.offset:end] = True
                if chunk.digest and came.all() and hashlib.sha256(data).digest() != chunk.digest:
                    fail(context, grpc.StatusCode.DATA_LOSS, "DIGEST_MISMATCH", chunk.tensor)
        with self.lock:
            return weights_pb2.PushWeightsResult(update=self._progress() if self.open is not None else None)

    def UpdateWeights(self, request, context):
        with self.lock:
            content = (self.weights_root / request.path / "model.safetensors").read_bytes()
            size = int.from_bytes(content[:8], "little")
            header = json.loads(content[8:8 + size])
            for name, (data, came) in self.staged.items():
                begin, end = header[name]["data_offsets"]
                data[:] = content[8 + size + begin:8 + size + end]
                came[:] = True
            return weights_pb2.UpdateWeightsResult(update=self._progress())

    def _dtype(self, name):
        return next(dtype for known, dtype, _ in self.specs if known == name)

    def FinishWeightUpdate(self, request, context):
        self.calls.append("finish")
        if self.finish_gate is not None:
            self.finish_gate.wait(30)
        with self.lock:
            if request.update_id in self.finished:
                return self.finished[request.update_id]
            if self.finish_errors:
                code, when = self.finish_errors.pop(0)
                if when == "after":
                    self._commit(request.update_id)
                context.abort(code, "ordered")
            if self.open is None or self.open.update_id != request.update_id:
                fail(context, grpc.StatusCode.FAILED_PRECONDITION, "NO_UPDATE", f"update {request.update_id} is not open")
            if self._progress().missing and self.open.encoding != weights_pb2.WeightEncoding.OVERWRITE_DELTA:
                fail(context, grpc.StatusCode.FAILED_PRECONDITION, "INCOMPLETE", str(self._progress().missing))
            return self._commit(request.update_id, request)

    def _commit(self, update_id, request=None):
        tensors = {**self.tensors, **{name: bytes(data) for name, (data, _) in self.staged.items()}}
        if request is not None and request.expect_target_digest:
            assert request.expect_target_digest == component_digest(tensors, self.specs, False)
        if request is not None and request.expect_draft_digest:
            assert request.expect_draft_digest == component_digest(tensors, self.specs, True)
        self.expected = request
        if not self.open.components or 1 in self.open.components:
            self.step = self.open.target_step
        if not self.open.components or 2 in self.open.components:
            self.draft_step = self.open.target_step
        self.tensors, self.update_id, self.num_updates = tensors, update_id, self.num_updates + 1
        self.label = self.open.label if self.open.HasField("label") else None
        self.open, self.staged = None, {}
        result = weights_pb2.FinishWeightUpdateResult(info=self._info(), stage_seconds=0.5, swap_seconds=0.001, kept_samples=3)
        self.finished[update_id] = result
        return result

    def AbortWeightUpdate(self, request, context):
        with self.lock:
            self.calls.append("abort")
            if self.open is None or (request.update_id and request.update_id != self.open.update_id):
                return weights_pb2.AbortWeightUpdateResult()
            name, self.open, self.staged = self.open.update_id, None, {}
            return weights_pb2.AbortWeightUpdateResult(update_id=name)

    def CheckWeights(self, request, context):
        with self.lock:
            return weights_pb2.CheckWeightsResult(target_matches=True, draft_matches=True, target_digest=component_digest(self.tensors, self.specs, False))

    # ---- control: remembers what was asked ----

    def PauseGeneration(self, request, context):
        self.requests.append(request)
        self.state.paused = True
        self.state.abort_epoch += request.mode == control_pb2.PauseGenerationRequest.ABORT
        return self.state

    def ResumeGeneration(self, request, context):
        self.state.paused = False
        return self.state

    def Sleep(self, request, context):
        self.requests.append(request)
        self.state.sleeping[:] = request.tags or ["weights", "kv_cache"]
        return self.state

    def WakeUp(self, request, context):
        del self.state.sleeping[:]
        return self.state

    def FlushCache(self, request, context):
        if not self.state.paused:
            fail(context, grpc.StatusCode.FAILED_PRECONDITION, "NOT_PAUSED", "generation runs")
        return self.state

    def Drain(self, request, context):
        self.requests.append(request)
        self.state.draining = True
        return self.state

    def SetSpeculation(self, request, context):
        self.state.speculation.MergeFrom(request.speculation)
        return self.state

    # ---- rollout: samples that say where they come from ----

    def Generate(self, request, context):
        with self.lock:
            self.requests.append(request)
        if self.generate_error is not None:
            context.abort(self.generate_error, "ordered")
        result = rollout_pb2.GenerateResult(request_id=request.request_id)
        if request.resume and (len(request.resume) != request.num_samples or sum(map(len, request.resume)) > self.max_resume_bytes):
            fail(context, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", f"resume: {len(request.resume)} handles")
        # A handle begins with its sample's index.
        for i in [handle[0] for handle in request.resume] or range(request.num_samples):
            sample = result.samples.add(sample_index=i, token_ids=[self.port % 1000, i], finish=rollout_pb2.Finish(reason="LENGTH"))
            sample.weight_spans.add(step=self.step, end=2)
        return result

    def GenerateStream(self, request, context):
        for sample in self.Generate(request, context).samples:
            yield rollout_pb2.GenerateEvent(sample_result=sample)
        yield rollout_pb2.GenerateEvent(group_done=rollout_pb2.GroupDone(request_id=request.request_id, num_samples=request.num_samples))

    def GetServerInfo(self, request, context):
        return info_pb2.ServerInfo(weight_step=self.step)
