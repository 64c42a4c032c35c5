# SPDX-License-Identifier: Apache-2.0
"""How far an update is: tqdm's bar where it is installed, else a line on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Union

Wanted = Union[bool, Callable[[int, int, str], Any]]


class Progress:
    """Takes the bytes so far. A context manager. This one shows nothing."""

    def update(self, sent_bytes: int, name: str) -> None:
        """`name`: of the tensor that the last bytes belong to."""

    def close(self) -> None:
        pass

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


class _Callable(Progress):
    def __init__(self, function: Callable[[int, int, str], Any], total_bytes: int):
        self._function, self._total = function, total_bytes

    def update(self, sent_bytes: int, name: str) -> None:
        self._function(sent_bytes, self._total, name)


class _Bar(Progress):
    def __init__(self, tqdm: Any, total_bytes: int, title: str):
        self._bar = tqdm(total=total_bytes, desc=title, unit="B", unit_scale=True, leave=False)

    def update(self, sent_bytes: int, name: str) -> None:
        self._bar.update(sent_bytes - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _Line(Progress):
    def __init__(self, total_bytes: int, title: str):
        self._total, self._title = total_bytes, title
        self._begin = time.monotonic()
        self._shown = 0.0

    def update(self, sent_bytes: int, name: str) -> None:
        now = time.monotonic()
        if now - self._shown < 0.1 and sent_bytes < self._total:
            return
        self._shown = now
        rate = sent_bytes / max(now - self._begin, 1e-6) / 1e6
        percent = 100 * sent_bytes // max(self._total, 1)
        sys.stderr.write(f"\r{self._title}: {percent:3d} % of {self._total / 1e6:.1f} MB, {rate:.0f} MB/s\x1b[K")
        sys.stderr.flush()

    def close(self) -> None:
        sys.stderr.write("\n")


def open_progress(wanted: Wanted, total_bytes: int, title: str) -> Progress:
    """False: nothing. True: a bar, if standard error is a terminal. A callable: is given (sent_bytes, total_bytes, tensor_name)."""
    if callable(wanted):
        return _Callable(wanted, total_bytes)
    if not wanted or not sys.stderr.isatty():
        return Progress()
    try:
        from tqdm import tqdm
    except ImportError:
        return _Line(total_bytes, title)
    return _Bar(tqdm, total_bytes, title)
