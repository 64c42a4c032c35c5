# SPDX-License-Identifier: Apache-2.0
"""bebop.adapters.verl with the real verl and Ray: its registries, replicas, checkpoint engine manager and clients, against running servers."""

import asyncio
import os
import pathlib
import sys

import numpy as np
import pytest

for name, value in {"RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1", "VERL_LOGGING_LEVEL": "WARN",
                    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}.items():
    os.environ.setdefault(name, value)

import ray  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from verl.checkpoint_engine.base import CheckpointEngineManager, CheckpointEngineRegistry  # noqa: E402
from verl.single_controller.base import Worker  # noqa: E402
from verl.single_controller.base.decorator import Dispatch, register  # noqa: E402
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup  # noqa: E402
from verl.workers.config import CheckpointEngineConfig, HFModelConfig, RolloutConfig  # noqa: E402
from verl.workers.rollout.base import BaseRollout, get_rollout_class  # noqa: E402
from verl.workers.rollout.replica import RolloutMode, RolloutReplica, TokenOutput, get_rollout_replica_class  # noqa: E402

import bebop  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[3]
MODEL = ROOT / "tests/models/bebop-tiny"
SERVER = os.environ.get("BEBOP_SERVER", str(ROOT / "build/cpu-release/bin/bebop-server"))
PROMPT = [943, 85, 83, 69, 82, 198, 17, 10, 18]
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
SAMPLED = {**GREEDY, "temperature": 1.0}


def rollout_config(**bebop_options):
    return RolloutConfig(name="bebop", tensor_model_parallel_size=1, prompt_length=64, response_length=32, n_gpus_per_node=1, nnodes=1,
                         checkpoint_engine=CheckpointEngineConfig(backend="bebop"), engine_kwargs={"bebop": bebop_options})


def model_config():
    return HFModelConfig(path=str(MODEL), load_tokenizer=False)


def checkpoint(scale=1.0):
    """What a trainer exports: the model's tensors without the MTP layer."""
    return {name: tensor * scale if name.endswith("embed_tokens.weight") else tensor
            for name, tensor in load_file(MODEL / "model.safetensors").items() if not name.startswith("mtp.")}


class Trainer(Worker):
    """As verl's ActorRolloutRefWorker: builds the engine from the registry and sends what the model exports. One process a rank."""

    def __init__(self, scale):
        super().__init__()
        self._scale = scale
        self._engine = CheckpointEngineRegistry.new("bebop", is_master=self.rank == 0, bucket_size=1 << 20)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def update_weights(self, global_steps=None, mode="auto"):
        assert mode == "bebop"
        exported = iter(checkpoint(self._scale).items())
        metrics = await self._engine.send_weights(exported, global_steps=global_steps)
        return {**metrics, "left": len(list(exported))}

    @register(dispatch_mode=Dispatch.DP_COMPUTE, blocking=False)
    def execute_checkpoint_engine(self, method, *args, **kwargs):
        return getattr(self._engine, method)(*args, **kwargs)


@pytest.fixture(scope="module")
def cluster():
    def start():
        ray.init(num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False, configure_logging=False,
                 runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}})

    # Ray gives up when its processes take longer to start than it allows, as they do on a machine with much else to do.
    for _ in range(2):
        try:
            start()
            break
        except Exception as error:
            print(f"Ray did not start: {error}")
            ray.shutdown()
    else:
        start()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def replica(cluster, server):
    made = get_rollout_replica_class("bebop")(0, rollout_config(servers=[f"{server.rollout},{server.admin}"]), model_config(), gpus_per_node=1)
    asyncio.run(made.init_standalone())
    return made


def call(method, *args, **kwargs):
    return ray.get(method.remote(*args, **kwargs), timeout=60)


# ---- registries ----


def test_verl_finds_bebop_by_its_entry_point():
    from bebop.adapters.verl import BebopCheckpointEngine, BebopReplica, ServerAdapter

    # `import verl` above loaded the plugin: nothing here imported it before.
    assert get_rollout_replica_class("bebop") is BebopReplica and issubclass(BebopReplica, RolloutReplica)
    assert get_rollout_class("bebop", "async") is ServerAdapter and issubclass(ServerAdapter, BaseRollout)
    assert CheckpointEngineRegistry.get("bebop") is BebopCheckpointEngine
    for made in (BebopReplica, ServerAdapter, BebopCheckpointEngine):
        assert not made.__abstractmethods__
    import importlib.metadata
    assert [point.value for point in importlib.metadata.entry_points(group="verl.plugins") if point.name == "bebop"] == ["bebop.adapters.verl"]


@pytest.mark.parametrize("change, message", [
    (dict(tensor_model_parallel_size=2), "tensor_model_parallel_size=2"),
    (dict(engine_kwargs={"bebop": {"server": "x"}}), "unknown field 'server'"),
    (dict(engine_kwargs={"bebop": {"servers": ["node:1"]}}), "'node:1' is not"),
])
def test_a_configuration_that_cannot_work_is_refused(change, message):
    import dataclasses

    with pytest.raises(ValueError, match=message):
        get_rollout_replica_class("bebop")(0, dataclasses.replace(rollout_config(), **change), model_config(), gpus_per_node=1)


def test_sampling_parameters():
    from bebop.adapters.verl import generate_params

    assert generate_params({"temperature": 0.7, "top_k": -1, "top_p": 0.9, "logprobs": True, "repetition_penalty": 1.0, "stop": ["x"]}, 5) == {
        "temperature": 0.7, "top_k": 0, "top_p": 0.9, "logprobs": True, "stop": ["x"], "max_new_tokens": 5}
    with pytest.raises(ValueError, match="repetition_penalty: 1.2"):
        generate_params({"repetition_penalty": 1.2}, 5)
    with pytest.raises(ValueError, match="no 'best_of'"):
        generate_params({"best_of": 2}, 5)


# ---- rollouts ----


def test_generate(replica, server):
    output = call(replica.server_handle.generate, prompt_ids=PROMPT, sampling_params=SAMPLED | {"seed": 7}, request_id="verl-1")
    assert isinstance(output, TokenOutput)
    with bebop.Client(server.rollout, admin=server.admin) as client:
        own = client.generate(PROMPT, seed=7, max_new_tokens=32, logprobs=True).samples[0]
        scored = client.score([PROMPT + output.token_ids], score_start=len(PROMPT))[0]
        assert replica.server_address == server.rollout
    assert output.token_ids == own.token_ids.tolist() and len(output.token_ids) <= 32
    assert output.log_probs == own.logprobs.tolist()
    assert np.allclose(output.log_probs, scored.logprobs, atol=0.05)
    assert output.stop_reason == "completed" and output.num_preempted == 0
    fields = output.extra_fields
    assert fields["global_steps"] == fields["min_global_steps"] == fields["max_global_steps"] == own.weight_spans[-1].step
    assert (fields["spec_num_draft_tokens"], fields["spec_num_accepted_tokens"], fields["spec_num_verify_steps"]) == (
        own.spec.num_draft_tokens, own.spec.num_accepted_draft_tokens, own.spec.num_spec_steps)
    assert 0 < fields["spec_num_accepted_tokens"] <= fields["spec_num_draft_tokens"] <= 3 * fields["spec_num_verify_steps"]


def test_budgets_and_bad_input(replica):
    three = call(replica.server_handle.generate, prompt_ids=PROMPT, sampling_params={"max_tokens": 3, "ignore_eos": True}, request_id="b1")
    assert len(three.token_ids) == 3
    without = call(replica.server_handle.generate, prompt_ids=PROMPT, sampling_params={"max_new_tokens": 2, "ignore_eos": True}, request_id="b2")
    assert len(without.token_ids) == 2 and without.log_probs is None
    with pytest.raises(ValueError, match="image_data: bebop serves text"):
        call(replica.server_handle.generate, prompt_ids=PROMPT, sampling_params={}, request_id="b3", image_data=[b"x"])
    with pytest.raises(ValueError, match="2048 tokens leave no room"):
        call(replica.server_handle.generate, prompt_ids=[5] * 2048, sampling_params={}, request_id="b4")


def test_abort_returns_partial_samples_and_holds_what_comes(replica, server):
    at = server

    async def scenario():
        server = replica.server_handle
        long = {**SAMPLED, "max_tokens": 1900, "ignore_eos": True}
        running = [server.generate.remote(prompt_ids=PROMPT, sampling_params=long, request_id=f"a{i}") for i in range(3)]
        async with bebop.AsyncClient(at.rollout, admin=at.admin) as client:
            while (await client.loads()).running_sequences < 3:
                await asyncio.sleep(0.01)
            tokens = (await client.loads()).generated_tokens
            while (await client.loads()).generated_tokens < tokens + 20:
                await asyncio.sleep(0.01)
        await replica.abort_all_requests()
        outputs = await asyncio.gather(*running)
        assert [output.stop_reason for output in outputs] == ["aborted"] * 3
        assert all(0 < len(output.token_ids) < 1900 and len(output.log_probs) == len(output.token_ids) for output in outputs)
        held = server.generate.remote(prompt_ids=PROMPT, sampling_params=GREEDY, request_id="held")
        assert not ray.wait([held], timeout=0.5)[0]
        # As FullyAsyncLLMServerClient does: go on from prompt + tokens so far.
        await replica.resume_generation()
        assert (await held).stop_reason == "completed"
        rest = await server.generate.remote(prompt_ids=PROMPT + outputs[0].token_ids, sampling_params={**GREEDY, "max_tokens": 4}, request_id="rest")
        assert rest.stop_reason == "completed"
        # A replica that leaves the rotation turns requests away.
        await replica.abort_all_requests(reject_request=True)
        turned_away = await server.generate.remote(prompt_ids=PROMPT, sampling_params=GREEDY, request_id="away")
        assert (turned_away.stop_reason, turned_away.token_ids) == ("aborted", [])
        await replica.resume_generation()

    asyncio.run(scenario())


def test_an_abort_does_not_wait_for_ever(monkeypatch):
    """A call that does not come back, whatever the server says: an error, after few pauses."""
    import types

    from bebop.adapters import verl

    monkeypatch.setattr(verl, "_ABORT_SECONDS", 0.5)
    stuck, pauses = verl.RolloutServer(rollout_config(servers=["a:1,a:2"]), model_config(), RolloutMode.STANDALONE, 0), []

    class Client:
        async def pause(self, mode):
            pauses.append(mode)
            return types.SimpleNamespace(aborted_samples=len(pauses) == 1)

        async def generate(self, *args, **params):
            await asyncio.sleep(60)

    async def scenario():
        with pytest.raises(RuntimeError, match="launch_server comes first"):
            stuck.get_endpoint()
        stuck._client, stuck._max_model_len = Client(), 2048
        task = asyncio.create_task(stuck.generate(PROMPT, GREEDY, "stuck"))
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError, match="1 requests have not come back"):
            await asyncio.wait_for(stuck.abort_all_requests(), 20)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert 3 <= len(pauses) <= 8 and set(pauses) == {"abort"}
        assert await stuck.abort_all_requests() == {"aborted_count": 0, "request_ids": []}

    asyncio.run(scenario())


def test_sleep_and_wake(cluster, server, replica):
    """A replica that shares its device: in verl's hybrid mode. (Standalone replicas stay awake.)"""
    from bebop.adapters.verl import RolloutServer

    async def scenario():
        shared = RolloutServer(rollout_config(servers=[f"{server.rollout},{server.admin}"]), model_config(), RolloutMode.HYBRID, 0)
        await shared.launch_server()
        async with bebop.AsyncClient(server.rollout, admin=server.admin) as client:
            async def sleeping():
                return set((await client.loads()).sleeping)

            before = await shared.generate(PROMPT, GREEDY, "s0")
            await replica.sleep()
            assert await sleeping() == set()
            await shared.sleep()
            assert await sleeping() == {"weights", "kv_cache"}
            await shared.wake_up(["weights"])
            assert await sleeping() == {"kv_cache"}
            await shared.wake_up(["kv_cache"])
            assert await sleeping() == set()
            await shared.release_kv_cache()
            assert await sleeping() == {"kv_cache"}
            await shared.resume_kv_cache()
            assert (await shared.generate(PROMPT, GREEDY, "s1")).token_ids == before.token_ids
        await shared.shutdown()

    asyncio.run(scenario())


# ---- weights ----


def test_checkpoint_engine_manager_updates_every_replica(cluster, replica, server):
    """verl's own CheckpointEngineManager between a trainer's process and the replica's worker."""
    trainers = RayWorkerGroup(resource_pool=RayResourcePool([1], use_gpu=False, name_prefix="trainers", max_colocate_count=1),
                              ray_cls_with_init=RayClassWithInitArgs(cls=ray.remote(Trainer), scale=0.5), use_gpu=False, device_name="cpu")
    before = call(replica.server_handle.generate, prompt_ids=PROMPT, sampling_params=GREEDY, request_id="w0")
    manager = CheckpointEngineManager(config=CheckpointEngineConfig(backend="bebop"), actor_wg=trainers, replicas=[replica])
    metrics = manager.update_weights(global_steps=5)
    assert metrics["bebop/weight_update_seconds"] > 0 and metrics["left"] == 0
    after = call(replica.server_handle.generate, prompt_ids=PROMPT, sampling_params=GREEDY, request_id="w1")
    assert after.extra_fields["global_steps"] == 5 and after.log_probs != before.log_probs
    with bebop.Client(server.rollout, admin=server.admin) as client:
        info = client.weights.info()
        assert (info.target_step, info.draft_step) == (5, 0) and client.weights.check().target_matches
        # A trainer that starts again counts from where its checkpoint was.
        manager.update_weights(global_steps=2)
        assert client.weights.info().target_step == 2
        assert client.weights.info().target_digest == info.target_digest


def test_other_ranks_of_the_trainer_produce_tensors_and_send_none():
    engine = CheckpointEngineRegistry.new("bebop", is_master=False, bucket_size=1 << 20)
    tensors = iter(checkpoint().items())
    assert engine.prepare() == {"server": None}
    endpoints = {"server": ("a:1", "a:2")}, {"server": ("b:1", "b:2")}
    actor, rollout = engine.build_topology(2, 2, [{"server": None}, {"server": ("own:1", "own:2")}, *endpoints])
    assert actor == {"servers": [[("a:1", "a:2"), ("b:1", "b:2")]] * 2} and rollout == {"servers": [[], []]}
    with pytest.raises(RuntimeError, match="2 rollout workers, but 1 of them"):
        engine.build_topology(1, 2, [{"server": None}, endpoints[0], {"server": None}])
    engine.init_process_group(servers=[("nobody:1", "nobody:2")])
    assert asyncio.run(engine.send_weights(tensors, global_steps=3)) == {} and next(tensors, None) is None
    engine.finalize()


def test_server_adapter_sends_the_original_weights_back(cluster, replica, server, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    adapter = get_rollout_class("bebop")(config=rollout_config(), model_config=model_config(), device_mesh=None, replica_rank=0)

    async def scenario():
        async with bebop.AsyncClient(server.rollout, admin=server.admin) as client:
            await adapter.update_weights(iter(checkpoint().items()), global_steps=9)
            assert (await client.weights.info()).target_step == 9
            await adapter.update_weights(iter(checkpoint().items()))
            assert (await client.weights.info()).target_step == 10
            with pytest.raises(NotImplementedError, match="model.lora.merge"):
                await adapter.update_weights(iter(()), peft_config={})
            with pytest.raises(NotImplementedError, match="delta_flush"):
                await adapter.update_weights(iter(()), wire_format="delta_flush")
            bad = {**checkpoint(), "model.language_model.norm.weight": torch.zeros(3)}
            with pytest.raises(ValueError, match="norm.weight: shape"):
                await adapter.update_weights(iter(bad.items()), global_steps=11)
            assert (await client.weights.info()).target_step == 10 and (await client.weights.info()).update is None
            await adapter.release()
            await adapter.resume(["weights", "kv_cache"])
        output = await replica.server_handle.generate.remote(prompt_ids=PROMPT, sampling_params=GREEDY, request_id="o1")
        assert output.extra_fields["global_steps"] == 10

    asyncio.run(scenario())


def test_a_replica_starts_its_own_server(cluster):
    from bebop.adapters.verl import RolloutServer

    async def scenario():
        own = RolloutServer(rollout_config(program=SERVER, flags=["--max-num-seqs=4"]), model_config(), RolloutMode.STANDALONE, 0)
        await own.launch_server()
        assert (await own.generate(PROMPT, GREEDY, "own")).stop_reason == "completed"
        await own.shutdown()
        bad = RolloutServer(rollout_config(program=SERVER, flags=["--no-such-flag"]), model_config(), RolloutMode.STANDALONE, 0)
        with pytest.raises(RuntimeError, match="--no-such-flag: ended with status 2"):
            await bad.launch_server()

    asyncio.run(scenario())
