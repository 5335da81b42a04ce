"""An attempt at a run in this process, with a watchdog's stand-in that stops it at a beat."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import cast

from pretrain.jobs.launch import StopFlag
from pretrain.jobs.watchdog import Watchdog
from pretrain.training.evaluator import Evaluator
from pretrain.training.run import Run
from pretrain.training.trainer import Due, Trainer
from pretrain.training.validator import Validator


class Stopping:
    """Hears the beats of a rank, and stops it at one of a step's."""

    def __init__(self, step: int = 0, beat: int = 0) -> None:
        self.stop = SimpleNamespace(signal=None)
        self.heard: list[tuple[str, int]] = []
        self._at = ("step", step), beat

    def beat(self, phase: str, step: int = 0, attempt: int = 0) -> None:
        self.heard.append((phase, step))
        kind, count = self._at
        if count and self.heard.count(kind) == count:
            self.stop.signal = signal.SIGTERM

    def saving(self, step: int) -> None:
        pass


def attempted(run: Run, rank: Stopping) -> int:
    """What an attempt at the opened run ends with."""
    evaluator = Evaluator(run.config, run.engine, run.ranks, run.attempt.directory)
    step = run.state.step
    missed = Due(Validator(run).missed(step), evaluator.missed(step))
    trainer = Trainer(run, cast(Watchdog, rank), evaluator)
    return trainer.train(cast(StopFlag, rank.stop), missed)
