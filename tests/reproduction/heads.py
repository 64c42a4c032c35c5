# SPDX-License-Identifier: Apache-2.0
"""Training data and trained heads. A head's name is "<loss>-<seed>", or "tv-top<K>-<seed>" for TV over the K most likely tokens alone."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import workloads
from settings import Context

START = "start"  # the head that all training begins from
RECIPE_LOSSES = ("ce", "e2e_tv")
RECIPE_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
RECIPE_STEPS = 120


@dataclasses.dataclass(frozen=True)
class Head:
    """A head to train or measure."""

    loss: str
    seed: int
    top_k: int = 0  # 0: full vocabulary

    @property
    def name(self) -> str:
        if self.loss == START:
            return START
        return f"{self.loss}{f'-top{self.top_k}' if self.top_k else ''}-{self.seed}"

    def path(self, context: Context) -> Path:
        """The file to load; beneath the servers' weights_root."""
        return context.work / "heads" / f"{self.name}.safetensors"

    @property
    def label(self) -> dict[str, object]:
        """How records name it."""
        return {"loss": self.loss, "seed": self.seed, "top_k": self.top_k}


def full_vocabulary(context: Context) -> list[Head]:
    """One head a loss and seed, seed by seed: an interrupted run has whole seeds."""
    return [Head(loss, seed) for seed in range(context.settings.seeds) for loss in context.settings.losses]


def truncated(context: Context) -> list[Head]:
    return [Head("tv", seed, top_k) for seed in range(context.settings.seeds) for top_k in context.settings.top_k]


def start_head(context: Context) -> Head:
    """The common starting head: the mtp.* tensors of context.start, in a file that servers and trainer take."""
    head = Head(START, 0)
    path = head.path(context)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        files = sorted(context.start.glob("model*.safetensors")) if context.start.is_dir() else [context.start]
        write_safetensors(path, {name: tensor for file in files for name, tensor in read_safetensors(file, "mtp.").items()})
    return head


def read_safetensors(path: Path, prefix: str) -> dict[str, tuple[str, list[int], bytes]]:
    """(dtype, shape, bytes) of the tensors whose names begin with `prefix`. numpy has no bfloat16, and nothing here looks at values."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        tensors = {}
        for name, entry in header.items():
            if name.startswith(prefix):
                begin, end = entry["data_offsets"]
                file.seek(8 + size + begin)
                tensors[name] = (entry["dtype"], entry["shape"], file.read(end - begin))
    return tensors


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """ValueError: there are none."""
    if not tensors:
        raise ValueError(f"{path}: nothing to write; the starting head's files have no mtp.* tensors")
    header, offset = {}, 0
    for name, (dtype, shape, data) in sorted(tensors.items()):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors[name][2] for name in sorted(tensors)))
    temporary.replace(path)


def rollouts_path(context: Context, seed: int) -> Path:
    return context.work / "rollouts" / f"{seed}.jsonl"


def make_rollouts(context: Context) -> None:
    """The data of every seed."""
    for seed in range(context.settings.seeds):
        make_rollouts_of_seed(context, seed)


def make_rollouts_of_seed(context: Context, seed: int) -> None:
    """Samples of the model itself at temperature 1 on training-split prompts, one a prompt, by `bebop rollouts`."""
    settings = context.settings
    path = rollouts_path(context, seed)
    # All lines may be there and not yet be in the order of the prompts: `bebop rollouts` knows, and goes on with what an interrupted run left.
    done = path.with_suffix(".done")
    if done.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    prompts = path.with_suffix(".prompts")
    start = time.monotonic()
    with open_server(context) as server:
        texts = workloads.training(settings.rollouts, seed)
        prompts.write_text("".join(json.dumps({"prompt_token_ids": server.encode(text)}) + "\n" for text in texts), encoding="utf-8")
        run_program([context.programs.client, "--server", server.rollout, "rollouts", "--prompts", prompts, "--out", path, "--mode", "off",
                     "--max-new-tokens", settings.max_new_tokens, "--concurrency", 64, "--seed", seed + 1], path.with_suffix(".log"))
    done.touch()
    context.say(f"rollouts {seed}: {settings.rollouts} sequences in {time.monotonic() - start:.0f} s")


def run_program(command: list[object], log: Path, out: Path | None = None) -> None:
    """Runs a program, its output appended to `out` (or in the log) and its messages in `log`. RuntimeError with the end of the log when it fails."""
    words = [str(word) for word in command]
    with open(log, "wb") as messages, harness.open_to_append(out) if out else contextlib.nullcontext(messages) as stdout:
        status = subprocess.run(words, stdout=stdout, stderr=messages, check=False).returncode
    if status != 0:
        raise RuntimeError(f"{' '.join(words)} ended with status {status}:\n{log.read_text(errors='replace')[-2000:]}")


def open_server(context: Context) -> harness.Server:
    return harness.Server(context.programs.server, context.model, weights_root=context.work, threads=context.settings.threads, device=context.device,
                          log=context.work / "server.log")


@contextlib.contextmanager
def open_servers(context: Context) -> Iterator[list[harness.Server]]:
    """As many as the settings say. All are stopped at the end, also when one of them does not start or fails while it stops."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(open_server(context)) for _ in range(context.settings.servers)]


def train(context: Context, head: Head) -> None:
    """Trains one head, unless it is there. The trainer's JSON lines stay beside it."""
    path = head.path(context)
    if path.exists():
        return
    start = time.monotonic()
    train_head(context, head, path, context.settings.lr)
    context.say(f"{head.name}: trained in {time.monotonic() - start:.0f} s")


def train_head(context: Context, head: Head, path: Path, lr: float, *more: object) -> None:
    """From the common start on the rollouts of the head's seed."""
    truncation = ["--truncate-top-k", head.top_k] if head.top_k else []
    run_trainer(context, context.model, start_head(context).path(context), rollouts_path(context, head.seed), path, head.loss, head.seed, lr,
                *truncation, *more)


def run_trainer(context: Context, model: Path, start: Path, data: Path, path: Path, loss: str, seed: int, lr: float, *more: object) -> None:
    """bebop-train-mtp from the head `start` on `data` to the file `path`, or on from where it was stopped. Its log, a line a step, is appended to
    `path` with the ending .jsonl."""
    settings = context.settings
    run_program([
        context.programs.trainer, "--model", model, "--mtp", start, "--data", data, "--out", path, "--loss", loss, "--num-steps-ahead",
        settings.num_steps_ahead, "--lr", lr, "--warmup-ratio", 0.03, "--epochs", 1, "--batch-tokens", settings.batch_tokens, "--seed", seed, "--threads",
        settings.threads, "--device", context.device, "--log-every", 1, "--json", "--resume", *more], path.with_suffix(".log"), path.with_suffix(".jsonl"))


def train_all(context: Context) -> None:
    """Every head."""
    start_head(context)
    side_by_side(context, [functools.partial(train, context, head) for head in (*full_vocabulary(context), *truncated(context))])


def recipe_path(context: Context, loss: str, lr: float) -> Path:
    return context.work / "recipe" / f"{loss}-{lr:g}.safetensors"


def try_recipes(context: Context) -> None:
    """Short trainings of CE and e2e TV at every learning rate of RECIPE_RATES, which `lr` was chosen from. Not one of the usual stages."""

    def one(loss: str, lr: float) -> None:
        path = recipe_path(context, loss, lr)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            train_head(context, Head(loss, 0), path, lr, "--max-steps", RECIPE_STEPS)
            context.say(f"recipe: {path.stem}")

    make_rollouts_of_seed(context, 0)
    start_head(context)
    side_by_side(context, [functools.partial(one, loss, lr) for loss in RECIPE_LOSSES for lr in RECIPE_RATES])


def side_by_side(context: Context, jobs: list[Callable[[], None]]) -> None:
    """As many at a time as there are servers. The first failure stops what has not begun."""
    with concurrent.futures.ThreadPoolExecutor(context.settings.servers) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def training_log(path: Path) -> list[dict[str, Any]]:
    """What the trainer printed while it made `path`, one object a step and a last one. Steps that it made again, because it was stopped after its
    last checkpoint, are there once: as the run that went on made them."""
    log: list[dict[str, Any]] = []
    for line in harness.read_records(path.with_suffix(".jsonl")):
        if "alpha" in line:  # a step, not the end
            while log and log[-1]["step"] >= line["step"]:
                log.pop()
        log.append(line)
    return log
