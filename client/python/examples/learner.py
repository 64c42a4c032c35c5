# SPDX-License-Identifier: Apache-2.0
"""The learner's half of GRPO: a float32 policy, the clipped loss, packing, and the tensors to push."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bundled import data, modeling
from episodes import Episode, Group
from safetensors.torch import load_file

ROWS, LENGTH, CHUNK = 8, 256, 32  # a micro-batch that stays in a core's cache; rows get longer when an episode is


@dataclasses.dataclass
class Packed:
    """Rows of several episodes each. `old_logprobs` and `advantages` [B, T] stand at the token that they are about."""

    batch: data.Batch
    old_logprobs: torch.Tensor
    advantages: torch.Tensor


def advantages_of(rewards: Sequence[float]) -> np.ndarray:
    """GRPO: (reward - mean) / standard deviation within the group; 0 where all are equal."""
    values = np.asarray(rewards, np.float64)
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else np.zeros(len(values))


def pack(items: Sequence[tuple[Episode, float]]) -> Iterator[Packed]:
    """Micro-batches of all (episode, advantage), longest first into the first row with room."""
    items = sorted(items, key=lambda item: -len(item[0].tokens))
    length = max(LENGTH, -(-max(len(episode.tokens) for episode, _ in items) // CHUNK) * CHUNK)
    rows: list[list[tuple[Episode, float]]] = []
    room: list[int] = []
    for item in items:
        size = len(item[0].tokens)
        row = next((index for index, left in enumerate(room) if left >= size), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(length)
        rows[row].append(item)
        room[row] -= size
    for start in range(0, len(rows), ROWS):
        yield _tensors(rows[start : start + ROWS], length)


def _tensors(rows: list[list[tuple[Episode, float]]], length: int) -> Packed:
    tokens, positions = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(2))
    documents = torch.full((len(rows), length), -1)
    counts = torch.zeros(len(rows), length, dtype=torch.bool)
    old_logprobs, advantages = (torch.zeros(len(rows), length) for _ in range(2))
    for row, items in enumerate(rows):
        begin = 0
        for number, (episode, advantage) in enumerate(items):
            here = slice(begin, begin + len(episode.tokens))
            tokens[row, here] = torch.from_numpy(episode.tokens)
            positions[row, here] = torch.arange(len(episode.tokens))
            documents[row, here] = number
            counts[row, here] = torch.from_numpy(episode.trained)
            old_logprobs[row, here] = torch.from_numpy(episode.logprobs)
            advantages[row, here] = advantage
            begin = here.stop
    return Packed(data.Batch(tokens, positions, documents, counts), old_logprobs, advantages)


class Learner:
    """Owns the master weights and the optimizer.

    The server holds the checkpoint's dtypes (bfloat16, mostly). Updates are far smaller than a bfloat16 step, so the master copy is float32,
    and the forward pass uses its rounding, the very numbers that the server samples with; the gradient goes straight through to the master.
    That is what makes the importance ratio of a token of the newest version 1 but for the order of additions.

    The MTP layer is not trained: it is pushed along as it is, so that target and draft always have one version.
    """

    def __init__(self, model: Path, lr: float, clip_low: float, clip_high: float, entropy_bonus: float = 0.0,
                 entropy_target: float | None = None) -> None:
        self._model, self._lr, self._clip_low, self._clip_high = model, lr, clip_low, clip_high
        self._entropy_bonus, self._entropy_target = entropy_bonus, entropy_target
        weights, self.config, self.tokenizer = data.load_model(model)
        self._dtypes = {name: tensor.dtype for name, tensor in load_file(model / "model.safetensors").items()}
        self.weights = weights
        self._trained = {name: weight for name, weight in weights.items() if not name.startswith("mtp.")}
        self._optimizer = torch.optim.AdamW(self._trained.values(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the checkpoint, in its dtype: what to push."""
        for name, weight in self.weights.items():
            yield name, weight.detach().to(self._dtypes[name])

    def _served(self) -> modeling.Weights:
        return {name: weight.detach().to(self._dtypes[name]).float().requires_grad_() for name, weight in self._trained.items()}

    def _distributions(self, weights: modeling.Weights, batch: data.Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities [N, V] where a counted token is predicted, that token [N], and where that is [B, T] (one position before it)."""
        hidden = modeling.backbone(weights, batch.tokens, batch.positions, batch.documents, self.config, CHUNK)
        targets, counted = data.targets_at(batch, 1)
        return modeling.logits_of(weights, hidden[counted]).log_softmax(-1), targets[counted], counted

    def logprobs(self, weights: modeling.Weights, batch: data.Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability [N] of every counted token, and where it is predicted [B, T]."""
        log_probs, tokens, counted = self._distributions(weights, batch)
        return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), counted

    def step(self, groups: Sequence[Group], lr_share: float = 1.0) -> dict[str, Any]:
        """One optimizer step at `lr_share` of the learning rate.

        The loss is the mean over all sampled tokens of the groups. Groups whose rewards are all equal add nothing to it, and are not computed, unless
        there is an entropy bonus: that is the same mean, of the entropy of what each token is drawn from now, and has a gradient everywhere.
        The bonus rests while the groups were sampled at a mean entropy of entropy_target or more.
        """
        entropies = np.concatenate([episode.entropies[episode.trained] for group in groups for episode in group.episodes])
        bonus = self._entropy_bonus if self._entropy_target is None or entropies.mean() < self._entropy_target else 0.0
        items = [(episode, float(advantage)) for group in groups
                 for episode, advantage in zip(group.episodes, advantages_of([episode.reward for episode in group.episodes]))
                 if advantage != 0 or bonus != 0]
        stats: dict[str, Any] = {"trained_episodes": len(items), "trained_tokens": sum(int(item[0].trained.sum()) for item in items)}
        if not items:
            return stats
        num_tokens = sum(int(episode.trained.sum()) for group in groups for episode in group.episodes)
        served = self._served()
        ratios, clipped, loss_sum = [], 0, 0.0
        for packed in pack(items):
            log_probs, tokens, counted = self._distributions(served, packed.batch)
            new = log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
            old = modeling.shift_left(packed.old_logprobs, 1)[counted]
            advantage = modeling.shift_left(packed.advantages, 1)[counted]
            ratio = (new - old).exp()
            bounded = ratio.clamp(1 - self._clip_low, 1 + self._clip_high)
            loss = -torch.minimum(ratio * advantage, bounded * advantage).sum() / num_tokens
            if bonus != 0:
                loss = loss + bonus * (log_probs.exp() * log_probs).sum() / num_tokens
            loss.backward()
            loss_sum += loss.item()
            clipped += int((bounded * advantage < ratio * advantage).sum())
            ratios.append(ratio.detach())
        for name, weight in self._trained.items():
            weight.grad = served[name].grad
        norm = torch.nn.utils.clip_grad_norm_(self._trained.values(), 1.0)
        for settings in self._optimizer.param_groups:
            settings["lr"] = self._lr * lr_share
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        ratio = torch.cat(ratios)
        return stats | {
            "loss": loss_sum,
            "grad_norm": norm.item(),
            "ratio_mean": ratio.mean().item(),
            "ratio_min": ratio.min().item(),
            "ratio_max": ratio.max().item(),
            "clip_fraction": clipped / ratio.numel(),
            "kl": (ratio - 1 - ratio.log()).mean().item(),  # of the policy that sampled from this one; the k3 estimator
        }

    def save(self, directory: Path) -> None:
        """Writes the checkpoint, tokenizer included, as bebop-server reads it."""
        directory.mkdir(parents=True, exist_ok=True)
        data.save_model(directory, self.weights, self.config, self.tokenizer)
        shutil.copyfile(self._model / "tokenizer.json", directory / "tokenizer.json")
