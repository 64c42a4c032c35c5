#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains bebop-tiny: first the backbone on reference transcripts, then the MTP layer on the model's own samples.

    train.py --phase backbone --work DIR     needs tokenizer.json (train_tokenizer.py)
    train.py --phase mtp --work DIR          needs the finished backbone

Both phases keep a checkpoint in --work, resume from it, and write the model to --out whenever they checkpoint. Batches are
a function of (seed, step) alone, and one thread is used, so a resumed run equals an uninterrupted one on the same machine.

The learning rate warms up, stays constant and falls linearly to 0 over the last part, so a run's steps before that part do
not depend on --steps.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import data
import modeling
import sampling
import tasks
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay_share: float) -> float:
    """Trapezoid: linear warm-up, constant, linear decay to 0 over the last `decay_share` of the steps."""
    left = (steps - step) / max(1.0, decay_share * steps)
    return peak * min(1.0, (step + 1) / warmup, left)


def make_optimizer(weights: modeling.Weights, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; only matrices other than the embedding are decayed."""
    decayed = [w for name, w in weights.items() if w.dim() == 2 and name != modeling.EMBEDDING]
    chosen = {id(w) for w in decayed}
    rest = [w for w in weights.values() if id(w) not in chosen]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8, fused=True)


class Run:
    """A resumable loop over steps: owns the trained weights, the optimizer and the checkpoint file."""

    def __init__(self, arguments: argparse.Namespace, weights: modeling.Weights, steps: int, peak: float) -> None:
        self.arguments, self.weights, self.steps, self.peak = arguments, weights, steps, peak
        for weight in weights.values():
            weight.requires_grad_()
        self.optimizer = make_optimizer(weights, arguments.weight_decay)
        self.path = arguments.work / f"{arguments.phase}.pt"
        self.step = 0
        self.tokens = 0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.step, self.tokens = state["step"], state["tokens"]
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(state["weights"][name])
            self.optimizer.load_state_dict(state["optimizer"])
        self._mark = (time.monotonic(), self.tokens)

    def save(self) -> None:
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        data.write_atomically(self.path, lambda path: torch.save(state, path))

    def update(self, loss: torch.Tensor, num_tokens: int, **extra: object) -> None:
        """One optimizer step on `loss`; logs every --log-every steps."""
        rate = learning_rate(self.step, self.steps, self.peak, self.arguments.warmup, self.arguments.decay_share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += num_tokens
        if self.step % self.arguments.log_every == 0 or self.step == self.steps:
            now = time.monotonic()
            record = {
                "phase": self.arguments.phase,
                "step": self.step,
                "tokens": self.tokens,
                "loss": round(loss.item(), 4),
                "grad_norm": round(norm.item(), 3),
                "lr": round(rate, 7),
                "tokens_per_second": round((self.tokens - self._mark[1]) / (now - self._mark[0])),
                **extra,
            }
            self._mark = (now, self.tokens)
            if self.arguments.json:
                print(json.dumps(record), flush=True)
            else:
                print("  ".join(f"{key} {value}" for key, value in record.items()), flush=True)

    @property
    def at_checkpoint(self) -> bool:
        return self.step % self.arguments.checkpoint_every == 0 or self.step == self.steps


def documents_of_step(tokenizer: Tokenizer, seed: int, step: int) -> Iterator[data.Document]:
    """An endless stream of training transcripts, a function of (seed, step)."""
    rng = random.Random(f"backbone/{seed}/{step}")
    while True:
        yield data.encode_problem(tokenizer, tasks.draw_problem(data.draw_task(rng), rng))


def train_backbone(arguments: argparse.Namespace, config: modeling.ModelConfig, tokenizer: Tokenizer) -> None:
    """Next-token cross-entropy on the assistant's tokens."""
    layers = config.num_hidden_layers
    weights = modeling.initialise(modeling.backbone_shapes(config), layers, arguments.seed)
    mtp = modeling.initialise(modeling.mtp_shapes(config), layers, arguments.seed + 1)  # exported untrained
    run = Run(arguments, weights, arguments.steps or 4700, arguments.lr or 2e-3)
    if run.step == 0:
        data.save_model(arguments.out, weights | mtp, config, tokenizer)
    while run.step < run.steps:
        documents = documents_of_step(tokenizer, arguments.seed, run.step)
        batch = data.pack(documents, arguments.rows, arguments.length)
        targets, counted = data.targets_at(batch, 1)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = modeling.backbone(weights, batch.tokens, batch.positions, batch.documents, config)
            logits = modeling.logits_of(weights, hidden[counted])
        run.update(F.cross_entropy(logits, targets[counted]), int((batch.documents >= 0).sum()))
        if run.at_checkpoint:
            run.save()
            data.save_model(arguments.out, weights | mtp, config, tokenizer)


def own_samples(
    arguments: argparse.Namespace, weights: modeling.Weights, config: modeling.ModelConfig, tokenizer: Tokenizer
) -> list[data.Document]:
    """Samples of the frozen model at temperature 1 on training-split prompts; made once and kept in --work."""
    path = arguments.work / "samples.json"
    if path.exists():
        return [data.Document(tokens, [i >= start for i in range(len(tokens))]) for start, tokens in json.loads(path.read_text())]
    rng = random.Random(f"mtp/{arguments.seed}")
    generator = torch.Generator().manual_seed(arguments.seed)
    eos = tokenizer.token_to_id(tasks.IM_END)
    prompts = []
    for _ in range(arguments.num_samples):
        problem = tasks.draw_problem(data.draw_task(rng), rng)
        prompts.append(tokenizer.encode(problem.prompt(rng.randrange(problem.num_turns))).ids)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # rows of a batch have like lengths
    records: list[tuple[int, list[int]]] = [(0, [])] * len(prompts)
    for start in range(0, len(order), arguments.sample_rows):
        here = order[start : start + arguments.sample_rows]
        drawn = sampling.sample(weights, config, [prompts[i] for i in here], eos, arguments.max_new_tokens, generator)
        for index, item in zip(here, drawn, strict=True):
            records[index] = (len(item.prompt), item.prompt + item.tokens)
        print(json.dumps({"phase": "mtp", "sampled": start + len(here)}), flush=True)
    data.write_atomically(path, lambda target: target.write_text(json.dumps(records)))
    return own_samples(arguments, weights, config, tokenizer)


def train_mtp(arguments: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """Cross-entropy of recurrent MTP steps 1..K on the model's own samples; backbone, embedding and lm_head are frozen.

    The loss is the mean over steps of the mean over counted tokens. The backbone is the rounded one of the checkpoint.
    """
    weights, config, _ = data.load_model(arguments.out)
    frozen = {name: weight for name, weight in weights.items() if not name.startswith("mtp.")}
    documents = own_samples(arguments, frozen, config, tokenizer)
    mtp = modeling.initialise(modeling.mtp_shapes(config), config.num_hidden_layers, arguments.seed + 1)
    run = Run(arguments, mtp, arguments.steps or 700, arguments.lr or 1e-3)
    while run.step < run.steps:
        rng = random.Random(f"mtp/{arguments.seed}/{run.step}")
        batch = data.pack(iter(lambda rng=rng: rng.choice(documents), None), arguments.rows, arguments.length)
        where = (batch.tokens, batch.positions, batch.documents)
        losses = []
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                hidden = modeling.backbone(frozen, *where, config)
            chain = modeling.mtp_chain(frozen | mtp, hidden, *where, config, arguments.num_steps_ahead)
            for step, output in enumerate(chain, 1):
                targets, counted = data.targets_at(batch, step + 1)
                losses.append(F.cross_entropy(modeling.logits_of(frozen, output[counted]), targets[counted]))
        per_step = [round(loss.item(), 4) for loss in losses]
        run.update(torch.stack(losses).mean(), int((batch.documents >= 0).sum()), loss_per_step=per_step)
        if run.at_checkpoint:
            run.save()
            data.save_model(arguments.out, frozen | mtp, config, tokenizer)


def main() -> int:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--phase", choices=("backbone", "mtp"), required=True)
    parser.add_argument("--out", type=Path, default=here / "bebop-tiny")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default 4700 (backbone), 700 (mtp)")
    parser.add_argument("--lr", type=float, help="peak; default 2e-3 (backbone), 1e-3 (mtp)")
    parser.add_argument("--warmup", type=int, default=150, help="steps")
    parser.add_argument("--decay-share", type=float, default=0.35)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--num-steps-ahead", type=int, default=4, help="recurrent MTP steps trained")
    parser.add_argument("--num-samples", type=int, default=6000, help="own samples for the MTP layer")
    parser.add_argument("--sample-rows", type=int, default=500)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--checkpoint-every", type=int, default=250)
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--json", action="store_true", help="log JSON lines")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(here / "bebop-tiny" / "tokenizer.json"))
    if arguments.phase == "backbone":
        config = modeling.ModelConfig()
        if tokenizer.get_vocab_size() > config.vocab_size:
            raise ValueError(f"tokenizer has {tokenizer.get_vocab_size()} tokens, the model {config.vocab_size}")
        train_backbone(arguments, config, tokenizer)
    else:
        train_mtp(arguments, tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
