"""Reporting during training, on rank 0: log lines, `metrics.jsonl` and what trackers get."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from data_prep.dataset import durable
from data_prep.dataset.parsing import json_value
from pretrain.checkpoint.attempts import LOG_FILE, Attempt
from pretrain.config.root import Config
from pretrain.training.trackers import Tracker, started

if TYPE_CHECKING:
    import torch

METRICS_FILE = "metrics.jsonl"

_log = logging.getLogger(__name__)


class _Stream(logging.StreamHandler[TextIO]):
    """A log to a terminal or a pipe, which may be gone while the run continues."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Say nothing where the stream is closed or its disk is full: log.txt has every line."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def configure_logging(rank: int, directory: Path) -> None:
    """Rank 0 logs to the terminal and the run's log file; other ranks log only warnings."""
    stream = _Stream(sys.stdout if rank == 0 else sys.stderr)
    handlers: list[logging.Handler] = [stream]
    if rank == 0:
        handlers.append(logging.FileHandler(directory / LOG_FILE, encoding="utf-8"))
    prefix = "" if rank == 0 else f"rank {rank}: "
    for handler in handlers:
        handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    root = logging.getLogger("pretrain")
    root.handlers = handlers
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root.propagate = False


class Work(NamedTuple):
    """FLOPs of a token."""

    body: float
    """Forward and backward, in all but the output head."""
    head: float
    """Forward and backward in the output head."""
    reading: float
    """A forward alone, without logits."""


@dataclass
class Meter:
    """Rates since the last log line."""

    tokens: int = 0
    forward_only: int = 0  # tokens among these without a backward
    scored: int = 0  # tokens among the others of which the loss needs logits
    preface: int = 0  # tokens of prefaces, counted separately
    data_wait: float = 0.0  # seconds that steps waited for batches, of any rank
    own_wait: float = 0.0  # seconds among these that this rank waited for its own
    since: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Seconds since the last log line."""
        return time.perf_counter() - self.since

    def add(self, tokens: int, forward_only: bool, preface: int, scored: int) -> None:
        """Count a step over `tokens` tokens of documents, of `scored` of which the loss needs
        logits, and `preface` tokens of prefaces."""
        self.tokens += tokens
        self.forward_only += tokens * forward_only
        self.scored += scored * (not forward_only)
        self.preface += preface

    def read(
        self,
        work: Work,
        peak_flops: float | None,
        steps_left: int,
        steps: int,
    ) -> dict[str, Any]:
        """Tokens/s over all ranks, MFU (None on a device of unknown peak), and time left.

        `peak_flops` is the sum over all ranks' devices, in FLOP/s; `steps` is the number of steps
        in the interval. Starts a new interval.
        """
        seconds = self.seconds
        rate = self.tokens / seconds
        trained, read_alone = self.tokens - self.forward_only, self.forward_only + self.preface
        worked = trained * work.body + self.scored * work.head + read_alone * work.reading
        read = {
            "tokens_per_second": rate,
            "mfu": None if peak_flops is None else worked / seconds / peak_flops,
            "data_wait": self.data_wait / seconds,
            "eta_seconds": steps_left * seconds / steps,
            "seconds_per_step": seconds / steps,
        }
        self.restart()
        return read

    def restart(self) -> None:
        """Start a new interval."""
        self.tokens = self.forward_only = self.scored = self.preface = 0
        self.data_wait = self.own_wait = 0.0
        self.since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time does not count as training: a validation or a checkpoint."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak allocation, or on a CPU this process's peak resident set."""
    if device.type == "cuda":
        import torch  # records are read without it

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def log_line(record: Mapping[str, Any], steps: int, memory: Mapping[str, list[float]]) -> str:
    """A training record as a line of the log, with the layers' mean of each metric in `memory`."""
    measured = "no target has a weight"
    if "loss" in record:
        measured = f"loss {record['loss']:.4f} | grad {record['grad_norm']:.3f}"
    mfu = "n/a" if record["mfu"] is None else f"{record['mfu']:.1%}"
    skipped = f" | skipped {record['skipped']}" if record["skipped"] else ""
    if record["spikes"]:
        skipped += f", of them spikes {record['spikes']}"
    epochs = ", ".join(f"{name} {count:.2f}" for name, count in record["epochs"].items())
    read = f" | epochs {epochs}" if len(record["epochs"]) > 1 else ""
    held = "".join(
        f" | {name.replace('_', ' ')} {sum(layers) / len(layers):.4g}"
        for name, layers in memory.items()
    )
    if "auxiliary_loss" in record:
        held += f" | auxiliary loss {record['auxiliary_loss']:.4g}"
    if "z_loss" in record:
        held += f" | z-loss {record['z_loss']:.4g}"
    return (
        f"step {record['step']}/{steps} | {measured} | lr {record['lr']:.2e} | "
        f"{record['tokens_per_second']:,.0f} tok/s | MFU {mfu} | "
        f"mem {record['memory_bytes'] / 2**30:.2f} GiB | data {record['data_wait']:.1%}{held} | "
        f"ETA {timedelta(seconds=round(record['eta_seconds']))}{read}{skipped}"
    )


class Recorder:
    """Rank 0's records: appended to `metrics.jsonl` and sent to the trackers.

    On a resume, records after the checkpoint's step are dropped: those steps are repeated, so every
    step is in the file once.
    """

    def __init__(self, attempt: Attempt, config: Config, resumed_step: int) -> None:
        self._trackers = started(attempt.directory, config, resumed_step)
        self._file = reopened(attempt, METRICS_FILE, resumed_step)

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        """Add a record of `kind`; `values` has a `step`."""
        self._file.write(_json_line({"kind": kind, **values}))
        self._file.flush()
        numbers = {f"{kind}/{key}": value for key, value in _flat(values) if key != "step"}
        self._tracked(lambda tracker: tracker.log(values["step"], numbers))

    def sync(self) -> None:
        """Make the records durable: steps before a checkpoint are not repeated."""
        os.fsync(self._file.fileno())
        self._tracked(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Close the file, and end the trackers."""
        self._file.close()
        self._tracked(lambda tracker: tracker.close())

    def _tracked(self, action: Callable[[Tracker], None]) -> None:
        """Call `action` with each tracker; the run continues without one that fails.

        Slurm signals every process of a job, so wandb's process exits at SIGTERM, before the last
        step and its checkpoint are done. Calls to it then fail in many ways.
        """
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:
                # Both threads, that of training and that of a save, may come to this at once.
                if self._trackers.pop(name, None) is not None:
                    _log.warning("%s failed (%s): metrics.jsonl has every record", name, error)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file; what is no record, as a blank line, is passed over."""
    return [record for _, record in numbered(path) if record is not None]


def records_of(path: Path, kind: str, step: int) -> list[dict[str, Any]]:
    """The records of a kind and a step among those of `read_records`."""
    found = read_records(path)
    return [record for record in found if (record.get("kind"), record["step"]) == (kind, step)]


def numbered(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a JSON lines file without their ends, each with its record of a step.

    The record is None where a line cannot be read. A last line that a kill or a power loss left
    incomplete is left out.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    found = [(line, _record(line)) for line in lines]
    return found if not found or found[-1][1] is not None else found[:-1]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json_value(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) else None


def reopened(attempt: Attempt, name: str, resumed_step: int) -> TextIO:
    """The run's JSON lines file opened for appending, without lines of steps after `resumed_step`.

    Lines that cannot be read are kept as they are, and logged unless they are blank. The file is
    replaced, so that an older attempt which has it open writes to none. Raises SupersededError.
    """
    path, kept = attempt.directory / name, []
    for number, (line, record) in enumerate(numbered(path), 1):
        if record is None and line.strip():
            _log.warning("%s: line %d cannot be read; it is kept as it is", path, number)
        if record is None or record["step"] <= resumed_step:
            kept.append(line + b"\n")
    # At the last moment: replacing it under a newer attempt would lose what that one writes.
    attempt.require_newest()
    durable.write_bytes(path, b"".join(kept))
    return path.open("a", encoding="utf-8")


def _json_line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """`value` with None for numbers JSON cannot represent: the norm of a skipped step is null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(values: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Numbers by name; entries of a list (per layer, or per layer and head) get their index.

    Entries of a mapping are prefixed with its key. Texts are left out.
    """
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, list):
            value = {f"{index:02d}": item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            found += [(f"{key}/{name}", number) for name, number in _flat(value)]
        elif isinstance(value, int | float):
            found.append((key, float(value)))
    return found
