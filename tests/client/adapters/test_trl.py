# SPDX-License-Identifier: Apache-2.0
"""bebop.adapters.trl with the real trl: GRPOTrainer trains the bundled model against a running server."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import types

import numpy as np
import pytest

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import bebop  # noqa: E402
import torch  # noqa: E402
from bebop.adapters.trl import Rollout, RolloutWorker, WeightTransfer, policy_tensors  # noqa: E402
from bebop.tensors import plain_name  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen3_5TextConfig  # noqa: E402
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

MODEL = pathlib.Path(__file__).resolve().parents[3] / "tests/models/bebop-tiny"
PROMPTS = [f"<|im_start|>user\nWhat is {a}+{b}?<|im_end|>\n<|im_start|>assistant\n" for a, b in ((12, 30), (41, 7), (25, 25), (60, 18))]
VALUES = 4  # samples a step: 2 groups of 2


def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_file=str(MODEL / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<|endoftext|>")


def policy():
    config = Qwen3_5TextConfig(**json.loads((MODEL / "config.json").read_text())["text_config"])
    return Qwen3_5ForCausalLM.from_pretrained(MODEL, config=config, dtype=torch.float32)


@contextlib.contextmanager
def rounded(model, specs):
    """The policy as a server stores it: bfloat16 where the server's tensor is."""
    types = {plain_name(spec.name): spec.dtype for spec in specs}
    saved = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if types[plain_name(name)] == "BF16":
            parameter.data = parameter.data.bfloat16().float()
    yield
    for name, parameter in model.named_parameters():
        parameter.data = saved[name]


class Watching(GRPOTrainer):
    """Recomputes the log-probability of every sampled token with the policy as it is when the samples come."""

    specs = ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.differences = []

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        with torch.no_grad(), rounded(self.model, self.specs):
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
            mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
            logits = self.model(input_ids=ids, attention_mask=mask).logits[:, output["prompt_ids"].shape[1] - 1:-1]
            logprobs = torch.log_softmax(logits / self.args.temperature, dim=-1)
            own = logprobs.gather(-1, output["completion_ids"].unsqueeze(-1)).squeeze(-1)
        valid = output["completion_mask"].bool()
        self.differences.append((own - output["sampling_per_token_logps"])[valid].abs().numpy())
        return output


def train(specs, tmp_path, rollout, steps, **config):
    seen = []

    def reward(completions, completion_ids, weight_step, finish_reason, **_):
        assert all(len(ids) == 16 if reason == "LENGTH" else len(ids) <= 16 for ids, reason in zip(completion_ids, finish_reason))
        seen.append((list(weight_step), list(finish_reason)))
        return [float(len(completion)) for completion in completions]

    args = GRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=VALUES, num_generations=2, max_completion_length=16, max_steps=steps,
                      report_to=[], use_cpu=True, bf16=False, save_strategy="no", logging_steps=1, disable_tqdm=True, learning_rate=1e-3,
                      lr_scheduler_type="constant", gradient_checkpointing=False, temperature=0.9, seed=1, **config)
    trainer = Watching(model=policy(), reward_funcs=reward, args=args, train_dataset=Dataset.from_dict({"prompt": PROMPTS * 4}),
                       processing_class=tokenizer(), rollout_func=rollout)
    trainer.specs = specs
    trainer.train()
    return trainer, seen


def test_policy_tensors_are_the_checkpoint(server):
    """First in this module: the digest of what was loaded is that of the same tensors pushed from float32."""
    with bebop.Client(server.rollout, admin=server.admin) as client:
        loaded = client.weights.info()
        pushed = client.weights.update(policy_tensors(policy()), loaded.target_step + 1, components=["target"]).info
        assert (pushed.target_digest, pushed.draft_digest) == (loaded.target_digest, loaded.draft_digest)


def test_every_step_samples_from_the_policy_as_it_is(server, tmp_path):
    with bebop.Client(server.rollout, admin=server.admin) as client:
        before = client.weights.info(tensors=True)
        loaded = before.target_step
        trainer, seen = train(before.tensors, tmp_path, Rollout(client), steps=3)
        assert len(trainer.differences) == 3
        for differences in trainer.differences:
            # What is left is the server's bfloat16 KV cache. Without a push it is 0.007 after one step of a third of this learning rate.
            assert np.mean(differences) < 0.003, differences
        assert [steps for steps, _ in seen] == [[loaded + i] * VALUES for i in (1, 2, 3)]
        assert all(reason in ("STOP", "LENGTH") for _, reasons in seen for reason in reasons)
        info = client.weights.info()
        assert (info.target_step, info.label, info.draft_step) == (loaded + 3, "global_step=2", 0)
        assert info.target_digest != before.target_digest


def test_what_bebop_cannot_sample_is_refused(server, tmp_path):
    with bebop.Client(server.rollout, admin=server.admin) as client:
        with pytest.raises(ValueError, match="repetition_penalty: 1.1"):
            train((), tmp_path, Rollout(client, push_weights=False), steps=1, repetition_penalty=1.1)
        with pytest.raises(ValueError, match="generation_kwargs: {'num_beams': 2}"):
            train((), tmp_path, Rollout(client, push_weights=False), steps=1, generation_kwargs={"num_beams": 2})


# One process of a trainer of two, whose push to the server fails.
PUSHER = """
import sys, types
import torch
from accelerate import Accelerator
from bebop.adapters.trl import Rollout

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
collectives = []


class Sharded(torch.nn.Parameter):
    def full_tensor(self):  # as of FSDP2: takes every process
        collectives.append(accelerator.reduce(torch.ones(1)))
        return self.detach()


model = torch.nn.Module()
model.parts = torch.nn.ParameterList([Sharded(torch.ones(2)) for _ in range(5)])


class Weights:
    def info(self):
        return types.SimpleNamespace(target_step=0)

    def update(self, tensors, step, **_):
        next(tensors)
        raise ConnectionError("the server is gone")


rollout = Rollout(types.SimpleNamespace(weights=Weights()))
trainer = types.SimpleNamespace(accelerator=accelerator, state=types.SimpleNamespace(global_step=1), model=model)
try:
    rollout._push(trainer)
    print("pushed")
except Exception as error:
    print(type(error).__name__, error, len(collectives), rollout._pushed)
"""


def test_a_push_that_fails_on_one_process_fails_on_all():
    """Two processes whose parameters are put together by both: the second must not wait in a collective that the first has left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [subprocess.Popen([sys.executable, "-c", PUSHER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                                   "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}) for rank in range(2)]
    try:
        (first, log), (second, other_log) = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert first.strip() == "ConnectionError the server is gone 5 None", log
    assert second.strip() == ("RuntimeError the weights were not pushed: another process failed with ConnectionError: the server is gone "
                              "5 None"), other_log


def test_no_prompts_are_no_samples(server):
    args = GRPOConfig(output_dir="unused", max_completion_length=4, report_to=[], use_cpu=True, bf16=False)
    with bebop.Client(server.rollout) as client:
        result = Rollout(client, push_weights=False)([], types.SimpleNamespace(args=args, processing_class=tokenizer()))
    assert set(map(len, result.values())) == {0} and {"prompt_ids", "completion_ids", "logprobs"} <= set(result)


def score_length(completions, **_):
    return [float(len(completion)) for completion in completions]


def test_the_parts_of_the_asynchronous_trainer(server):
    """WeightTransfer and RolloutWorker with trl's own queue reader, batcher and collator, wired as AsyncGRPOTrainer does. The trainer itself refuses
    models with linear attention layers."""
    from collections import defaultdict

    from trl.experimental.async_grpo.async_grpo_trainer import (DataCollatorForRollout, FixedCountBatcher, RolloutQueueDataset,
                                                                 RolloutWorkerProtocol, WeightTransferProtocol)

    def methods(protocol):
        return {name for name, value in vars(protocol).items() if callable(value) and not name.startswith("_")}

    with bebop.Client(server.rollout, admin=server.admin) as client:
        transfer = WeightTransfer(client)
        worker = RolloutWorker(bebop.AsyncClient(server.rollout), transfer, [{"prompt": prompt, "answer": 1} for prompt in PROMPTS], score_length,
                               tokenizer(), num_generations=2, max_groups=2, max_new_tokens=12, temperature=0.9)
        assert methods(WeightTransferProtocol) <= set(dir(transfer)) and methods(RolloutWorkerProtocol) <= set(dir(worker))
        assert set(RolloutWorkerProtocol.__annotations__) <= set(vars(worker))

        def sync(version):
            transfer.pause()
            transfer.send_weights(policy_tensors(policy()))
            transfer.resume()
            worker.update_model_version(version)

        # A server that other learners have used: versions are counted from where it is.
        client.weights.update(policy_tensors(policy()), client.weights.info().target_step + 3, components=["target"])
        transfer.init_weight_transfer()
        sync(1)
        worker.start()
        try:
            metrics = defaultdict(list)
            samples = RolloutQueueDataset(worker.rollout_buffer, lambda: worker.model_version, worker.check_health, 60, metrics, poll_interval_s=1)
            batches = iter(FixedCountBatcher(samples, num_processes=1, microbatch_size=4))
            collate = DataCollatorForRollout(pad_token_id=942, metrics=metrics)
            batch = collate([next(batches)])
            assert batch["input_ids"].shape[0] == 1 and torch.isfinite(batch["old_log_probs"]).all()
            sync(2)
            # What is still in the queue is of version 1; what comes later, of version 2.
            versions = set()
            while 2 not in versions:
                sample = worker.rollout_buffer.get(timeout=60)
                versions.add(sample.model_version)
                assert versions <= {1, 2}
                assert len(sample.input_ids) == len(sample.completion_mask) == len(sample.old_log_probs)
                ids = sample.input_ids.tolist()
                begin = len(ids) - int(sample.completion_mask.sum())
                assert sample.completion_mask.tolist() == [0] * begin + [1] * (len(ids) - begin)
                scored = client.score([ids], score_start=begin, temperature=0.9)[0]
                assert np.allclose(sample.old_log_probs[begin:], scored.logprobs, atol=0.05)
            assert worker.metrics_queue.get_nowait()["rollout/generated_tok_s"][0] > 0
        finally:
            worker.stop()
        transfer.destroy()
        assert client.weights.info().label == "model_version=2"


def test_a_worker_that_fails_says_why(server):
    def broken(completions, **_):
        raise KeyError("no such answer")

    worker = RolloutWorker(bebop.AsyncClient(server.rollout), WeightTransfer(bebop.Client(server.rollout, admin=server.admin)),
                           [{"prompt": PROMPTS[0]}], broken, tokenizer(), num_generations=2, max_groups=1, max_new_tokens=4)
    worker.start()
    worker._thread.join(timeout=30)
    with pytest.raises(RuntimeError, match="no such answer"):
        worker.check_health(60)
    with pytest.raises(ValueError, match="num_generations: 1"):
        RolloutWorker(bebop.AsyncClient(server.rollout), None, [], broken, tokenizer(), num_generations=1)
