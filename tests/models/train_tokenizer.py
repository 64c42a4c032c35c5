#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains the byte-level BPE of bebop-tiny on training-split transcripts and writes tokenizer.json.

The pipeline is that of the Qwen tokenizers: NFC normaliser, regex split (digits stand alone), byte-level alphabet, BPE.
Deterministic: the same tasks.py, seed and `tokenizers` version give the same file.

    train_tokenizer.py --out bebop-tiny/tokenizer.json
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import tasks
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _texts(num_problems: int, seed: int) -> Iterator[str]:
    """Transcripts without the special tokens, so that no merge can span them."""
    rng = random.Random(f"tokenizer/{seed}")
    for _ in range(num_problems):
        for task in tasks.TASKS:
            text = tasks.draw_problem(task, rng).text
            for token in tasks.SPECIAL_TOKENS:
                text = text.replace(token, "\0")
            yield from filter(None, text.split("\0"))


def train(vocab_size: int, num_problems: int, seed: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens: specials are the last ids, as in the real checkpoints."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(tasks.SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(num_problems, seed), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tasks.SPECIAL_TOKENS])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "bebop-tiny" / "tokenizer.json")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--num-problems", type=int, default=5000, help="problems per task")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = train(arguments.vocab_size, arguments.num_problems, arguments.seed)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.out))
    print(f"{arguments.out}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
