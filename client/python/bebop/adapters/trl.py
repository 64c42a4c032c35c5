# SPDX-License-Identifier: Apache-2.0
"""TRL: GRPOTrainer generates on a bebop server and keeps its weights up to date.

    from bebop.adapters.trl import Rollout

    client = bebop.Client("gpu1:50051", admin="gpu1:50052")
    trainer = GRPOTrainer(model=..., reward_funcs=..., args=GRPOConfig(...), train_dataset=..., rollout_func=Rollout(client))

WeightTransfer and RolloutWorker implement the protocols of TRL's experimental asynchronous trainer:

    transfer = WeightTransfer(client)
    worker = RolloutWorker(bebop.AsyncClient("gpu1:50051"), transfer, dataset, reward_funcs, tokenizer, num_generations=8, max_new_tokens=512)
    trainer = AsyncGRPOTrainer(model=..., args=AsyncGRPOConfig(token_budget=4096, ...), rollout_worker=worker, weight_transfer=transfer, ...)

AsyncGRPOTrainer of trl 1.16 itself refuses models with linear attention layers, and so the whole Qwen3.5 family: its packing is for attention alone.
Until that changes, the two serve a trainer of one's own that speaks these protocols.

Written against trl 1.16 (`trl.trainer.grpo_trainer`, `trl.experimental.async_grpo`). Transformers does not load the MTP layer, so updates bring the
target alone and the server goes on drafting with the MTP layer it has. Outputs stay exact; the further the policy moves, the fewer drafts are
accepted.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from bebop.adapters.common import loaded_step, refuse_non_finite
from bebop.results import GroupResult

if TYPE_CHECKING:
    import torch

    from bebop.aio import AsyncClient
    from bebop.client import Client

# Groups asked for at once. The server queues and batches them; a thread waits for each.
_MAX_CALLS = 64


class WeightSteps:
    """Versions for a server that may have seen learners before: a count of this run, above what was loaded when it began."""

    def __init__(self):
        self._loaded: int | None = None

    def step(self, client: Client, count: int) -> int:
        """The server's step for version `count` >= 1 of this run. Asks the server once."""
        if self._loaded is None:
            self._loaded = loaded_step(client.weights.info())
        return self._loaded + count

    def count(self, step: int) -> int:
        """The version of this run that has `step`; 0 and less: from before it."""
        if self._loaded is None:
            return 0
        return step - self._loaded


@contextmanager
def _merged_adapter(model: Any) -> Iterator[bool]:
    """A PEFT model with its adapter folded into the base weights; others as they are."""
    if not hasattr(model, "merge_adapter"):
        yield False
        return
    model.merge_adapter()
    try:
        yield True
    finally:
        model.unmerge_adapter()


def policy_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter of a policy under its checkpoint name, one at a time: whole for FSDP2, adapters (PEFT) merged.

    With FSDP2 every process must exhaust the iterator: putting a parameter together takes all of them.
    """
    with _merged_adapter(model) as is_peft:
        for name, parameter in model.named_parameters():
            if hasattr(parameter, "ds_id"):
                raise TypeError(f"{name}: DeepSpeed ZeRO-3 keeps parameters in shards that this adapter does not gather; use FSDP2 or ZeRO-1/2")
            if is_peft:
                if f".{model.prefix}" in name or "original_module." in name:
                    continue
                name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
            name = name.replace("_checkpoint_wrapped_module.", "")
            yield name, parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


def _prompt_ids(prompt: Any, tokenizer: Any, chat_template_kwargs: dict[str, Any], **template: Any) -> list[int]:
    """Text as it is, messages through the chat template."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **template, **chat_template_kwargs)
    return ids["input_ids"]


def _check_ended(group: GroupResult) -> GroupResult:
    for sample in group.samples:
        refuse_non_finite(sample, group.request_id)
        if len(sample.token_ids) == 0:
            raise RuntimeError(f"request {group.request_id}, sample {sample.sample_index}: ended ({sample.finish.reason}) before its first token; "
                               "TRL needs at least one")
    return group


class Rollout:
    """GRPOTrainer's `rollout_func`: equal prompts that stand side by side become one group of the server.

    Before it generates it pushes the trainer's weights if an optimizer step has happened since (so at the first call, too); the samples then
    come from exactly those weights, whose version is the samples' `weight_step`. Sampling follows the trainer's arguments: temperature, top_p,
    top_k, min_p, max_completion_length. What bebop does not have (repetition_penalty, generation_kwargs) is refused. Tools and images are not
    handed on: TRL's own tool loop does not run with a rollout_func either.

    Args:
      client: a bebop.Client or bebop.Fleet, with its admin port.
      push_weights: False if something else keeps the server's weights up to date.
      update: more arguments of client.weights.update, e.g. dict(in_flight="recompute").
      params: more arguments of client.generate, e.g. speculation="rejection", priority=1, min_new_tokens=4.
    """

    def __init__(self, client: Client, *, push_weights: bool = True, update: dict[str, Any] | None = None, **params: Any):
        self._client = client
        self._push_weights = push_weights
        self._update = {"components": ["target"], **(update or {})}
        self._params = params
        self._steps = WeightSteps()
        self._pushed: int | None = None  # the optimizer step of the last push
        self._pushes = 0

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        if self._push_weights and self._pushed != trainer.state.global_step:
            self._push(trainer)
        sampling = self._sampling(trainer.args)
        template = {"tools": None, "chat_template": getattr(trainer, "chat_template", None)}
        chat_template_kwargs = getattr(trainer, "chat_template_kwargs", None) or {}
        # The trainer repeats a prompt for each of its samples. A group costs one prefill.
        groups = [(prompt, len(list(repeats))) for prompt, repeats in itertools.groupby(prompts)]
        ids = [_prompt_ids(prompt, trainer.processing_class, chat_template_kwargs, **template) for prompt, _ in groups]

        def generate(index: int) -> GroupResult:
            return _check_ended(self._client.generate(ids[index], n=groups[index][1], logprobs=True, **{**sampling, **self._params}))

        with ThreadPoolExecutor(max_workers=max(1, min(_MAX_CALLS, len(groups)))) as pool:
            results = list(pool.map(generate, range(len(groups))))
        samples = [(index, sample) for index, result in enumerate(results) for sample in result.samples]
        return {
            "prompt_ids": [ids[index] for index, _ in samples],
            "completion_ids": [sample.token_ids.tolist() for _, sample in samples],
            "logprobs": [sample.logprobs.tolist() for _, sample in samples],
            # Further columns reach the reward functions.
            "weight_step": [sample.weight_spans[-1].step if sample.weight_spans else None for _, sample in samples],
            "finish_reason": [sample.finish.reason for _, sample in samples],
        }

    def _push(self, trainer: Any) -> None:
        """On every process at once. A failure on one is raised on all: the others would wait for it in the next collective."""
        from accelerate.utils import gather_object

        accelerator, global_step = trainer.accelerator, trainer.state.global_step
        tensors = policy_tensors(accelerator.unwrap_model(trainer.model))
        failure: Exception | None = None
        try:
            if accelerator.is_main_process:
                step = self._steps.step(self._client, self._pushes + 1)
                self._client.weights.update(tensors, step, **{"label": f"global_step={global_step}", **self._update})
        except Exception as error:  # noqa: BLE001 - raised below, when the others know
            failure = error
        try:
            for _ in tensors:
                pass  # what is left: putting parameters together takes every process
        except Exception as error:  # noqa: BLE001
            failure = failure or error
        failures = [text for text in gather_object([failure and f"{type(failure).__name__}: {failure}"]) if text]  # waits for everyone, too
        if failure is not None:
            raise failure
        if failures:
            raise RuntimeError(f"the weights were not pushed: another process failed with {failures[0]}")
        self._pushes += 1
        self._pushed = global_step

    @staticmethod
    def _sampling(args: Any) -> dict[str, Any]:
        if args.repetition_penalty != 1.0:
            raise ValueError(f"repetition_penalty: {args.repetition_penalty}, but bebop samples from the policy as it is; leave it at 1.0")
        if args.generation_kwargs:
            raise ValueError(f"generation_kwargs: {args.generation_kwargs!r} are not TRL's own; give bebop's parameters to Rollout(...)")
        return {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k or 0, "min_p": args.min_p,
                "max_new_tokens": args.max_completion_length}


class WeightTransfer:
    """AsyncGRPOTrainer's `weight_transfer`.

    `pause` and `resume` leave the server running: an update is staged beside the live weights and swapped in between two iterations, so that
    there is nothing to protect. `in_flight` says what running samples do at the swap.

    Args:
      client: a bebop.Client or bebop.Fleet, with its admin port.
      update: more arguments of client.weights.update, e.g. in_flight="recompute".
    """

    def __init__(self, client: Client, **update: Any):
        self._client = client
        self._update = {"components": ["target"], **update}
        self._steps = WeightSteps()
        self._count = 0

    def init_weight_transfer(self) -> None:
        """Waits for the server."""
        self._client.wait_until_serving()

    def pause(self) -> None:
        """Nothing: see the class."""

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Brings (name, tensor) pairs to the server as its next step."""
        step = self._steps.step(self._client, self._count + 1)
        self._client.weights.update(iterator, step, **{"label": f"model_version={self._count + 1}", **self._update})
        self._count += 1

    def resume(self) -> None:
        """Nothing: see the class."""

    def destroy(self) -> None:
        """Nothing: the client is the caller's."""

    def model_version(self, step: int) -> int:
        """The trainer's version of a server's step: how many times weights were sent before it."""
        return self._steps.count(step)


class RolloutWorker:
    """AsyncGRPOTrainer's `rollout_worker`: a thread that keeps groups running on the server, scores them and queues the samples.

    One turn a prompt, without tools; several turns are for a worker of one's own over the same client. Samples may span weight versions; they
    carry the oldest, by which the trainer measures staleness, and the log-probabilities of the version that sampled each token.

    Args:
      client: a bebop.AsyncClient; the worker connects a copy of it in its own thread.
      transfer: the trainer's WeightTransfer, which knows which version a server's step is.
      dataset: rows with "prompt" (text or messages); other columns go to the reward functions. Read round and round.
      reward_funcs: one or several, f(prompts=, completions=, completion_ids=, **columns) -> floats or None; may be coroutine functions.
      tokenizer: the trainer's processing class.
      num_generations: samples a group.
      max_groups: groups running at once.
      queue_size: finished samples waiting for the trainer before generation stops; 0: no limit. By default two rounds of max_groups.
      chat_template_kwargs: for messages.
      params: of AsyncClient.generate: temperature, top_p, max_new_tokens, weights=dict(max_step_spread=...), ...
    """

    def __init__(self, client: AsyncClient, transfer: WeightTransfer, dataset: Iterable[dict[str, Any]],
                 reward_funcs: Callable[..., Any] | Sequence[Callable[..., Any]], tokenizer: Any, *, num_generations: int = 8, max_groups: int = 16,
                 queue_size: int | None = None, chat_template_kwargs: dict[str, Any] | None = None, **params: Any):
        if num_generations < 2:
            raise ValueError(f"num_generations: {num_generations}, but an advantage compares at least 2 samples")
        if max_groups < 1:
            raise ValueError(f"max_groups: {max_groups} is not positive")
        self._client, self._transfer, self._dataset, self._tokenizer = client, transfer, dataset, tokenizer
        self._reward_funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
        if not self._reward_funcs:
            raise ValueError("reward_funcs: empty")
        self._num_generations, self._max_groups = num_generations, max_groups
        self._chat_template_kwargs, self._params = chat_template_kwargs or {}, params
        self.rollout_buffer: queue.Queue = queue.Queue(2 * max_groups * num_generations if queue_size is None else queue_size)
        self.metrics_queue: queue.Queue = queue.Queue()
        self.model_version = 0
        self._alive_at = time.monotonic()
        self._failure: BaseException | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to generate, in a thread of its own."""
        self._alive_at = time.monotonic()
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="bebop-rollouts", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Cancels what runs, and waits up to a minute for it."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=60)
            self._thread = None

    def update_model_version(self, model_version: int) -> None:
        """The trainer's version, for samples that know none of their own."""
        self.model_version = model_version

    def check_health(self, stale_after_s: float) -> None:
        """RuntimeError: the thread failed, or finished no group for so long."""
        if self._failure is not None:
            raise RuntimeError(f"the rollout worker failed: {self._failure}") from self._failure
        idle = time.monotonic() - self._alive_at
        if idle > stale_after_s:
            raise RuntimeError(f"the rollout worker finished no group for {idle:.0f} s (limit {stale_after_s:.0f} s)")

    def _run(self) -> None:
        try:
            asyncio.run(self._produce())
        except BaseException as failure:
            self._failure = failure

    async def _produce(self) -> None:
        rows = self._rows()
        running: set[asyncio.Task] = set()
        async with copy.copy(self._client) as client:
            try:
                while not self._stopping.is_set():
                    while len(running) < self._max_groups:
                        group_id, row = next(rows)
                        running.add(asyncio.create_task(self._group(client, group_id, row)))
                    done, running = await asyncio.wait(running, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        group_id = 0
        while True:
            before = group_id
            for row in self._dataset:
                yield group_id, row
                group_id += 1
            if group_id == before:
                raise ValueError("dataset: empty")

    async def _group(self, client: AsyncClient, group_id: int, row: dict[str, Any]) -> None:
        from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

        begin = time.monotonic()
        prompt = row["prompt"]
        ids = _prompt_ids(prompt, self._tokenizer, self._chat_template_kwargs)
        result = _check_ended(await client.generate(ids, n=self._num_generations, logprobs=True, **self._params))
        texts = [self._tokenizer.decode(sample.token_ids.tolist(), skip_special_tokens=True) for sample in result.samples]
        completions = texts if isinstance(prompt, str) else [[{"role": "assistant", "content": text}] for text in texts]
        rewards, by_func = await self._rewards(row, result, completions)
        # A sample that no function scores moves the policy neither way, nor the group's mean.
        scored = ~np.isnan(rewards)
        mean, deviation = (float(rewards[scored].mean()), float(rewards[scored].std())) if scored.any() else (float("nan"), float("nan"))
        advantages = np.where(scored, (rewards - mean) / (deviation + 1e-8), 0.0) if scored.any() else np.zeros(len(rewards))
        seconds = time.monotonic() - begin
        for sample, completion, reward, advantage, own in zip(result.samples, completions, rewards, advantages, by_func.T):
            oldest = min((span.step for span in sample.weight_spans), default=None)
            await self._put(RolloutSample(
                prompt=prompt, completion=completion, input_ids=np.concatenate([np.asarray(ids, dtype=np.int64), sample.token_ids]),
                completion_mask=np.concatenate([np.zeros(len(ids), dtype=np.int64), np.ones(len(sample.token_ids), dtype=np.int64)]),
                old_log_probs=np.concatenate([np.zeros(len(ids), dtype=np.float32), sample.logprobs]), advantage=float(advantage),
                model_version=self.model_version if oldest is None else self._transfer.model_version(oldest), group_id=group_id,
                metrics={"reward": float(reward), "reward_std": deviation,
                         **{f"rewards/{_name(func)}": float(value) for func, value in zip(self._reward_funcs, own)}}))
        self._alive_at = time.monotonic()
        spec = [sample.spec for sample in result.samples]
        self.metrics_queue.put({
            "rollout/duration_s": seconds,
            "rollout/generated_tok_s": (float(sum(len(sample.token_ids) for sample in result.samples)), seconds),
            "rollout/spec_accept_rate": (float(sum(s.num_accepted_draft_tokens for s in spec)), float(sum(s.num_draft_tokens for s in spec))),
        })

    async def _rewards(self, row: dict[str, Any], result: GroupResult, completions: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        """[samples] sums, nan where no function gave a reward, and [functions, samples]."""
        n = len(result.samples)
        arguments = {**{key: [value] * n for key, value in row.items() if key != "prompt"}, "prompts": [row["prompt"]] * n,
                     "completions": completions, "completion_ids": [sample.token_ids.tolist() for sample in result.samples]}

        async def call(func: Callable[..., Any]) -> list[float]:
            values = func(**arguments) if _is_async(func) else asyncio.to_thread(func, **arguments)
            values = [float("nan") if value is None else float(value) for value in await values]
            if len(values) != n:
                raise ValueError(f"{_name(func)}: {len(values)} rewards for {n} completions")
            return values

        by_func = np.asarray(await asyncio.gather(*[call(func) for func in self._reward_funcs]), dtype=np.float64)
        return np.where(np.isnan(by_func).all(axis=0), np.nan, np.nansum(by_func, axis=0)), by_func

    async def _put(self, sample: Any) -> None:
        while True:
            try:
                sample.enqueued_at = time.time()
                return self.rollout_buffer.put_nowait(sample)
            except queue.Full:
                self._alive_at = time.monotonic()  # waiting for the trainer is no fault of ours
                await asyncio.sleep(0.05)


def _is_async(func: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(getattr(func, "__call__", None))


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", type(func).__name__)
