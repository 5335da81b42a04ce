"""What happened to the runs over time: progress, attempts and events of their logs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

import numpy as np

from data_prep.dataset.wording import counted
from data_prep.pages.bars import Bar
from data_prep.pages.curves import Curve, Scale, drawn
from pretrain.report.figures import Figure, Style
from pretrain.report.log import KINDS, Event
from pretrain.report.runs import Attempt, Run

# The last ones of each run are shown.
_ATTEMPTS = 30
_EVENTS = 25  # of each kind
_COLOURS = {
    **{"fault": "c5", "fallback": "c2", "resume": "c3", "stop": "c6", "straggler": "c4"},
    "note": "muted",
}
_UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


class Life(NamedTuple):
    """What a report shows of one run's attempts and events."""

    name: str
    bars: list[Bar]
    attempts: list[tuple[object, ...]]
    events: list[tuple[object, ...]]
    counts: dict[str, int]
    of: tuple[int, int]
    """How many attempts and events there are."""


def progress(runs: Sequence[Run], shown: Sequence[Style]) -> list[Figure]:
    """Steps against time since each run's first attempt, with what its log says as marks."""
    begins = [run.log.progress[0][0] if run.log.progress else None for run in runs]
    ends = [run.log.progress[-1][0] for run in runs if run.log.progress]
    known = [begin for begin in begins if begin is not None]
    longest = max((_seconds(a, b) for a, b in zip(known, ends, strict=True)), default=0.0)
    if longest <= 0:
        return []
    unit, size = next((one for one in _UNITS if longest >= 2 * one[1]), _UNITS[-1])
    curves: list[Curve] = []
    for run, style, begin in zip(runs, shown, begins, strict=True):
        if begin is not None:
            points = [(_seconds(begin, time) / size, step) for time, step in run.log.progress]
            x, y = (np.array(values, float) for values in zip(*_ordered(points), strict=True))
            curves.append(Curve(style.name, x, y, style.colour, style.dash))
    for kind, name in KINDS.items():
        curves += _marks(kind, name, runs, shown, begins, size)
    span = Scale(0.0, longest / size)
    chart = drawn(curves, span, Scale.around(curves, from_zero=True))
    note = "Where the line falls, an attempt began from the last checkpoint and repeated steps."
    return [Figure("Steps over time", chart, note, f"{unit} since the run's first attempt")]


def life(run: Run, style: Style) -> Life:
    """The attempts and events of a run, the last ones first."""
    attempts = run.attempts[::-1][:_ATTEMPTS]
    highest = max([1, run.steps or 0, *(a.reached or a.start or 0 for a in run.attempts)])
    return Life(
        style.name,
        [_bar(attempt, highest) for attempt in attempts],
        [_attempt(attempt) for attempt in attempts],
        [_event(event) for event in reversed(_shown(run.log.events))],
        {
            KINDS[kind]: count
            for kind, count in Counter(event.kind for event in run.log.events).items()
        },
        (len(run.attempts), len(run.log.events)),
    )


def _marks(
    kind: str,
    name: str,
    runs: Sequence[Run],
    shown: Sequence[Style],
    begins: Sequence[datetime | None],
    size: float,
) -> list[Curve]:
    """Every event of a kind that is shown, at its time and step; notes are in the table alone."""
    points, titles = [], []
    for run, style, begin in zip(runs, shown, begins, strict=True):
        for event in _shown(run.log.events):
            if event.kind == kind != "note" and begin is not None and event.time is not None:
                points.append((max(_seconds(begin, event.time), 0.0) / size, event.step))
                titles.append(f"{style.name}, {event.clock}: {event.text}"[:200])
    if not points:
        return []
    x, y = (np.array(values, float) for values in zip(*points, strict=True))
    return [Curve(name, x, y, f"var(--{_COLOURS[kind]})", marks=True, titles=titles)]


def _shown(events: Sequence[Event]) -> list[Event]:
    """The last events of each kind, in order."""
    left, kept = Counter[str](), []
    for event in reversed(events):
        left[event.kind] += 1
        if left[event.kind] <= _EVENTS:
            kept.append(event)
    return kept[::-1]


def _ordered(points: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """By time; of one moment in the order of the log."""
    return sorted(((max(at, 0.0), step) for at, step in points), key=lambda point: point[0])


def _bar(attempt: Attempt, highest: int) -> Bar:
    start, reached = attempt.start or 0, attempt.reached
    value = "steps not recorded" if reached is None else f"step {start:,} to {reached:,}"
    parts = [start / highest, max((reached or start) - start, 0) / highest]
    return Bar(f"attempt {attempt.number}", value, parts)


def _attempt(attempt: Attempt) -> tuple[object, ...]:
    began = "\N{EN DASH}" if attempt.began is None else f"{attempt.began:%Y-%m-%d %H:%M:%S}"
    where = attempt.host + (f", job {attempt.job}" if attempt.job else "")
    ranks = "\N{EN DASH}" if attempt.ranks is None else counted(attempt.ranks, "rank")
    ended = attempt.ended or "no last word: killed, or still going on"
    return attempt.number, began, f"{where}, {ranks}", ended, *_steps(attempt)


def _steps(attempt: Attempt) -> tuple[object, object]:
    dash = "\N{EN DASH}"
    return (
        dash if attempt.start is None else attempt.start,
        dash if attempt.reached is None else attempt.reached,
    )


def _event(event: Event) -> tuple[object, ...]:
    at = event.clock if event.time is None else f"{event.time:%Y-%m-%d %H:%M:%S}"
    return at, KINDS[event.kind], event.text, event.attempt or "\N{EN DASH}", event.step


def _seconds(begin: datetime, end: datetime) -> float:
    return (end - begin).total_seconds()
