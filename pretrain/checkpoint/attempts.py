"""Attempts at a run: each launch, numbered in the run directory. The newest alone may write.

    attempts/000007.json    claimed by rank 0 as it starts; created exclusively, never changed
    attempts/000007.mistake that attempt ended with a mistake of the user's: it does not count
    exit.json               how the newest attempt ended; torchrun would flatten its exit code

A rank that was left over on a node that was cut off finds a newer number than its own before it
commits or prunes a checkpoint, and stops. Free of torch, so that a number is claimed at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_prep.dataset import durable
from data_prep.dataset.parsing import json_value
from data_prep.dataset.settings import EXIT_MISTAKE
from data_prep.dataset.wording import counted
from pretrain.checkpoint.manifest import CHECKPOINTS, CheckpointError, undoubted_steps

EXIT_FILE = "exit.json"
LOG_FILE = "log.txt"
STACKS = "stacks"

ATTEMPTS = "attempts"
_EXIT_KILLED = 128 + signal.SIGKILL  # as a shell gives it
_NAME = re.compile(r"(\d{6,})\.json")


class RunDirectoryError(ValueError):
    """A run directory that cannot be written; the message says why."""


class NoProgressError(ValueError):
    """So many attempts have failed at the same step that another one would too."""


class SupersededError(CheckpointError):
    """A newer attempt of the run has begun, so this one may no longer write."""


@dataclass(frozen=True)
class Attempt:
    """One launch of the run in `directory`, by its number.

    `futile` says why it should end although it was claimed; empty: it should not.
    """

    directory: Path
    number: int
    futile: str = ""

    @property
    def stacks(self) -> Path:
        """Where the stacks of its ranks go when one of them hangs; absent while none does."""
        return self.directory / STACKS / f"attempt-{self.number:06d}"

    @property
    def hang(self) -> Path:
        """The file that says which rank was the first to hang."""
        return self.stacks / "why.txt"

    def superseded(self) -> str | None:
        """Why this attempt may not write any more; None while it is the newest."""
        newest = max(_numbers(self.directory), default=0)
        if newest <= self.number:
            return None
        other = _record(self.directory, newest) or {}
        job = f", Slurm job {other['job']}" if other.get("job") else ""
        return (
            f"attempt {self.number} of {self.directory} was superseded: attempt {newest} began at "
            f"{other.get('time')} on {other.get('host')}{job}, and one at a time may write there. "
            "Nothing was written; let the newer one run, or give another run.directory"
        )

    def require_newest(self) -> None:
        """Raise SupersededError unless this attempt may write."""
        if reason := self.superseded():
            raise SupersededError(reason)

    def end(self, code: int, why: str) -> None:
        """Record durably how the attempt ended, unless it was superseded.

        Of a failure after a rank hung, the hang is the reason: peers of a killed rank fail, too.
        """
        if code and self.hang.exists():
            code, why = _EXIT_KILLED, self.hang.read_text(encoding="utf-8")
        if self.superseded() is None:
            step = committed_step(self.directory)
            ending = {"attempt": self.number, "code": code, "step": step, "why": why}
            durable.write_json(self.directory / EXIT_FILE, ending)
            if code == EXIT_MISTAKE:
                _mistake(self.directory, self.number).touch()


def claim(directory: Path, ranks: int, steps: int, most_without_progress: int | None) -> Attempt:
    """Take the next number, for an attempt of `ranks` ranks at a run of `steps` steps.

    The attempt is futile if `most_without_progress` in a row started from the step that is still
    the last committed one; None: never. Those that ended with a mistake of the user's do not
    count. The attempt after a futile one is not: the count begins again.
    Raises RunDirectoryError.
    """
    try:
        (directory / ATTEMPTS).mkdir(parents=True, exist_ok=True)
        step = committed_step(directory)
        stuck = _without_progress(directory, step)
        most = math.inf if most_without_progress is None else most_without_progress
        enough = step < steps and len(stuck) >= most
        record = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart": os.environ.get("SLURM_RESTART_COUNT"),
            "ranks": ranks,
            "step": step,
            # Whether the number counts among those without progress, if the next starts here too.
            "counts": step < steps and not enough,
        }
        number = _create(directory, record)
        with contextlib.suppress(OSError):  # a full disk ends the attempt where it matters
            began = f"attempt {number} began at {record['time']} on {record['host']}"
            note(directory, f"{began}, {counted(ranks, 'rank')}, from step {step}")
    except OSError as error:
        raise RunDirectoryError(
            f"run.directory: {error.filename or directory}: {error.strerror}; it must be writable "
            "and have space"
        ) from error
    futile = ""
    if enough:
        futile = (
            f"no progress: attempts {stuck[-1]} to {stuck[0]} started from step {step}, and none "
            f"committed a later checkpoint, so it is not tried again. {LOG_FILE}, the job's log "
            f"and {STACKS}/ in {directory} say why they ended; the same command tries "
            f"{counted(int(most), 'more time')}"
        )
    return Attempt(directory, number, futile)


@contextmanager
def failures_recorded(attempt: Attempt, exit_code: Callable[[Exception], int]) -> Iterator[None]:
    """A block whose exception ends the attempt, and is the last line of the run's log.

    Where the disk does not take that, the exception is still the one that ends the block.
    """
    try:
        yield
    except Exception as error:
        why = str(error) or repr(error)
        with contextlib.suppress(OSError):
            note(attempt.directory, why)
        with contextlib.suppress(OSError):
            attempt.end(exit_code(error), why)
        raise


def begun(directory: Path) -> bool:
    """Whether an attempt was claimed in the directory."""
    return bool(_numbers(directory))


def committed_step(directory: Path) -> int:
    """The step of the run's newest checkpoint that no attempt passed over; 0 without any.

    One that was passed over as damaged is not where attempts start, and while its step is not
    reached again, every checkpoint behind it is progress.
    """
    return max(undoubted_steps(directory / CHECKPOINTS), default=0)


def note(directory: Path, text: str) -> None:
    """Add a line to the run's log, for processes that have not set up logging."""
    with (directory / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write(f"{datetime.now():%H:%M:%S} {text}\n")


def _without_progress(directory: Path, step: int) -> list[int]:
    """The last attempts in a row that started from `step` and count, newest first."""
    found = []
    for number in sorted(_numbers(directory), reverse=True):
        record = _record(directory, number)
        if record is None or _mistake(directory, number).exists():
            continue
        if record["step"] != step or not record["counts"]:
            break
        found.append(number)
    return found


def _create(directory: Path, record: Mapping[str, Any]) -> int:
    """Write the record under the lowest number above all others; the number."""
    number = max(_numbers(directory), default=0)
    while True:
        number += 1
        try:
            with (directory / ATTEMPTS / f"{number:06d}.json").open("x", encoding="utf-8") as file:
                json.dump({"attempt": number, **record}, file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            continue
        durable.sync_directory(directory / ATTEMPTS)
        return number


def _numbers(directory: Path) -> list[int]:
    root = directory / ATTEMPTS
    names = [entry.name for entry in root.iterdir()] if root.is_dir() else []
    return [int(match[1]) for name in names if (match := _NAME.fullmatch(name))]


def _record(directory: Path, number: int) -> dict[str, Any] | None:
    """What the claimer wrote; None where it was killed before that reached the disk."""
    try:
        record = json_value((directory / ATTEMPTS / f"{number:06d}.json").read_bytes())
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"step", "counts"} <= record.keys() else None


def _mistake(directory: Path, number: int) -> Path:
    return directory / ATTEMPTS / f"{number:06d}.mistake"
