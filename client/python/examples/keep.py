# SPDX-License-Identifier: Apache-2.0
"""Keeps what a run passes through: every so many versions a checkpoint of the policy, and what it was trained on since the one before.

    DIR/version-000000/                      a checkpoint, as bebop-server and bebop-train-mtp read it
    DIR/version-000050/
    DIR/rollouts-000000-000050.jsonl         {"token_ids": [...], "loss_start": N} a line, as bebop-train-mtp reads it
    DIR/manifest.json                        what there is, in order

Folders and files are written under another name and then renamed, and the manifest comes last: whatever it names is whole, also after a kill of the
program. Nothing is forced to the disk, so a machine that loses power may keep the manifest and lose what it names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from bundled import data
from episodes import Episode, Group
from learner import Learner

MANIFEST = "manifest.json"


def documents_of(episode: Episode) -> Iterator[tuple[list[int], int]]:
    """(tokens, the first that counts) of every turn: the transcript up to the turn's end, of which the turn counts.

    A single document could not say that the environment's tokens between turns do not count: the policy did not draw them, and drafts are
    never verified there. Nor are drafts that reach past a turn's end, and there the documents end, too.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], episode.trained, [False]]).astype(np.int8)))
    tokens = episode.tokens.tolist()
    for begin, end in edges.reshape(-1, 2).tolist():
        yield tokens[:end], begin


class Keeper:
    """Writes checkpoints and rollouts to a folder. Call add() for every batch trained on and then reached() with the version that came of it."""

    def __init__(self, folder: Path, every: int, policy: Learner, arguments: dict[str, Any]) -> None:
        """ValueError: the folder has files already. Runs are never mixed."""
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(path.name for path in folder.iterdir())
        if found:
            raise ValueError(f"keep: {folder} is not empty: it has {found[0]}; give a folder of its own for each run")
        self._folder, self._every, self._policy = folder, every, policy
        self._manifest: dict[str, Any] = {"arguments": arguments, "every": every, "ended": False, "kept": []}
        self._rollouts: TextIO | None = None
        self._counts: dict[str, float] = {}

    def _name(self, *parts: object) -> str:
        return "-".join(f"{part:06}" if isinstance(part, int) else str(part) for part in parts)

    @property
    def _temporary(self) -> Path:
        return self._folder / "rollouts.jsonl.tmp"

    def add(self, groups: list[Group]) -> None:
        if self._rollouts is None:
            self._rollouts = self._temporary.open("w", encoding="utf-8")
        names = ("steps", "episodes", "documents", "tokens", "loss_tokens", "reward", "entropy")
        counts = dict.fromkeys(names, 0) | {"steps": 1}
        for episode in (episode for group in groups for episode in group.episodes):
            for tokens, loss_start in documents_of(episode):
                self._rollouts.write(json.dumps({"token_ids": tokens, "loss_start": loss_start}, separators=(",", ":")) + "\n")
                counts["documents"] += 1
                counts["tokens"] += len(tokens)
                counts["loss_tokens"] += len(tokens) - loss_start
            counts["episodes"] += 1
            counts["reward"] += episode.reward
            counts["entropy"] += float(episode.entropies[episode.trained].sum())
        self._counts = {name: self._counts.get(name, 0) + counts[name] for name in names}

    def reached(self, version: int) -> None:
        """Keeps the version if its turn has come, and always the first."""
        kept = self._manifest["kept"]
        if not kept or version - kept[0]["version"] >= len(kept) * self._every:
            self._keep(version)

    def end(self, version: int) -> None:
        """Keeps the last version, if it is not, and notes that the run came to its end."""
        if self._manifest["kept"] and self._manifest["kept"][-1]["version"] != version:
            self._keep(version)
        self._manifest["ended"] = True
        self._write_manifest()

    def close(self) -> None:
        """Drops the rollouts that no checkpoint follows."""
        if self._rollouts is not None:
            self._rollouts.close()
            self._rollouts = None
            self._temporary.unlink(missing_ok=True)

    def _keep(self, version: int) -> None:
        kept = self._manifest["kept"]
        entry: dict[str, Any] = {"version": version, "checkpoint": self._name("version", version)}
        temporary = self._folder / f"{entry['checkpoint']}.tmp"
        self._policy.save(temporary)
        os.rename(temporary, self._folder / entry["checkpoint"])
        if self._rollouts is not None:
            entry["rollouts"] = self._name("rollouts", kept[-1]["version"], version) + ".jsonl"
            self._rollouts.close()
            self._rollouts = None
            os.replace(self._temporary, self._folder / entry["rollouts"])
            counts, self._counts = self._counts, {}
            entry |= {name: counts[name] for name in ("steps", "episodes", "documents", "tokens", "loss_tokens")}
            entry |= {"reward": counts["reward"] / counts["episodes"], "entropy": counts["entropy"] / counts["loss_tokens"]}
        kept.append(entry)
        self._write_manifest()

    def _write_manifest(self) -> None:
        text = json.dumps(self._manifest, indent=2) + "\n"
        data.write_atomically(self._folder / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))
