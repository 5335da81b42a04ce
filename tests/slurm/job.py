"""A training job and its run directory, as a user sees them."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]


def wait_for(
    reached: Callable[[], object],
    what: str,
    seconds: float = 300,
    shown: Callable[[], str] = str,
) -> None:
    """Wait until `reached` holds; what it was, and what `shown` gives then, if it never does."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"never: {what}\n{shown()}"
        time.sleep(0.1)


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@dataclass
class Job:
    """A job of a run, as a user sees it."""

    on_cluster: Run
    number: str
    run: Path

    def log(self) -> str:
        return text(self.run / "slurm" / f"{self.number}.log")

    def state(self) -> str:
        shown = self.on_cluster("scontrol", "-o", "show", "job", self.number).stdout
        return next(w for w in shown.split() if w.startswith("JobState=")).partition("=")[2]

    def ended(self) -> bool:
        return self.state() not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")

    def restart(self, count: int) -> None:
        """Wait for the count-th requeue, and have Slurm start the job at once."""

        def requeued() -> bool:
            return self.log().count("; requeued, ") >= count

        def pending_or_begun() -> bool:
            return f", restart {count}, on " in self.log() or self.state() == "PENDING"

        wait_for(requeued, f"requeue {count}", shown=self.log)
        wait_for(pending_or_begun, "a pending job", shown=self.log)
        # A node refuses credentials made in the second in which it revoked the former one.
        time.sleep(1.1)
        self.on_cluster("scontrol", "update", f"jobid={self.number}", "StartTime=now")


def losses(run: Path) -> dict[int, float]:
    records = map(json.loads, text(run / "metrics.jsonl").splitlines())
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}
