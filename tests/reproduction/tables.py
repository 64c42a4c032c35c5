# SPDX-License-Identifier: Apache-2.0
"""Markdown tables, and their places in a page: between `<!-- table: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from estimates import Estimate


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def number(value: float, digits: int = 1, sign: bool = False) -> str:
    """A number of fixed digits; "–" for nan."""
    if math.isnan(value):
        return "–"
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", "−")


def with_half(estimate: Estimate, digits: int = 1, sign: bool = False) -> str:
    """Mean ± half the interval."""
    if math.isnan(estimate.low):
        return number(estimate.mean, digits, sign)
    return f"{number(estimate.mean, digits, sign)} ± {number(estimate.half, digits)}"


def with_bounds(estimate: Estimate, digits: int = 1, sign: bool = False) -> str:
    """Mean [low, high]."""
    return f"{number(estimate.mean, digits, sign)} [{number(estimate.low, digits, sign)}, {number(estimate.high, digits, sign)}]"


def fill(page: Path, tables: Mapping[str, str]) -> None:
    """Rewrites the tables of a page; others in it stay. ValueError: the page has no place for one."""
    text = page.read_text(encoding="utf-8")
    for name, content in tables.items():
        begin = f"<!-- table: {name} -->"
        pattern = re.compile(re.escape(begin) + r"\n.*?<!-- end -->", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{page}: needs {begin} ... <!-- end --> exactly once")
        text = pattern.sub(lambda _, begin=begin, content=content: f"{begin}\n{content}\n<!-- end -->", text)
    page.write_text(text, encoding="utf-8")
