"""Validation: the loss of the current weights on held-out documents."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pretrain.checkpoint.ranks import agreed, of_first
from pretrain.model import state
from pretrain.training.metrics import METRICS_FILE, records_of
from pretrain.training.run import Run
from pretrain.training.run_state import TrainingError

KIND = "validation"
"""Of the records in `metrics.jsonl`."""


class Validation(NamedTuple):
    """The result of a validation, over all ranks."""

    loss: float
    """Nats per unit of target weight; 0 if no target has any weight."""
    weight: float
    """The sum of the targets' weights; without `data.prompt_weight`, the number of targets."""
    seconds: float


@dataclass(frozen=True)
class Validator:
    """Validates the weights of a run, over the first windows of validation's lanes; all ranks take
    part. The lanes are opened at their start, and the memory is carried from window to window.
    """

    run: Run

    def due(self, step: int) -> bool:
        """Whether the weights after `step` steps are validated."""
        train = self.run.config.train
        if self.run.data.validation is None or not step:
            return False
        return step == train.steps or (
            train.validate_every > 0 and step % train.validate_every == 0
        )

    def missed(self, step: int) -> bool:
        """Whether one is due of which the run has no record: it ended before.

        To be called on every rank. Raises CheckpointError where the records cannot be read.
        """
        if not self.due(step):
            return False
        path = self.run.attempt.directory / METRICS_FILE
        return of_first(self.run.ranks, lambda: not records_of(path, KIND, step))

    def validate(self, beat: Callable[[], None], stopping: Callable[[], bool]) -> Validation | None:
        """Validate; None once `stopping` is true on any rank. `beat` is called at each window.

        Raises TrainingError.
        """
        run, began = self.run, time.perf_counter()
        memory, total, weight = run.stepper.empty_memory(), 0.0, 0.0
        with run.data.validation_loader(run.share.lanes) as loader:
            for _ in range(run.config.train.validation_windows):
                batch = agreed(run.ranks, lambda: next(loader), TrainingError)
                beat()
                if run.ranks.sum([float(stopping())]) != [0.0]:
                    return None
                outputs = run.stepper.forward_only(batch, memory)
                memory = state.joined([output.state for output in outputs])
                losses = [output.losses for output in outputs if output.losses is not None]
                total += sum(float(each.double().sum()) for each in losses)
                weight += run.stepper.own_weight(batch)
        total, weight = run.ranks.sum([total, weight])
        return Validation(total / (weight or 1.0), weight, time.perf_counter() - began)
