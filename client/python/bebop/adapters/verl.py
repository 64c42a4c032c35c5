# SPDX-License-Identifier: Apache-2.0
"""verl: `actor_rollout_ref.rollout.name=bebop`.

Importing this module registers the replica, the server adapter and the checkpoint engine. verl does it by itself, because this package has an
entry point in its group `verl.plugins`; verl hides a failure of that import, so try `python -c "import bebop.adapters.verl"` if it knows no bebop.

Configuration, under actor_rollout_ref.rollout (docs/adapters.md has it in full):

    name: bebop
    tensor_model_parallel_size: 1            # a bebop server runs on one device
    checkpoint_engine: {backend: bebop}      # weights go from the trainer's rank 0 to every server over gRPC
    engine_kwargs:
      bebop:
        servers: ["node1:50051,node1:50052"]  # rollout and admin port of running servers, one a replica; without it each replica starts its own
        program: bebop-server                 # what a replica starts ...
        flags: ["--max-num-seqs=64"]          # ... and with which further flags
        token_file: /run/secrets/bebop        # whose first line is the bearer token (roles rollout, weights and admin)

Written against verl 0.9.1.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import ray
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout import base as rollout_base
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutMode, RolloutReplica, RolloutReplicaRegistry, TokenOutput
from verl.workers.rollout.utils import ensure_async_iterator

import bebop
from bebop.adapters.common import CUT_SHORT, loaded_step, refuse_non_finite

logger = logging.getLogger(__name__)

NAME = "bebop"
# How receive_weights of our engine says that there is nothing to load: the trainer has sent everything to the server itself.
SENT_ALREADY = "bebop"

# Until everything that ran has been returned by an abort. Longer than a call tries to reach a server.
_ABORT_SECONDS = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0

Endpoint = tuple[str, str]  # rollout port, admin port

_SAMPLING = ("temperature", "top_p", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos")
_READY = re.compile(r"bebop-server ready: .*rollout=(\S+).*admin=(\S+)")


def options_of(config: RolloutConfig) -> dict[str, Any]:
    """rollout.engine_kwargs.bebop, checked."""
    given = dict((config.engine_kwargs or {}).get(NAME) or {})
    known = ("servers", "program", "flags", "token_file", "start_timeout", "update")
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"engine_kwargs.bebop: unknown field {unknown[0]!r}; known: {', '.join(known)}")
    for server in given.get("servers") or ():
        if server.count(",") != 1:
            raise ValueError(f"engine_kwargs.bebop.servers: {server!r} is not 'host:rollout_port,host:admin_port'")
    return given


def actor_name(replica_rank: int, name_suffix: str = "") -> str:
    """Under which Ray knows the server's actor of a replica."""
    return f"bebop_server_{replica_rank}{name_suffix}"


def generate_params(sampling_params: dict[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """verl's sampling parameters as bebop's. Those that would change what is sampled, and that bebop does not have, are refused."""
    given = dict(sampling_params)
    params: dict[str, Any] = {"max_new_tokens": max_new_tokens, "logprobs": bool(given.pop("logprobs", False))}
    top_k = given.pop("top_k", None)
    if top_k is not None:
        params["top_k"] = max(0, top_k)  # verl's "all" is -1
    for penalty, neutral in (("repetition_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)):
        value = given.pop(penalty, None)
        if value is not None and value != neutral:
            raise ValueError(f"{penalty}: {value}, but bebop samples from the policy as it is; leave it at {neutral}")
    for name in _SAMPLING:
        value = given.pop(name, None)
        if value is not None:
            params[name] = list(value) if name == "stop" and not isinstance(value, str) else value
    min_tokens = given.pop("min_tokens", None)
    if min_tokens is not None:
        params["min_new_tokens"] = min_tokens
    left = sorted(name for name, value in given.items() if value is not None)
    if left:
        raise ValueError(f"sampling_params: bebop has no {left[0]!r}")
    return params


class RolloutServer:
    """The Ray actor of one replica: it starts a bebop-server, or attaches to one, and speaks verl's language to it."""

    def __init__(self, config: RolloutConfig, model_config: HFModelConfig, rollout_mode: RolloutMode, replica_rank: int,
                 visible_devices: str | None = None):
        self.config: RolloutConfig = omega_conf_to_dataclass(config)
        self.model_config = model_config
        self.rollout_mode = rollout_mode
        self.replica_rank = replica_rank
        self.global_steps: int | None = None  # what samples without tokens were asked under; others know their own
        self._options = options_of(self.config)
        self._visible_devices = visible_devices
        self._process: asyncio.subprocess.Process | None = None
        self._drain_task: asyncio.Task | None = None
        self._endpoint: Endpoint | None = None
        self._client: bebop.AsyncClient | None = None
        self._max_model_len = 0
        self._open = asyncio.Event()
        self._open.set()
        self._in_flight = 0
        self._rejecting = False

    # ---- life ----

    async def launch_server(self) -> Endpoint:
        """Starts the server, or finds the one that is given, and waits until it serves."""
        servers = self._options.get("servers")
        if servers:
            if self.replica_rank >= len(servers):
                raise ValueError(f"engine_kwargs.bebop.servers: {len(servers)} servers, but replica {self.replica_rank} wants its own")
            rollout, admin = servers[self.replica_rank].split(",")
            self._endpoint = (rollout.strip(), admin.strip())
        else:
            self._endpoint = await self._start_server()
        self._client = bebop.AsyncClient(self._endpoint[0], admin=self._endpoint[1], token_file=self._options.get("token_file"))
        await self._client.wait_until_serving(self._options.get("start_timeout", 300.0))
        info = await self._client.server_info()
        self._max_model_len = min(info.max_model_len, self.config.max_model_len or info.max_model_len)
        return self._endpoint

    async def _start_server(self) -> Endpoint:
        path = self.model_config.local_path or self.model_config.path
        # The port of a server without tokens stays on this machine.
        host = ray.util.get_node_ip_address().strip("[]") if any("--token-file" in flag for flag in self._options.get("flags", ())) else "127.0.0.1"
        command = [self._options.get("program", "bebop-server"), "--model", str(path), "--host", host, "--port", "0", "--admin-port", "0",
                   "--gpu-memory-utilization", str(self.config.gpu_memory_utilization), *self._options.get("flags", ())]
        environment = dict(os.environ)
        if self._visible_devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self._visible_devices
        self._process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment)
        while line := await self._process.stdout.readline():
            match = _READY.match(line.decode())
            if match:
                self._drain_task = asyncio.create_task(self._drain_output())
                return match[1], match[2]
        raise RuntimeError(f"{' '.join(command)}: ended with status {await self._process.wait()} before it was ready")

    async def _drain_output(self) -> None:
        while await self._process.stdout.readline():
            pass

    async def shutdown(self) -> None:
        """Ends a server that was started here."""
        if self._client is not None:
            await self._client.close()
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            await self._process.wait()

    def get_endpoint(self) -> Endpoint:
        """Its rollout and admin port."""
        if self._endpoint is None:
            raise RuntimeError(f"replica {self.replica_rank}: has no server yet; launch_server comes first")
        return self._endpoint

    def get_server_address(self) -> tuple[str, str]:
        """Host and rollout port."""
        host, port = self.get_endpoint()[0].rsplit(":", 1)
        return host.strip("[]"), port

    async def set_global_steps(self, global_steps: int) -> None:
        """verl's version of the weights that the server has."""
        self.global_steps = global_steps

    # ---- rollouts ----

    async def generate(self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, image_data: Any = None, video_data: Any = None,
                       audio_data: Any = None, mm_processor_kwargs: dict[str, Any] | None = None, priority: int = 0) -> TokenOutput:
        """One sample. A sample that was cut short has stop_reason "aborted" and its tokens so far; verl's client goes on from there."""
        for name, value in (("image_data", image_data), ("video_data", video_data), ("audio_data", audio_data)):
            if value:
                raise ValueError(f"{name}: bebop serves text")
        prompt_ids = [int(token) for token in prompt_ids]
        room = self._max_model_len - len(prompt_ids)
        if room < 1:
            raise ValueError(f"prompt_ids: {len(prompt_ids)} tokens leave no room in the model length of {self._max_model_len}")
        sampling_params = dict(sampling_params)
        asked = [value for value in (sampling_params.pop(key, None) for key in ("max_tokens", "max_new_tokens")) if value is not None]
        budget = asked[0] if asked else min(self.config.response_length, self.config.prompt_length + self.config.response_length - len(prompt_ids))
        params = generate_params(sampling_params, max(1, min(budget, room)))
        if self.config.ignore_eos:
            params.setdefault("ignore_eos", True)
        while not self._open.is_set():
            if self._rejecting:
                return TokenOutput(token_ids=[], log_probs=[], stop_reason="aborted", num_preempted=0, extra_fields=self._extra_fields())
            await self._open.wait()
        self._in_flight += 1
        try:
            group = await self._client.generate(prompt_ids, request_id=request_id, priority=priority, **params)
        finally:
            self._in_flight -= 1
        sample = group.samples[0]
        refuse_non_finite(sample, request_id)
        return TokenOutput(
            token_ids=sample.token_ids.tolist(), log_probs=sample.logprobs.tolist() if sample.logprobs is not None else None,
            stop_reason="aborted" if sample.finish.reason in CUT_SHORT else "completed", num_preempted=sample.usage.preemptions,
            extra_fields=self._extra_fields(sample))

    def _extra_fields(self, sample: bebop.SampleResult | None = None) -> dict[str, Any]:
        fields: dict[str, Any] = {"global_steps": self.global_steps, "num_cached_tokens": 0, "spec_num_draft_tokens": 0,
                                  "spec_num_accepted_tokens": 0, "spec_num_verify_steps": 0}
        if sample is None:
            return fields
        fields.update(num_cached_tokens=sample.usage.cached_tokens, spec_num_draft_tokens=sample.spec.num_draft_tokens,
                      spec_num_accepted_tokens=sample.spec.num_accepted_draft_tokens, spec_num_verify_steps=sample.spec.num_spec_steps)
        if sample.weight_spans:
            # The versions that sampled these tokens, which the trainer could only guess at.
            steps = [span.step for span in sample.weight_spans]
            fields.update(global_steps=steps[-1], min_global_steps=min(steps), max_global_steps=max(steps))
        return fields

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        """Ends what runs or waits, and holds what comes (or ends it at once: reject_request) until resume_generation. All that ended has been
        returned when this returns. TimeoutError: some request has not come back, though the server was told to end it."""
        self._rejecting = reject_request
        self._open.clear()
        aborted = (await self._client.pause("abort")).aborted_samples
        deadline, pause = time.monotonic() + _ABORT_SECONDS, _FIRST_PAUSE
        while self._in_flight > 0:
            if time.monotonic() > deadline:
                raise TimeoutError(f"abort_all_requests: {self._in_flight} requests have not come back from {self._endpoint} within "
                                   f"{_ABORT_SECONDS:g} s; generation is paused")
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE, 2 * pause)
            # A request that had left here, but came to the server after the pause, waits there.
            if self._in_flight > 0:
                aborted += (await self._client.pause("abort")).aborted_samples
        return {"aborted_count": aborted, "request_ids": []}

    async def resume_generation(self) -> None:
        """After abort_all_requests: what was held goes on, what comes is served."""
        await self._client.resume()
        self._rejecting = False
        self._open.set()

    # ---- memory ----

    async def sleep(self) -> None:
        """Gives the device's memory back."""
        # A standalone replica shares its device with nobody.
        if self.config.free_cache_engine and self.rollout_mode != RolloutMode.STANDALONE:
            await self._client.sleep()

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Takes it again: "weights", "kv_cache", or both."""
        if self.config.free_cache_engine and self.rollout_mode != RolloutMode.STANDALONE:
            await self._client.wake_up(tags or ())

    async def release_kv_cache(self) -> None:
        """As sleep, of the caches alone."""
        if self.config.free_cache_engine and self.rollout_mode != RolloutMode.STANDALONE:
            await self._client.sleep("kv_cache")

    async def resume_kv_cache(self) -> None:
        """As wake_up, of the caches alone."""
        if self.config.free_cache_engine and self.rollout_mode != RolloutMode.STANDALONE:
            await self._client.wake_up("kv_cache")

    async def clear_kv_cache(self) -> None:
        """Nothing: the server keeps no cache from one request to the next, and has ended what runs."""

    async def start_profile(self, **kwargs: Any) -> None:
        """Warns that there is none."""
        logger.warning("bebop: start_profile: the server has no profiler; nsys or perf see its process")

    async def stop_profile(self) -> None:
        """Nothing: see start_profile."""


class BebopReplica(RolloutReplica):
    """One bebop server. Standalone replicas of running servers (engine_kwargs.bebop.servers) take no device from Ray."""

    def __init__(self, replica_rank: int, config: RolloutConfig, model_config: HFModelConfig, gpus_per_node: int = 8, is_reward_model: bool = False,
                 is_teacher_model: bool = False, name_suffix: str = ""):
        super().__init__(replica_rank, config, model_config, gpus_per_node, is_reward_model, is_teacher_model, name_suffix)
        if is_reward_model or is_teacher_model:
            raise ValueError("rollout.name=bebop: a bebop server is a policy, not a reward or teacher model")
        if self.world_size != 1:
            raise ValueError(f"rollout: tensor_model_parallel_size={self.config.tensor_model_parallel_size}, data_parallel_size="
                             f"{self.config.data_parallel_size}, pipeline_model_parallel_size={self.config.pipeline_model_parallel_size}, but a "
                             "bebop server runs on one device: set all three to 1 and have more replicas")
        self._attached = bool(options_of(self.config).get("servers"))

    async def init_standalone(self):
        if not self._attached:
            return await super().init_standalone()
        from verl.single_controller.ray import RayResourcePool, RayWorkerGroup

        self.rollout_mode = RolloutMode.STANDALONE
        self.resource_pool = RayResourcePool([1], use_gpu=False, name_prefix=f"bebop_pool_{self.replica_rank}{self.name_suffix}",
                                             max_colocate_count=2)
        self.workers = RayWorkerGroup(resource_pool=self.resource_pool, ray_cls_with_init=self.get_ray_class_with_init_args(), bin_pack=False,
                                      name_prefix=f"bebop_standalone_{self.replica_rank}{self.name_suffix}", use_gpu=False, device_name="cpu").workers
        await self.launch_servers()

    async def launch_servers(self):
        node_id, devices = await self.workers[0].__ray_call__.remote(_node_and_devices)
        server = ray.remote(RolloutServer).options(
            scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id=node_id, soft=False), num_cpus=0,
            name=actor_name(self.replica_rank, self.name_suffix), max_concurrency=self.max_concurrency,
        ).remote(self.config, self.model_config, self.rollout_mode, self.replica_rank, devices)
        self.servers = [server]
        rollout, _ = await server.launch_server.remote()
        self._server_handle, self._server_address = server, rollout


def _node_and_devices(worker: Any) -> tuple[str, str | None]:
    """Where a worker lives and, if it has them, its devices: in the worker's process."""
    context = ray.get_runtime_context()
    devices = context.get_accelerator_ids().get("GPU")
    return context.get_node_id(), ",".join(devices) if devices else None


# The adapter of this process, of which verl makes one a rollout worker: where its checkpoint engine finds the worker's server.
_adapter: ServerAdapter | None = None


class ServerAdapter(BaseRollout):
    """The replica's server as seen from the process that has, or receives, new weights."""

    def __init__(self, config: RolloutConfig, model_config: HFModelConfig, device_mesh: Any, replica_rank: int = -1):
        super().__init__(config, model_config, device_mesh)
        global _adapter
        rank = int(os.environ["RANK"])
        self.replica_rank = rank if replica_rank == -1 else replica_rank
        self.is_leader_rank = True  # one process a replica
        self._options = options_of(self.config)
        self._server: ray.actor.ActorHandle | None = None
        self._client: bebop.AsyncClient | None = None
        _adapter = self

    def server(self) -> ray.actor.ActorHandle:
        # The server's actor may be made after this object.
        if self._server is None:
            self._server = ray.get_actor(actor_name(self.replica_rank))
        return self._server

    async def client(self) -> bebop.AsyncClient:
        if self._client is None:
            rollout, admin = await self.server().get_endpoint.remote()
            self._client = bebop.AsyncClient(rollout, admin=admin, token_file=self._options.get("token_file"))
        return self._client

    async def resume(self, tags: list[str]):
        if self.config.free_cache_engine:
            await (await self.client()).wake_up(tags)

    async def release(self):
        if self.config.free_cache_engine:
            await (await self.client()).sleep()

    async def update_weights(self, weights: Any, wire_format: str = "named_tensors", global_steps: int | None = None, peft_config: Any = None,
                             **kwargs: Any):
        """Sends (name, tensor) pairs to the server as version `global_steps`; unset: the next."""
        if wire_format == SENT_ALREADY:
            async for name, _ in ensure_async_iterator(weights):
                raise ValueError(f"{name}: the checkpoint engine 'bebop' sends tensors to the server itself")
        elif wire_format != "named_tensors":
            raise NotImplementedError(f"wire_format: {wire_format!r}, but bebop takes named_tensors; use checkpoint_engine.backend=bebop")
        elif peft_config is not None:
            raise NotImplementedError("model.lora: bebop serves no adapters; set model.lora.merge=True")
        else:
            await send_weights(await self.client(), ensure_async_iterator(weights), global_steps, self._options.get("update"))
        if global_steps is not None:
            await self.server().set_global_steps.remote(global_steps)


async def send_weights(client: bebop.AsyncClient | bebop.AsyncFleet, weights: AsyncIterator[tuple[str, Any]], global_steps: int | None,
                       options: dict[str, Any] | None) -> int:
    """Returns the step. The MTP layer stays as it is unless options has components=["target", "draft"], which needs a trainer that exports it."""
    loaded = loaded_step(await client.weights.info())
    step = loaded + 1 if global_steps is None else global_steps
    # Trainers that begin, or go on from a checkpoint, count from a step that the server may have seen.
    await client.weights.update(weights, step, **{"components": ["target"], "rewind": step <= loaded, **(options or {})})
    return step


@CheckpointEngineRegistry.register(NAME)
class BebopCheckpointEngine(CheckpointEngine):
    """Weights go from the trainer's rank 0 straight to every replica's server, over gRPC: all replicas take them or none.

    checkpoint_engine.engine_kwargs.bebop: token_file; update, with more arguments of weights.update, e.g. {in_flight: recompute}.
    """

    wire_format = SENT_ALREADY

    def __init__(self, bucket_size: int = 0, is_master: bool = False, token_file: str | None = None, update: dict[str, Any] | None = None):
        self._is_master, self._token_file, self._update = is_master, token_file, update
        self._servers: list[Endpoint] = []

    def prepare(self) -> dict[str, Any]:
        # Trainer processes may hold an adapter, too; build_topology looks at rollout workers alone.
        return {"server": ray.get(_adapter.server().get_endpoint.remote()) if _adapter is not None and not self._is_master else None}

    @classmethod
    def build_topology(cls, actor_wg_world_size: int, rollout_world_size: int,
                       metadata: list[dict[str, Any]]) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        servers = [tuple(entry["server"]) for entry in metadata[actor_wg_world_size:] if entry["server"] is not None]
        if len(servers) != rollout_world_size:
            raise RuntimeError(f"{rollout_world_size} rollout workers, but {len(servers)} of them know a bebop server; is rollout.name bebop?")
        return {"servers": [servers] * actor_wg_world_size}, {"servers": [[]] * rollout_world_size}

    def init_process_group(self, servers: list[Endpoint]) -> None:
        self._servers = servers

    async def send_weights(self, weights: Any, global_steps: int | None = None) -> dict[str, float]:
        if not self._is_master:
            async for _ in ensure_async_iterator(weights):
                pass  # putting tensors together takes every rank
            return {}
        begin = time.monotonic()
        async with bebop.AsyncFleet(self._servers, token_file=self._token_file) as fleet:
            await send_weights(fleet, ensure_async_iterator(weights), global_steps, self._update)
        return {"bebop/weight_update_seconds": time.monotonic() - begin}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, Any]]:
        """Nothing comes: see wire_format."""
        return
        yield

    def finalize(self) -> None:
        self._servers = []


def register() -> None:
    RolloutReplicaRegistry.register(NAME, lambda: BebopReplica)
    # verl has no function for this one.
    rollout_base._ROLLOUT_REGISTRY[(NAME, "async")] = f"{__name__}.{ServerAdapter.__name__}"


register()
