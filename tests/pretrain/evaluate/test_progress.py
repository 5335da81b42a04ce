"""Progress lines."""

from __future__ import annotations

import re
import time

from pretrain.evaluate.progress import TokenProgress


def test_a_line_states_tokens_rate_and_time_left() -> None:
    lines: list[str] = []
    progress = TokenProgress("prompt", 4000, lines.append, seconds=0.0)
    time.sleep(0.1)
    progress.add(1000)
    match = re.fullmatch(
        r"prompt: 1,000 of 4,000 tokens \| ([\d,]+) tok/s \| ETA 0:00:00", lines[0]
    )
    assert match and 1000 < int(match[1].replace(",", "")) <= 10_000


def test_lines_come_no_faster_than_asked() -> None:
    lines: list[str] = []
    progress = TokenProgress("prompt", 10, lines.append, seconds=0.2)
    for _ in range(10):
        progress.add(1)
    assert not lines
    time.sleep(0.2)
    progress.add(1)
    progress.add(1)
    assert len(lines) == 1 and lines[0].startswith("prompt: 11 tokens, where about 10 were")


def test_more_tokens_than_expected_have_no_time_that_is_left() -> None:
    lines: list[str] = []
    progress = TokenProgress("evaluate", 1000, lines.append, seconds=0.0)
    for _ in range(3):
        time.sleep(0.01)
        progress.add(500)
    assert lines[1].startswith("evaluate: 1,000 of 1,000 tokens | ")
    assert lines[1].endswith(" tok/s | ETA 0:00:00")
    assert lines[2].startswith("evaluate: 1,500 tokens, where about 1,000 were expected | ")
    assert lines[2].endswith(" tok/s | ETA unknown")
