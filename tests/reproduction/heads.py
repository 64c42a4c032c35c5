# SPDX-License-Identifier: Apache-2.0
"""Training data and trained heads. A head's name is "<loss>-<seed>", or "tv-top<K>-<seed>" for TV over the K most likely tokens alone."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import shutil
import subprocess
import time
from pathlib import Path

import harness
import workloads
from settings import Context

START = "start"  # the head that all training begins from


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
    """The common starting head, copied to where servers may read it."""
    head = Head(START, 0)
    path = head.path(context)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        source = context.start / "model.safetensors" if context.start.is_dir() else context.start
        shutil.copyfile(source, path)
    return head


def rollouts_path(context: Context, seed: int) -> Path:
    return context.work / "rollouts" / f"{seed}.jsonl"


def make_rollouts(context: Context) -> None:
    """Samples of the model itself at temperature 1 on training-split prompts, one a prompt, in the trainer's format."""
    for seed in range(context.settings.seeds):
        path = rollouts_path(context, seed)
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        options = harness.Decoding(mode="off", samples=1, max_new_tokens=context.settings.max_new_tokens, seed=1_000_000 * (seed + 1), entropy=False,
                                   spec_detail=False)
        with open_server(context) as server:
            texts = workloads.training(context.settings.rollouts, seed)
            prompts = [harness.Prompt("training", index, server.encode(text)) for index, text in enumerate(texts)]
            lines = []
            for prompt, group in harness.decode(server, prompts, options, in_flight=64):
                tokens = prompt.token_ids + group.samples[0].token_ids.tolist()
                lines.append(json.dumps({"token_ids": tokens, "loss_start": len(prompt.token_ids)}))
        temporary = path.with_suffix(".tmp")
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.replace(path)
        context.say(f"rollouts {seed}: {len(lines)} sequences in {time.monotonic() - start:.0f} s")


def open_server(context: Context) -> harness.Server:
    return harness.Server(context.programs.server, context.model, weights_root=context.work, threads=context.settings.threads, device=context.device,
                          log=context.work / "server.log")


def train(context: Context, head: Head) -> None:
    """Trains one head, unless it is there. The trainer's JSON lines stay beside it."""
    path = head.path(context)
    if path.exists():
        return
    settings = context.settings
    command = [
        str(context.programs.trainer), "--model", str(context.model), "--mtp", str(start_head(context).path(context)),
        "--data", str(rollouts_path(context, head.seed)), "--out", str(path), "--loss", head.loss,
        "--num-steps-ahead", str(settings.num_steps_ahead), "--lr", str(settings.lr), "--warmup-ratio", "0.03", "--epochs", "1",
        "--batch-tokens", str(settings.batch_tokens), "--seed", str(head.seed), "--threads", str(settings.threads), "--device", context.device, "--json",
    ]
    if head.top_k:
        command += ["--truncate-top-k", str(head.top_k)]
    start = time.monotonic()
    log = path.with_suffix(".jsonl")
    with open(log, "w", encoding="utf-8") as out, open(path.with_suffix(".log"), "w", encoding="utf-8") as errors:
        status = subprocess.run(command, stdout=out, stderr=errors, check=False).returncode
    if status != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}:\n{path.with_suffix('.log').read_text()[-2000:]}")
    context.say(f"{head.name}: trained in {time.monotonic() - start:.0f} s")


def train_all(context: Context) -> None:
    """Every head, as many at a time as there are servers. The first failure stops what has not begun."""
    start_head(context)
    with concurrent.futures.ThreadPoolExecutor(context.settings.servers) as pool:
        futures = [pool.submit(train, context, head) for head in (*full_vocabulary(context), *truncated(context))]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def training_log(context: Context, head: Head) -> list[dict[str, object]]:
    """What the trainer printed, one object a logging step."""
    return [json.loads(line) for line in head.path(context).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines() if line]
