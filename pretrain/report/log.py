"""What a run's log.txt says beside its routine lines, by attempt and step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from data_prep.dataset.credentials import redacted
from pretrain.checkpoint.attempts import LOG_FILE

KINDS = {
    "fault": "Fault",
    "fallback": "Checkpoint passed over",
    "resume": "Resumed",
    "stop": "Stopped by a signal",
    "straggler": "Straggler",
    "note": "Other",
}
"""What an event can be, and what it is called; the gravest first."""

_LINE = re.compile(r"(\d\d):(\d\d):(\d\d) (.*)")
_STEP = re.compile(r"step (\d+)(?:/| \|)")
_FAILED = re.compile(r"step \d+ \| [^:]+: failed: ")  # an evaluation within the training
_ATTEMPT = re.compile(r"attempt (\d+) began at (\S+) on .* from step (\d+)$")
_RESUMED = re.compile(r"resumed from .*, step (\d+)$")
_FINISHED = "finished"
_ROUTINE = re.compile(
    r"[\d,]+ parameters, |local attention: |memory: |checkpoint .+ in [\d.]+ s, |weights of |"
    r"profiled steps |a copy of "
)
_SIGNS = {
    # First: the settings that are named after it may be those of faults.
    "note": re.compile(r"changed since the checkpoint: "),
    "fallback": re.compile(r"passed over checkpoint"),
    "resume": re.compile(r"resumed from "),
    "stop": re.compile(r"stopped after step "),
    "straggler": re.compile(r"straggler: "),
    "fault": re.compile(
        r"fail|error|not finite|skipped|spike|hung|hang|kill|died|superseded|no progress|damaged|"
        r"cannot|could not|traceback|exception|out of memory",
        re.I,
    ),
}
_LONGEST = 600


_DAY = timedelta(days=1)


class Event(NamedTuple):
    """A line of the log that is not routine.

    `time` is None, and `attempt` 0, before the first line that says when an attempt began; `clock`
    is HH:MM:SS as logged. `step` is the last one that was reported or resumed from.
    """

    kind: str
    time: datetime | None
    clock: str
    attempt: int
    step: int
    text: str


@dataclass
class Log:
    """Events in order; (time, step) of all progress, repeated steps included; steps by attempt.

    `finished` are the attempts that came to the run's last step, or began there.
    """

    events: list[Event] = field(default_factory=list)
    progress: list[tuple[datetime, int]] = field(default_factory=list)
    reached: dict[int, int] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)


class _Line(NamedTuple):
    seconds: int  # of the day, on the clock of the machine that wrote it
    text: str

    @property
    def clock(self) -> str:
        return str(timedelta(seconds=self.seconds)).zfill(8)


class _Reader:
    """Follows a log's attempt, step and time from line to line."""

    def __init__(self) -> None:
        self.log = Log()
        self._attempt = self._step = self._before = 0
        self._time: datetime | None = None

    def add(self, line: _Line) -> None:
        """Take in the next line."""
        self._advance(line.seconds)
        if begun := _ATTEMPT.match(line.text):
            self._attempt, self._time = int(begun[1]), _moment(begun[2])
            self._start(int(begun[3]))
        elif (reported := _STEP.match(line.text)) and not _FAILED.match(line.text):
            self._reach(int(reported[1]))
        elif line.text.startswith(_FINISHED):
            self.log.finished.add(self._attempt)
        elif not _ROUTINE.match(line.text):
            if resumed := _RESUMED.match(line.text):
                self._start(int(resumed[1]))
            about = (self._time, line.clock, self._attempt, self._step)
            self.log.events.append(Event(_kind(line.text), *about, _shown(line.text)))

    def _advance(self, seconds: int) -> None:
        """An attempt says when it began; from there on the clock goes forward, over midnight too.

        Two processes write, so that a line may be a moment older than the one before.
        """
        if self._time is not None:
            passed = timedelta(seconds=seconds - self._before)
            self._time += passed if passed > -_DAY / 2 else passed + _DAY
        self._before = seconds

    def _start(self, step: int) -> None:
        """An attempt starts from the newest checkpoint, and from an older one if it is damaged."""
        self.log.reached.pop(self._attempt, None)
        self._reach(step)

    def _reach(self, step: int) -> None:
        self._step = step
        known = self.log.reached.get(self._attempt, 0)
        self.log.reached[self._attempt] = max(step, known)
        if self._time is not None:
            self.log.progress.append((self._time, step))


def read(directory: Path) -> Log:
    """What is in the run's log; nothing where it has none."""
    reader = _Reader()
    for line in _lines(directory / LOG_FILE):
        reader.add(line)
    return reader.log


def _moment(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def _lines(path: Path) -> Iterator[_Line]:
    """The entries; lines without a clock, as a traceback's, belong to the one before."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    last: _Line | None = None
    for line in lines:
        if match := _LINE.fullmatch(line):
            if last is not None:
                yield last
            hours, minutes, seconds = (int(match[n]) for n in (1, 2, 3))
            last = _Line(3600 * hours + 60 * minutes + seconds, match[4])
        elif last is not None and len(last.text) < 20 * _LONGEST:
            last = last._replace(text=f"{last.text}\n{line}")
    if last is not None:
        yield last


def _kind(text: str) -> str:
    return next((kind for kind, sign in _SIGNS.items() if sign.search(text)), "note")


def _shown(text: str) -> str:
    """Of a long entry its begin and its end, where a traceback says what happened."""
    text = str(redacted(text))
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2]} \N{HORIZONTAL ELLIPSIS} {text[-_LONGEST // 2 :]}"
