"""Campaigns of faults: what a promise is, and how its cases are run, recorded and resumed.

A case is known by its seed alone. It runs in a forked process, which may crash, hang or eat memory
without harm to the campaign; its result is a line of JSON in the output folder, so that a campaign
that is stopped goes on where it was. A case that fails leaves its directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_GRACE = 30.0  # seconds for a case that is interrupted, e.g. to take a cluster down
_ENDED_BADLY = 1


class BrokenError(Exception):
    """The promise does not hold in this case; the message says what was seen."""


class UnavailableError(Exception):
    """This machine lacks what the case needs; the message says what. It counts as not run."""


@dataclass(frozen=True)
class Room:
    """Where a case works: `here` is its own new directory, `shared` is all cases' of a promise."""

    here: Path
    shared: Path

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """A directory that the first case that needs it makes, and none may change."""
        done, path = self.shared / f"{name}.made", self.shared / name
        with (self.shared / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(path, ignore_errors=True)
                make(path)
                done.touch()
        return path


@dataclass(frozen=True)
class Promise:
    """A sentence that users rely on, and what tries to break it.

    `case(seed, room)` tries once (`each` inputs, faults, ...) and returns what it did, plain JSON;
    it raises BrokenError, or anything else, where the promise does not hold. `ledgers` in what it
    returns counts runs whose ledgers it has proven. Without a case the line is counted from others.
    `limit` are seconds that a case may take.
    """

    number: int
    name: str
    sentence: str
    cases: int
    unit: str
    case: Callable[[int, Room], dict[str, Any]] | None
    each: int = 1
    limit: float = 120.0
    how: str = ""


@dataclass(frozen=True)
class Result:
    """What is recorded of a case; `failure` is empty where the promise held."""

    seed: int
    seconds: float
    failure: str
    did: dict[str, Any]
    commit: str

    @property
    def unavailable(self) -> bool:
        """Whether the case could not be run on this machine."""
        return "unavailable" in self.did


def check(holds: object, what: str) -> None:
    """Raise BrokenError with `what` was seen unless it `holds`."""
    if not holds:
        raise BrokenError(what)


def results(output: Path, promise: Promise, commit: str) -> list[Result]:
    """What was recorded of the promise's cases at this commit, one result of each seed."""
    path = output / f"{promise.name}.jsonl"
    found: dict[int, Result] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError):  # cut by a kill
            result = Result(**json.loads(line))
            if result.commit == commit:
                found[result.seed] = result
    return [found[seed] for seed in sorted(found)]


def run(
    output: Path, promise: Promise, seeds: Iterable[int], commit: str, *, again: bool = False
) -> Iterator[Result]:
    """Run the cases of these seeds that have no result yet (or all, `again`), and record each.

    A case that the machine lacked something for has none: it may have it now.
    """
    output.mkdir(parents=True, exist_ok=True)
    found = [] if again else results(output, promise, commit)
    done = {one.seed for one in found if not one.unavailable}
    left = [seed for seed in seeds if seed not in done]
    path = output / f"{promise.name}.jsonl"
    with path.open("a") as file:
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            file.write("\n")  # a kill has cut the last line
        while left:
            for result in _in_a_child(output, promise, tuple(left), commit):
                file.write(json.dumps(vars(result)) + "\n")
                file.flush()
                left.remove(result.seed)
                yield result


def _in_a_child(
    output: Path, promise: Promise, seeds: Sequence[int], commit: str
) -> Iterator[Result]:
    """The results of these cases, up to the first that ends its process or takes too long."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(output, promise, seeds, commit, writer)
    with contextlib.suppress(OSError):
        os.setpgid(child, child)  # as the child does; whoever is first
    os.close(writer)
    told, began, number = b"", time.monotonic(), 0
    try:
        while number < len(seeds):
            left = promise.limit - (time.monotonic() - began)
            ready, _, _ = select.select([reader], [], [], max(left, 0.0))
            data = os.read(reader, 1 << 16) if ready else b""
            if not data:
                why = _end(child, hung=not ready, limit=promise.limit)
                child = 0
                seconds = time.monotonic() - began
                yield Result(seeds[number], round(seconds, 3), why, {}, commit)
                return
            *lines, told = (told + data).split(b"\n")
            for line in lines:
                number, began = number + 1, time.monotonic()
                yield Result(**json.loads(line))
    finally:
        os.close(reader)
        if child:
            if number < len(seeds):  # whoever asked for the results has stopped
                _interrupt(child)
            _end(child, hung=False, limit=promise.limit)


def _interrupt(child: int) -> None:
    """Have a child and what it started clean up, and kill what has not ended soon."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGINT)
        until = time.monotonic() + _GRACE
        left = os.WEXITED | os.WNOHANG | os.WNOWAIT  # still to be waited for by `_end`
        while time.monotonic() < until and not os.waitid(os.P_PID, child, left):
            time.sleep(0.05)
        os.killpg(child, signal.SIGKILL)


def _end(child: int, *, hung: bool, limit: float) -> str:
    """End a child and what it started; how it had ended."""
    if hung:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if hung:
        return f"no end within {limit:g} s"
    return f"the case's process ended with {os.waitstatus_to_exitcode(status)}"


def _child(output: Path, promise: Promise, seeds: Sequence[int], commit: str, writer: int) -> None:
    """Run cases one after the other; it never returns."""
    try:
        os.setpgid(0, 0)
        for seed in seeds:
            result = _case(output, promise, seed, commit)
            os.write(writer, json.dumps(vars(result)).encode() + b"\n")
        os._exit(0)
    except KeyboardInterrupt:
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(_ENDED_BADLY)


def _case(output: Path, promise: Promise, seed: int, commit: str) -> Result:
    here, shared = output / promise.name / f"case-{seed:06d}", output / promise.name / "shared"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    shared.mkdir(exist_ok=True)
    assert promise.case is not None
    failure, did = "", {}
    began = time.monotonic()
    try:
        did = promise.case(seed, Room(here, shared))
    except UnavailableError as error:
        did = {"unavailable": str(error)}
    except BrokenError as error:
        failure = str(error)
    except Exception:
        failure = traceback.format_exc(limit=-6)
    seconds = time.monotonic() - began
    if not failure:
        shutil.rmtree(here, ignore_errors=True)
    return Result(seed, round(seconds, 3), failure, did, commit)
