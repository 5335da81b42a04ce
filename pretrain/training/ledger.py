"""The ledger: proof of which tokens the committed steps consumed, and a check of it.

Each lane has a *history*: empty at first, and after a step the sha256 of the previous history and
the window that the step consumed; with `data.preface` the step's preface window is added in the
same way. It is stored in the checkpoint with the lane's place, so it is the history of exactly
those weights, across all attempts. Each commit also adds a line to `ledger.jsonl`, so that pruned
checkpoints can be checked too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dataset.wording import counted
from pretrain.checkpoint.attempts import Attempt, committed_step
from pretrain.checkpoint.load import Checkpoint
from pretrain.checkpoint.manifest import CHECKPOINTS, step_name
from pretrain.config.data import Weight
from pretrain.config.root import Config, load
from pretrain.config.run import CONFIG_FILE
from pretrain.data.lanes import Dataset, Lane, LanePlace, Mix
from pretrain.training.metrics import numbered, reopened
from pretrain.training.run_state import place_record

LEDGER_FILE = "ledger.jsonl"

_OF_A_COMMIT = {"step", "attempt", "window", "weights", "histories"}


def extended(history: str, tokens: np.ndarray, starts: np.ndarray) -> str:
    """The history after a window: tokens int64 and document starts bool, both [length]."""
    digest = hashlib.sha256(bytes.fromhex(history))
    digest.update(tokens.astype("<i8", copy=False).tobytes())
    digest.update(starts.tobytes())
    return digest.hexdigest()


class Ledger:
    """Writes `ledger.jsonl` on rank 0, for an attempt with `ranks` ranks.

    A line is durable before its step is committed. On a resume, lines after the resumed step were
    not committed and are dropped: those steps are repeated.
    """

    def __init__(self, attempt: Attempt, ranks: int, config: Config, resumed_step: int) -> None:
        self._constant = {
            "attempt": attempt.number,
            "ranks": ranks,
            "window": config.window,
            "weights": [source.schedule for source in config.data.sources.values()],
        }
        self._file = reopened(attempt, LEDGER_FILE, resumed_step)

    def add(self, step: int, histories: Sequence[str]) -> None:
        """Add the line of a step about to be committed; `histories` has one entry per lane."""
        line = {"step": step, **self._constant, "histories": list(histories)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def check(directory: Path) -> list[str]:
    """Check that the run's committed steps consumed every token of the schedule exactly once.

    Returns the problems. The schedule, a function of data sets, weights, seed, lanes and window, is
    replayed from step 1, and each lane's history is compared at every commit; the newest checkpoint
    must be at the ledger's end. Raises SettingsError, DataError and CheckpointError for files that
    cannot be read.
    """
    config = load(directory / CONFIG_FILE)
    datasets = [Dataset(source.data, config.data.cache) for source in config.data.sources.values()]
    preface = config.data.preface
    prefaces = Mix([Dataset(preface, config.data.cache)]) if preface else None
    lanes = [_Replay(index, config, datasets, prefaces) for index in range(config.data.lanes)]
    problems: list[str] = []
    step = attempt = 0
    for number, (text, line) in enumerate(numbered(directory / LEDGER_FILE), 1):
        if line is None or not line.keys() >= _OF_A_COMMIT:
            problems += [f"{LEDGER_FILE}: line {number} cannot be read"] if text.strip() else []
            continue
        if line["step"] <= step or line["attempt"] < attempt:
            problems.append(
                f"step {line['step']} of attempt {line['attempt']} comes after step {step} of "
                f"attempt {attempt}"
            )
            continue
        for lane, history in zip(lanes, line["histories"], strict=True):
            lane.advance(step, line["step"], line["window"], line["weights"])
            if lane.history != history:
                problems.append(
                    f"lane {lane.index}: what steps {step + 1} to {line['step']} consumed is not "
                    "what the schedule has there"
                )
                lane.history = history
        step, attempt = line["step"], line["attempt"]
    return problems + _checkpoint_problems(directory, step, lanes)


class _Replay:
    """A lane that is replayed."""

    def __init__(
        self, index: int, config: Config, datasets: Sequence[Dataset], preface: Mix | None
    ) -> None:
        self.index = index
        self.history = ""
        self.tokens = 0
        self.place: LanePlace | None = None
        self.preface_place: LanePlace | None = None
        self._preface = preface
        self._config = config
        self._datasets = datasets

    def advance(self, step: int, end: int, window: int, weights: Sequence[Weight]) -> None:
        """Read the windows of the steps after `step`, up to `end`."""
        lanes, seed = self._config.data.lanes, self._config.run.seed
        read = [Lane(Mix(self._datasets, weights), self.index, lanes, seed, self.place, step)]
        if self._preface is not None:
            read.append(Lane(self._preface, self.index, lanes, seed, self.preface_place))
        for _ in range(step, end):
            for lane in read:
                tokens, _, starts, _ = lane.window(window)
                self.history = extended(self.history, tokens, starts)
        self.tokens += (end - step) * window
        self.place = read[0].place
        self.preface_place = None if self._preface is None else read[1].place

    def stored(self) -> dict[str, Any]:
        """The lane's place as the trainer stores it, after a round trip through JSON."""
        assert self.place is not None
        place = place_record(self.place, self.history, self.preface_place)
        plain: dict[str, Any] = json.loads(json.dumps(place))
        return plain


def _checkpoint_problems(directory: Path, step: int, lanes: Sequence[_Replay]) -> list[str]:
    """Differences between the newest checkpoint and the end of the ledger."""
    newest = committed_step(directory)
    if newest != step:
        return [f"the newest checkpoint is of step {newest}, the ledger ends with step {step}"]
    if step == 0:
        return []
    with Checkpoint(directory / CHECKPOINTS / step_name(step)) as checkpoint:
        places = [checkpoint.lane(lane.index).place for lane in lanes]
        tokens = checkpoint.trainer["tokens"]
    problems = [
        f"lane {lane.index}: the checkpoint of step {step} has {dict(place)}, the schedule comes "
        f"to {expected}"
        for lane, place in zip(lanes, places, strict=True)
        if lane.place is not None and place != (expected := lane.stored())
    ]
    read = sum(lane.tokens for lane in lanes)
    if tokens != read:
        problems.append(f"the checkpoint counts {counted(tokens, 'token')}, the schedule {read}")
    return problems
