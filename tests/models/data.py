# SPDX-License-Identifier: Apache-2.0
"""Turns transcripts into packed token batches, and reads and writes checkpoints. Shared by train.py and evaluate.py."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import modeling
import tasks
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

TASK_SHARE = {"math": 0.45, "code": 0.3, "tools": 0.25}  # share of problems, not of tokens


@dataclasses.dataclass(frozen=True)
class Document:
    """Token ids and, per token, whether predicting it counts."""

    tokens: list[int]
    counts: list[bool]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows. tokens, positions (restart per document), documents (an id per token) and counts are [B, T]."""

    tokens: Tensor
    positions: Tensor
    documents: Tensor
    counts: Tensor


def encode_problem(tokenizer: Tokenizer, problem: tasks.Problem) -> Document:
    """Assistant text counts, given text does not. Segments meet at special tokens or newlines, where no token spans."""
    tokens: list[int] = []
    counts: list[bool] = []
    for segment in problem.segments:
        ids = tokenizer.encode(segment.text).ids
        tokens += ids
        counts += [segment.trained] * len(ids)
    return Document(tokens, counts)


def draw_task(rng: random.Random) -> str:
    return rng.choices(tuple(TASK_SHARE), tuple(TASK_SHARE.values()))[0]


def pack(documents: Iterable[Document], rows: int, length: int, patience: int = 12) -> Batch:
    """First-fit packing; stops after `patience` documents in a row that fit nowhere, or when the documents end."""
    tokens = torch.zeros(rows, length, dtype=torch.long)
    positions = torch.zeros(rows, length, dtype=torch.long)
    ids = torch.full((rows, length), -1, dtype=torch.long)
    counts = torch.zeros(rows, length, dtype=torch.bool)
    used, misses, number = [0] * rows, 0, 0
    for document in documents:
        size = len(document.tokens)
        row = next((index for index in range(rows) if used[index] + size <= length), None)
        if row is None:
            misses += 1
            if misses == patience:
                break
            continue
        here = slice(used[row], used[row] + size)
        tokens[row, here] = torch.tensor(document.tokens)
        positions[row, here] = torch.arange(size)
        ids[row, here] = number
        counts[row, here] = torch.tensor(document.counts)
        used[row] += size
        number += 1
    return Batch(tokens, positions, ids, counts)


def targets_at(batch: Batch, ahead: int) -> tuple[Tensor, Tensor]:
    """Token at t + ahead [B, T], and where it belongs to the document of t and counts."""
    same = modeling.shift_left(batch.documents, ahead) == batch.documents
    same[:, batch.tokens.shape[1] - ahead :] = False
    return modeling.shift_left(batch.tokens, ahead), same & modeling.shift_left(batch.counts, ahead)


def write_atomically(path: Path, write: Any) -> None:
    """Calls write(temporary path), then renames it to `path`."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def save_model(directory: Path, weights: modeling.Weights, config: modeling.ModelConfig, tokenizer: Tokenizer) -> None:
    """Writes config.json, generation_config.json and model.safetensors (bfloat16), each atomically.

    A_log and the gated norm's weight stay float32, as in the published checkpoints.
    """
    eos, pad = tokenizer.token_to_id(tasks.IM_END), tokenizer.token_to_id(tasks.END_OF_TEXT)
    keep = ("A_log", "linear_attn.norm.weight")
    tensors = {
        name: tensor.detach().to(torch.float32 if name.endswith(keep) else torch.bfloat16).contiguous()
        for name, tensor in sorted(weights.items())
    }
    generation = {"do_sample": True, "temperature": 1.0, "eos_token_id": [eos, pad], "pad_token_id": pad}
    files = {"config.json": config.to_json(eos, pad), "generation_config.json": generation}
    for name, content in files.items():
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(directory / name, lambda path, text=text: path.write_text(text))

    def write_tensors(path: Path) -> None:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors creates it for the owner alone

    write_atomically(directory / "model.safetensors", write_tensors)


def load_model(directory: Path) -> tuple[modeling.Weights, modeling.ModelConfig, Tokenizer]:
    """Weights as float32, config and tokenizer; names and shapes are checked."""
    config = modeling.ModelConfig.load(directory)
    weights = {name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()}
    shapes = modeling.backbone_shapes(config) | modeling.mtp_shapes(config)
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != shapes:
        wrong = sorted(set(found.items()) ^ set(shapes.items()))
        raise ValueError(f"{directory}: tensors differ from config.json: {wrong[:4]}")
    return weights, config, Tokenizer.from_file(str(directory / "tokenizer.json"))
