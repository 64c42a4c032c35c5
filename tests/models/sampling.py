# SPDX-License-Identifier: Apache-2.0
"""Batched sampling at temperature 1 with the step-form decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import modeling
import torch


@dataclasses.dataclass
class Sample:
    """One sampled completion; `entropies[i]` is the entropy in nats of the distribution that token i was drawn from."""

    prompt: list[int]
    tokens: list[int]
    entropies: list[float]
    finished: bool  # ended with the end-of-sequence token


@torch.no_grad()
def sample(
    weights: modeling.Weights,
    config: modeling.ModelConfig,
    prompts: Sequence[list[int]],
    eos: int,
    max_new_tokens: int,
    generator: torch.Generator,
) -> list[Sample]:
    """One completion per prompt. All rows advance together: a row still inside its prompt is fed the prompt's token.

    Finished rows are dropped from the batch when they are a quarter of it.
    """
    samples = [Sample(list(prompt), [], [], False) for prompt in prompts]
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    decoder = modeling.Decoder(weights, config, len(samples), longest)
    active = list(range(len(samples)))
    current = torch.tensor([prompt[0] for prompt in prompts])
    for position in range(1, longest):
        logits = decoder.step(current)
        log_probs = logits.log_softmax(-1)
        probs = log_probs.exp()
        entropies = (probs * -log_probs).sum(-1).tolist()
        drawn = torch.multinomial(probs, 1, generator=generator).squeeze(1).tolist()
        done = []
        for row, index in enumerate(active):
            item = samples[index]
            if position < len(item.prompt):
                drawn[row] = item.prompt[position]
            elif not item.finished and len(item.tokens) < max_new_tokens:
                item.tokens.append(drawn[row])
                item.entropies.append(entropies[row])
                item.finished = drawn[row] == eos
            if item.finished or len(item.tokens) == max_new_tokens:
                done.append(row)
        if len(done) == len(active):
            break
        current = torch.tensor(drawn)
        if 4 * len(done) >= len(active):
            finished = set(done)
            rows = torch.tensor([row for row in range(len(active)) if row not in finished])
            decoder.keep(rows)
            current, active = current[rows], [active[row] for row in rows.tolist()]
    return samples
