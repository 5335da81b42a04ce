"""Progress is a bar on a terminal and lines elsewhere."""

from __future__ import annotations

import io

import pytest

from data_prep.pipeline import progress
from data_prep.pipeline.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_come_every_few_seconds_with_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    shown = Progress("tokenizing", 30_000_000, 10_000_000, stream)
    now[0] += 2
    shown.show(4_000_000, 0)
    assert stream.getvalue() == ""
    now[0] += 3
    shown.show(10_000_000, 5_000_000)
    assert stream.getvalue() == (
        "tokenizing: 20.0 of 30.0 MB, 2.0 MB/s, 1,000,000 tokens/s, 5 s left\n"
    )


def test_a_stage_of_no_size_shows_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    shown = Progress("training", 0, 0, stream)
    now[0] = 61.0
    shown.show(0, 0)
    assert stream.getvalue() == "training: 61 s\n"


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    shown = Progress("tokenizing", 1_000_000, 250_000, stream)
    shown.show(500_000, 1000)
    shown.close()
    last = stream.getvalue().split("\r")[-1]
    assert "tokenizing:  75%" in last
    assert "750k/1.00M" in last
    assert "tokens/s" in last
