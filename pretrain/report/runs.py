"""A run's directory as a report reads it: whatever of it is there, finished, going on or broken."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from data_prep.dataset.credentials import redacted
from data_prep.dataset.parsing import json_value
from pretrain.checkpoint.attempts import ATTEMPTS, EXIT_FILE, LOG_FILE, STACKS
from pretrain.config.run import CONFIG_FILE
from pretrain.jobs.launch import EXIT_STOPPED
from pretrain.report import log
from pretrain.report.log import Log
from pretrain.training.metrics import METRICS_FILE, read_records

Records = list[dict[str, Any]]

_RESULT = re.compile(r"(.+?)-(\d+)(?:-(.+?))?\.json")


@dataclass(frozen=True)
class Attempt:
    """A launch of the run. Steps and texts are None where nothing was recorded."""

    number: int
    began: datetime | None
    host: str
    job: str
    ranks: int | None
    start: int | None
    reached: int | None
    ended: str


@dataclass(frozen=True)
class Result:
    """What an evaluation wrote: NAME-STEP.json, NAME-STEP-MORE.json."""

    file: str
    name: str
    step: int
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """All that a report shows of one run. `touched`: when it last wrote a record or a log line."""

    directory: Path
    configuration: Mapping[str, Any]
    records: Mapping[str, Records]
    attempts: list[Attempt]
    log: Log
    results: list[Result]
    touched: datetime | None
    state: str

    @property
    def train(self) -> Records:
        """Records of training steps."""
        return self.records.get("train", [])

    @property
    def steps(self) -> int | None:
        """How many steps the run is to have."""
        steps = flat(self.configuration).get("train.steps")
        return steps if isinstance(steps, int) else None


def read(directory: Path) -> Run:
    """The run in a directory; what cannot be read of it is as if it were not there."""
    found = log.read(directory)
    ending = _json(directory / EXIT_FILE)
    attempts = _attempts(directory, found, ending)
    records: dict[str, Records] = {}
    for record in sorted(read_records(directory / METRICS_FILE), key=lambda one: one["step"]):
        records.setdefault(str(record.get("kind")), []).append(record)
    times = [
        path.stat().st_mtime
        for name in (METRICS_FILE, LOG_FILE)
        if (path := directory / name).exists()
    ]
    return Run(
        directory,
        redacted(_configuration(directory / CONFIG_FILE)),
        records,
        attempts,
        found,
        _results(directory),
        datetime.fromtimestamp(max(times), UTC) if times else None,
        _state(attempts, ending),
    )


def flat(configuration: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names; a list is one value."""
    found: dict[str, Any] = {}
    for key, value in configuration.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def when(text: Any) -> datetime | None:
    """A time as records have it; None where it is none."""
    try:
        found = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json_value(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return redacted(found) if isinstance(found, dict) else {}


def _configuration(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _attempts(directory: Path, found: Log, ending: Mapping[str, Any]) -> list[Attempt]:
    numbered = {
        int(path.stem): path
        for path in (directory / ATTEMPTS).glob("*.json")
        if path.stem.isdecimal()
    }
    return [
        _attempt(directory, number, numbered[number], found, ending) for number in sorted(numbered)
    ]


def _attempt(
    directory: Path, number: int, path: Path, found: Log, ending: Mapping[str, Any]
) -> Attempt:
    record = _json(path)
    start = record.get("step") if isinstance(record.get("step"), int) else None
    ranks = record.get("ranks") if isinstance(record.get("ranks"), int) else None
    return Attempt(
        number,
        when(record.get("time")),
        str(record.get("host") or ""),
        str(record.get("job") or ""),
        ranks,
        start,
        found.reached.get(number),
        _ended(directory, number, found, ending),
    )


def _ended(directory: Path, number: int, found: Log, ending: Mapping[str, Any]) -> str:
    """How an attempt ended: by exit.json of the newest, else by its last words; empty: unknown."""
    if ending.get("attempt") == number:
        return str(ending.get("why") or f"exit code {ending.get('code')}")
    hang = directory / STACKS / f"attempt-{number:06d}" / "why.txt"
    if hang.exists():
        return str(redacted(hang.read_text(encoding="utf-8", errors="replace")))
    if number in found.finished:
        return "finished"
    own = [event for event in found.events if event.attempt == number]
    is_mistake = (directory / ATTEMPTS / f"{number:06d}.mistake").exists()
    says_why = own and (is_mistake or own[-1].kind in ("fault", "stop"))
    return own[-1].text.strip() if says_why else ""


def _state(attempts: list[Attempt], ending: Mapping[str, Any]) -> str:
    """In two words or three what has become of the run."""
    if not attempts:
        return "never started"
    if ending.get("attempt") != attempts[-1].number:
        return "no end recorded"
    names = {0: "finished", EXIT_STOPPED: "stopped"}
    return names.get(ending.get("code", 1), "failed")


def _results(directory: Path) -> list[Result]:
    """Evaluations, by step and file."""
    found = [
        Result(path.name, match[1], int(match[2]), report)
        for path in directory.glob("*.json")
        if (match := _RESULT.fullmatch(path.name)) and (report := _json(path))
    ]
    return sorted(found, key=lambda one: (one.step, one.file))
