"""Lines about how far a long pass over tokens is."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol, TypeVar

T = TypeVar("T")


class Pace(Protocol):
    """How an evaluation proceeds between windows: it calls this with whatever may fail."""

    def __call__(self, action: Callable[[], T]) -> T:
        """What `action` returns."""


def alone(action: Callable[[], T]) -> T:
    """The pace of a process that evaluates alone."""
    return action()


def to_stderr(line: str) -> None:
    """Print a line at once; a closed terminal does not end a long evaluation."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class TokenProgress:
    """Reports, at most every `seconds`, how many tokens of about `total` are done."""

    def __init__(
        self, task: str, total: int, report: Callable[[str], None], seconds: float = 5.0
    ) -> None:
        self.task = task
        self.total = total
        self.done = 0
        self._report = report
        self._seconds = seconds
        self._started = self._reported = time.perf_counter()

    def add(self, tokens: int) -> None:
        """Count tokens; a line if the last one, or the beginning, was long enough ago."""
        self.done += tokens
        now = time.perf_counter()
        if now - self._reported < self._seconds:
            return
        self._reported = now
        rate = self.done / (now - self._started)
        of, left = f"of {self.total:,} tokens", (self.total - self.done) / rate
        end = f"ETA {timedelta(seconds=round(left))}" if left >= 0 else "ETA unknown"
        if left < 0:  # the first documents are longer than the others
            of = f"tokens, where about {self.total:,} were expected"
        self._report(f"{self.task}: {self.done:,} {of} | {rate:,.0f} tok/s | {end}")
