# SPDX-License-Identifier: Apache-2.0
"""How much is trained and measured. Three scales of one experiment; nothing else differs between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

LOSSES = ("ce", "kl", "reverse_kl", "tv", "e2e_tv", "lk")  # the paper's five, and LK


@dataclasses.dataclass(frozen=True)
class Settings:
    """One scale. Counts of prompts are a workload's; tokens follow from them."""

    losses: tuple[str, ...]
    seeds: int  # data order, and another sample of rollouts
    # Training: the same for every loss.
    rollouts: int  # sequences a seed
    num_steps_ahead: int
    lr: float
    batch_tokens: int
    top_k: tuple[int, ...]  # truncated TV
    # Decoding.
    num_draft_tokens: int
    samples: int  # of a prompt
    max_new_tokens: int
    prompts: int
    temperatures: tuple[float, ...]  # beside 1
    temperature_prompts: int
    # Teacher-forced scores.
    score_sequences: int
    score_temperatures: tuple[float, ...]
    # Throughput.
    throughput_prompts: int
    throughput_rounds: int
    # The machine.
    servers: int  # and trainings at a time
    threads: int  # of each


QUICK = Settings(
    losses=("ce", "tv", "e2e_tv"), seeds=2, rollouts=160, num_steps_ahead=3, lr=1e-4, batch_tokens=1024, top_k=(8,), num_draft_tokens=3, samples=1,
    max_new_tokens=96, prompts=20, temperatures=(1.3,), temperature_prompts=10, score_sequences=12, score_temperatures=(1.0,), throughput_prompts=8,
    throughput_rounds=2, servers=2, threads=1)

FULL = Settings(
    losses=LOSSES, seeds=3, rollouts=3000, num_steps_ahead=3, lr=1e-4, batch_tokens=1024, top_k=(2, 8, 32), num_draft_tokens=3, samples=4,
    max_new_tokens=128, prompts=100, temperatures=(0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.6), temperature_prompts=40, score_sequences=100,
    score_temperatures=(0.3, 1.0, 1.3), throughput_prompts=40, throughput_rounds=4, servers=2, threads=1)

# A GPU holds one server, and one training at a time keeps it busy. The paper's recipe where it differs: five steps, its learning rate. Truncated
# losses are for the CPU alone.
GPU = dataclasses.replace(
    FULL, rollouts=60000, num_steps_ahead=5, lr=3.5e-5, batch_tokens=16384, top_k=(), max_new_tokens=512, prompts=200, temperatures=(0.3, 0.7, 1.3),
    temperature_prompts=32, score_sequences=200, throughput_prompts=100, servers=1, threads=0)

SCALES = {"quick": QUICK, "full": FULL, "gpu": GPU}


@dataclasses.dataclass(frozen=True)
class Programs:
    """The built programs."""

    server: Path
    trainer: Path
    client: Path

    @staticmethod
    def of(folder: Path) -> Programs:
        """Those in a build's bin folder. FileNotFoundError names the one that is not there."""
        programs = Programs(*(folder / name for name in ("bebop-server", "bebop-train-mtp", "bebop")))
        for path in (programs.server, programs.trainer, programs.client):
            if not path.exists():
                raise FileNotFoundError(f"{path}: not built; tests/reproduction/run.sh builds it")
        return programs


@dataclasses.dataclass(frozen=True)
class Context:
    """What every stage gets."""

    settings: Settings
    work: Path  # everything that stages keep
    model: Path
    start: Path  # the head that every training starts from
    device: str
    programs: Programs
    say: Callable[[str], None]
