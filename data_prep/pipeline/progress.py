"""Progress of a stage: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

_LINE_SECONDS = 5.0

# Bytes and tokens, shared with forked workers; None where no progress is shown, as under Slurm.
_counters: Any = None


def watch(counters: Any) -> None:
    """Make `count` add to these counters, in this process."""
    global _counters
    _counters = counters


def count(read: int, tokens: int = 0) -> None:
    """Count bytes that the stage has read, and tokens."""
    if _counters is not None:
        with _counters.get_lock():
            plain = _counters.get_obj()  # the array itself: its wrapper locks at each access
            plain[0] += read
            plain[1] += tokens


class Progress:
    """Shows one stage on `stream`; of `total` bytes an earlier run did `done`.

    Where the size is unknown (`total` 0) only the time is shown.
    """

    def __init__(self, label: str, total: int, done: int, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._label, self._total, self._before = label, total, done
        self._begun = self._shown = time.monotonic()
        self._bar: Any = None
        if self._stream.isatty():
            # Its monitor is a thread, and workers are forked from this process.
            tqdm.monitor_interval = 0
            self._bar = tqdm(
                desc=label,
                bar_format=None if total else "{desc}: {elapsed}",
                total=total,
                initial=done,
                unit="B",
                unit_scale=True,
                dynamic_ncols=True,
                file=self._stream,
            )

    def show(self, read: int, tokens: int) -> None:
        """Show the bytes and tokens that this run has done so far."""
        seconds = max(time.monotonic() - self._begun, 1e-9)
        if self._bar is not None:
            if tokens:
                self._bar.set_postfix_str(f"{tokens / seconds:,.0f} tokens/s", refresh=False)
            self._bar.n = min(self._before + read, self._total)
            self._bar.refresh()
        elif time.monotonic() - self._shown >= _LINE_SECONDS:
            self._shown = time.monotonic()
            print(self._line(read, tokens, seconds), file=self._stream, flush=True)

    def _line(self, read: int, tokens: int, seconds: float) -> str:
        if not self._total:
            return f"{self._label}: {seconds:,.0f} s"
        rate = read / seconds
        left = (self._total - self._before - read) / rate if rate else float("inf")
        parts = [
            f"{self._label}: {(self._before + read) / 1e6:,.1f} of {self._total / 1e6:,.1f} MB",
            f"{rate / 1e6:,.1f} MB/s",
        ]
        if tokens:
            parts.append(f"{tokens / seconds:,.0f} tokens/s")
        if left != float("inf"):
            parts.append(f"{max(left, 0):,.0f} s left")
        return ", ".join(parts)

    def close(self) -> None:
        """End the bar; its last state stays on the terminal."""
        if self._bar is not None:
            self._bar.close()
