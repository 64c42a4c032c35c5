#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the goldens of the tokenizer tests: small tokenizers, strings, and what the `tokenizers` package makes of them.

    tokenizer_golden.py [--out tests/golden/tokenizer]

Deterministic for one version of `tokenizers` (written into VERSION beside the files). For each tokenizer NAME of TOKENIZERS:

    NAME.json         the tokenizer
    NAME.strings.tsv  a line per line of strings.txt: number of ids, hash of the ids (special tokens parsed), the same two with special
                      tokens as text, hash of the decoded text of the former without special tokens
    NAME.ids.tsv      ids<TAB>hash of the decoded text<TAB>the same without special tokens

A line of strings.txt is one string, as segments separated by blanks: `x<hex bytes>`, `x<hex bytes>*<count>`, or
`r<first>-<last>:<hex bytes>`: every code point of the range (no surrogates), each followed by the bytes. Bytes that are not UTF-8 become
U+FFFD as by errors="replace". Hashes are 64-bit FNV-1a, of the ids as 4 little-endian bytes each or of the text as UTF-8.
"""

from __future__ import annotations

import argparse
import random
import unicodedata
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + BLANKS
QWEN35 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + BLANKS
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + BLANKS

# name: (vocabulary, expression or None for ByteLevel's own, NFC, added tokens (content, special, normalized), ignore_merges)
TOKENIZERS = {
    "qwen2": (700, QWEN2, True, [("<|endoftext|>", True, False), ("<|im_start|>", True, False), ("<tool_call>", False, False)], False),
    "qwen35": (
        1200,
        QWEN35,
        True,
        [
            ("<|endoftext|>", True, False),
            ("<|end", False, False),  # a prefix of another: the longest wins
            ("caf\u00e9", False, True),  # found after normalisation, in either spelling
            ("a b", True, False),
            ("\u4f60\u597d", False, False),
        ],
        False,
    ),
    "llama3": (500, LLAMA3, False, [("<|begin|>", True, False)], True),
    "gpt2": (400, None, False, [], False),
}

WORDS = (
    "the quick brown fox jumps over lazy dogs and said hello world answer equals result function return import value token "
    "Straße naïve café déjà vu Übergröße mañana коммунизм привет мир здравствуй ελληνικά γλώσσα שלום עולם مرحبا بالعالم हिन्दी नमस्ते "
    "ภาษาไทย 你好 世界 日本語 こんにちは 한국어 안녕하세요 x1 y2 foo_bar fooBar __init__ 3.14159 1,000,000 ½ ² Ⅷ ٣ 2026-01-02 e=mc²"
).split()
EMOJI = ["😀", "👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "❤️", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "☃", "🤷🏿‍♂️", "#️⃣", "🙂", "✈️", "🫠"]
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\r", "\u00a0", "\u2003", "\u3000", "\u2028", "\u2029", "\u0085", "\v", "\f", "\u200b", "\u1680", "\u180e"]
APOSTROPHES = ["'s", "'S", "'t", "'RE", "'ve", "'VE", "'m", "'ll", "'lL", "'d", "'D", "'\u017f", "\u2019s", "'x", "''s", "'", "I'll've"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<tool_call>", "<|end", "<|endoftext|", "a b", "café", "cafe\u0301", "你好", "<|begin|>", "<", "|>", "<|"]


def corpus(rng: random.Random) -> list[str]:
    lines = []
    for _ in range(3000):
        words = [rng.choice(WORDS + EMOJI + APOSTROPHES) for _ in range(rng.randint(1, 12))]
        lines.append("".join(word + rng.choice([" ", " ", " ", "  ", "\n", ", ", ""]) for word in words))
    return lines


def train(vocab_size: int, pattern: str | None, nfc: bool, added: list, ignore_merges: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(corpus(random.Random("corpus")), trainer)
    for content, special, normalized in added:
        token = AddedToken(content, special=special, normalized=normalized)
        if special:
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])
    return tokenizer


def hexed(text: str | bytes) -> str:
    return "x" + (text.encode() if isinstance(text, str) else text).hex()


def random_strings(rng: random.Random) -> list[str]:
    by_category: dict[str, list[str]] = {}
    for code_point in range(0x110000):
        if not 0xD800 <= code_point <= 0xDFFF:
            by_category.setdefault(unicodedata.category(chr(code_point)), []).append(chr(code_point))
    categories = sorted(by_category)
    marks = by_category["Mn"] + by_category["Mc"] + by_category["Me"]
    jamo = [chr(c) for c in range(0x1100, 0x1200)] + [chr(c) for c in range(0xAC00, 0xAC80)]
    bases = "aeiouAEIOUncs\u0131\u03b1\u0438\u05d0\u0915\u304b\u1112"

    def pick(choices, low, high):
        return "".join(rng.choice(choices) for _ in range(rng.randint(low, high)))

    makers = [
        lambda: pick([w + s for w in WORDS for s in ("", " ", "\n")], 1, 12),
        lambda: pick([chr(c) for c in range(128)], 0, 30),
        lambda: pick(SPACES + ["a", "1", "."], 1, 20),
        lambda: pick(SPACES[:6] + ["a"], 1, 15),
        lambda: pick(EMOJI + [" ", "a", "\ufe0f", "\u200d"], 1, 8),
        lambda: pick(APOSTROPHES + ["a", " ", "don", "I"], 1, 8),
        lambda: pick(list(bases) + marks + ["\u0301", "\u0323", "\u0327", "\u0308"] * 60, 1, 16),
        lambda: pick(jamo, 1, 12),
        lambda: pick(SPECIAL + [" ", "x", "\n", "caf", "\u0301"], 1, 8),
        lambda: "".join(rng.choice(by_category[rng.choice(categories)]) for _ in range(rng.randint(1, 12))),
        lambda: pick([chr(c) for c in list(range(32)) + list(range(127, 160))] + ["a", " "], 1, 12),
        lambda: pick("0123456789\u00b2\u0663\u2167\u00bd", 1, 9) + pick([" ", ".", ",", "a", ""], 0, 3),
    ]
    return [hexed(rng.choice(makers)()) for _ in range(1500)] + [hexed("".join(rng.choice(by_category[c]) for _ in range(3))) for c in categories * 8]


def invalid_strings(rng: random.Random) -> list[str]:
    bad = [b"\x80", b"\xc0\xaf", b"\xe0\x9f\xbf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xf5", b"\xff", b"\xe4\xbd", b"\xf0\x9f\x98", b"\xf0\x9f", b"\xc3"]
    strings = []
    for _ in range(250):
        parts = [rng.choice(bad + [b"a", b" ", "é".encode(), "😀".encode()]) for _ in range(rng.randint(1, 8))]
        strings.append(hexed(b"".join(parts)))
    strings += [hexed(bytes(rng.randrange(256) for _ in range(rng.randint(1, 24)))) for _ in range(250)]
    return strings


def all_code_points() -> list[str]:
    """Every code point of the assigned planes, alone between letters and in a row."""
    ranges = [(first, first + 0x3FF) for plane in (0, 1, 2, 3, 14) for first in range(plane << 16, (plane + 1) << 16, 0x400)]
    ranges = [(first, last) for first, last in ranges if not 0xD800 <= first <= 0xDFFF]
    return [f"r{first:x}-{last:x}:{separator}" for first, last in ranges for separator in ("", "61")] + ["r10ff00-10ffff:20"]


def long_strings() -> list[str]:
    mebi = 1 << 20
    units = ["a", " ", "\n", "\r", "\t", "0", "'", ".", "é", "e\u0301", "中", "😀", "\u0301", "\u0301\u0323", "ab", "the ", " \n", "\u3000", "\u1112\u1161\u11ab", "<|end", "'s"]
    strings = [f"{hexed(unit)}*{mebi // len(unit.encode())}" for unit in units]
    strings += [f"{hexed(' ')}*{mebi} {hexed('a')}", f"{hexed('a')} {hexed(' ')}*{mebi} {hexed(chr(10))} {hexed(' ')}*1000", f"xff*{mebi}", f"xf09f98*{mebi // 3}"]
    return strings


def render(spec: str) -> str:
    data = b""
    for segment in spec.split(" "):
        if segment.startswith("x"):
            body, _, count = segment[1:].partition("*")
            data += bytes.fromhex(body) * int(count or 1)
        else:
            bounds, _, separator = segment[1:].partition(":")
            first, last = (int(bound, 16) for bound in bounds.split("-"))
            code_points = [c for c in range(first, last + 1) if not 0xD800 <= c <= 0xDFFF]
            data += b"".join(chr(c).encode() + bytes.fromhex(separator) for c in code_points)
    return data.decode("utf-8", errors="replace")


def fnv(data: bytes) -> str:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def hash_ids(ids: list[int]) -> str:
    return fnv(b"".join(i.to_bytes(4, "little") for i in ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tokenizer")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random("strings")
    specs = random_strings(rng) + invalid_strings(rng) + all_code_points() + long_strings()
    specs = list(dict.fromkeys(specs))
    (out / "strings.txt").write_text("\n".join(specs) + "\n")
    (out / "VERSION").write_text(f"tokenizers {tokenizers.__version__}\n")
    for name, recipe in TOKENIZERS.items():
        tokenizer = train(*recipe)
        tokenizer.save(str(out / f"{name}.json"), pretty=False)
        lines = []
        for spec in specs:
            text = render(spec)
            tokenizer.encode_special_tokens = False
            parsed = tokenizer.encode(text, add_special_tokens=False).ids
            tokenizer.encode_special_tokens = True
            plain = tokenizer.encode(text, add_special_tokens=False).ids
            decoded = tokenizer.decode(parsed, skip_special_tokens=True).encode()
            lines.append("\t".join([str(len(parsed)), hash_ids(parsed), str(len(plain)), hash_ids(plain), fnv(decoded)]))
        (out / f"{name}.strings.tsv").write_text("\n".join(lines) + "\n")
        rng = random.Random(f"ids/{name}")
        size = tokenizer.get_vocab_size()
        lines = []
        for _ in range(300):
            ids = [rng.randrange(256) if rng.random() < 0.4 else rng.randrange(size + 2) for _ in range(rng.randint(1, 24))]
            texts = [tokenizer.decode(ids, skip_special_tokens=skip).encode() for skip in (False, True)]
            lines.append("\t".join([" ".join(map(str, ids)), fnv(texts[0]), fnv(texts[1])]))
        (out / f"{name}.ids.tsv").write_text("\n".join(lines) + "\n")
        print(f"{name}: {size} tokens, {len(specs)} strings")


if __name__ == "__main__":
    main()
