"""What a campaign of faults observes of a run: steps, commits and states of its job."""

from __future__ import annotations

import ctypes
import json
import os
import re
import select
import struct
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from tests.cluster import Cluster

_CREATE, _MOVED_FROM, _MOVED_TO = 0x100, 0x40, 0x80
_EVENT = struct.Struct("iIII")  # inotify_event: watch, mask, cookie, length of the name
_CHECKPOINT = re.compile(r"step-(\d+)(?:\.(\d+)\.(writing|trash))?")


@dataclass(frozen=True)
class Rename:
    """A checkpoint that got its name (commit) or lost it (prune), by an attempt."""

    kind: str
    step: int
    attempt: int


@dataclass
class Watch:
    """Observes a run from outside, until the end of the `with` block.

    Times are seconds of `time.monotonic`. `steps` are (time, attempt, step), `states` (time, the
    job's state). The kernel reports every rename in the directory of checkpoints, in order.
    """

    cluster: Cluster
    job: str
    run: Path
    steps: list[tuple[float, int, int]] = field(default_factory=list)
    states: list[tuple[float, str]] = field(default_factory=list)
    renames: list[Rename] = field(default_factory=list)
    attempt: int = 0
    saves: int = 0  # that were begun

    def __enter__(self) -> Watch:
        self._end = threading.Event()
        self._moved: dict[int, str] = {}
        self._events = self._subscribe()
        self._threads = [threading.Thread(target=one) for one in (self._look, self._ask)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        os.close(self._events)

    @property
    def reached(self) -> int:
        """The greatest step that any attempt has trained."""
        return max((step for _, _, step in self.steps), default=0)

    @property
    def running(self) -> bool:
        """Whether the job had its nodes when it was last asked for."""
        return bool(self.states) and self.states[-1][1] == "RUNNING"

    def trained_by(self, attempt: int) -> int:
        """The greatest step that this attempt or an earlier one has trained."""
        return max((step for _, by, step in self.steps if by <= attempt), default=0)

    def resumed_step(self) -> int:
        """The checkpoint from which the newest attempt started; 0: from none."""
        record = (self.run / "attempts" / f"{self.attempt:06d}.json").read_text()
        return int(json.loads(record)["step"])

    def first_new_step(self, since: float, attempt: int, another: bool) -> float | None:
        """When a step was trained that had never been before, after `since`; None: not yet.

        `another`: by an attempt after `attempt`, and beyond all that attempts up to it trained.
        """
        former = self.trained_by(attempt)
        if not another:
            former = max((step for at, _, step in self.steps if at <= since), default=0)
        for at, by, step in self.steps:
            if at > since and step > former and (by > attempt or not another):
                return at
        return None

    def not_running(self, since: float, until: float) -> tuple[float, float]:
        """Of the time between: seconds until the job first lost its nodes, and without nodes."""
        inside = [(since, "RUNNING")] + [(t, s) for t, s in self.states if since < t < until]
        ends = [t for t, _ in inside[1:]] + [until]
        without = [(t, e) for (t, s), e in zip(inside, ends, strict=True) if s != "RUNNING"]
        first = without[0][0] if without else until
        return first - since, sum(end - start for start, end in without)

    def _subscribe(self) -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        events: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        for name in ("checkpoints", "attempts"):
            (self.run / name).mkdir(exist_ok=True)
            mask = _CREATE | _MOVED_FROM | _MOVED_TO
            assert libc.inotify_add_watch(events, os.fsencode(self.run / name), mask) > 0
        return events

    def _look(self) -> None:
        while not self._end.is_set():
            if select.select([self._events], [], [], 0.1)[0]:
                self._take_in(os.read(self._events, 1 << 16))
            step = self._newest_record()
            if step and (not self.steps or self.steps[-1][1:] != (self.attempt, step)):
                self.steps.append((time.monotonic(), self.attempt, step))

    def _take_in(self, data: bytes) -> None:
        while data:
            _, mask, cookie, length = _EVENT.unpack_from(data)
            name = data[_EVENT.size : _EVENT.size + length].rstrip(b"\0").decode()
            data = data[_EVENT.size + length :]
            if name.endswith(".json"):
                self.attempt = max(self.attempt, int(name[:-5]))
            elif mask & _CREATE and name.endswith(".writing"):
                self.saves += 1
            elif mask & _MOVED_FROM:
                self._moved[cookie] = name
            elif mask & _MOVED_TO:
                self._renamed(self._moved.pop(cookie), name)

    def _renamed(self, before: str, after: str) -> None:
        old, new = _CHECKPOINT.fullmatch(before), _CHECKPOINT.fullmatch(after)
        assert old and new, (before, after)
        if new[3] is None:
            self.renames.append(Rename("commit", int(new[1]), int(old[2])))
        elif old[3] is None:
            self.renames.append(Rename("prune", int(old[1]), int(new[2])))

    def _newest_record(self) -> int:
        """The step of the last whole line of metrics.jsonl."""
        try:
            with (self.run / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
                lines = file.read().split(b"\n")[:-1]
            return int(json.loads(lines[-1])["step"]) if lines else 0
        except (FileNotFoundError, ValueError):
            return 0

    def _ask(self) -> None:
        """Ask Slurm for the job's state; not while slurmctld is away."""
        while not self._end.wait(0.5):
            try:
                shown = self.cluster.on(
                    "ctl", "timeout", "3", "scontrol", "-o", "show", "job", self.job
                ).stdout
            except subprocess.TimeoutExpired:
                continue
            found = re.search(r" JobState=(\w+)", shown)
            if found and (not self.states or self.states[-1][1] != found[1]):
                self.states.append((time.monotonic(), found[1]))
