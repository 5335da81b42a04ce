"""Validation: the loss of the current weights on held-out documents."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pretrain.checkpoint.ranks import Ranks, agreed
from pretrain.data.loader import Loader
from pretrain.model import state
from pretrain.training.run_state import TrainingError
from pretrain.training.step import Stepper


class Validation(NamedTuple):
    """The result of a validation, over all ranks."""

    loss: float
    """Nats per unit of target weight; 0 if no target has any weight."""
    weight: float
    """The sum of the targets' weights; without `data.prompt_weight`, the number of targets."""
    seconds: float


@dataclass(frozen=True)
class Validator:
    """Measures the loss over the first `windows` windows of validation's lanes.

    `open_loader` opens the lanes at their start; the memory is carried from window to window.
    """

    stepper: Stepper
    open_loader: Callable[[], Loader]
    windows: int
    ranks: Ranks

    def run(self, beat: Callable[[], None]) -> Validation:
        """Validate; `beat` is called at each window. Raises TrainingError."""
        began = time.perf_counter()
        memory, total, weight = self.stepper.empty_memory(), 0.0, 0.0
        with self.open_loader() as loader:
            for _ in range(self.windows):
                batch = agreed(self.ranks, lambda: next(loader), TrainingError)
                beat()
                outputs = self.stepper.forward_only(batch, memory)
                memory = state.joined([output.state for output in outputs])
                losses = [output.losses for output in outputs if output.losses is not None]
                total += sum(float(each.double().sum()) for each in losses)
                weight += self.stepper.own_weight(batch)
        total, weight = self.ranks.sum([total, weight])
        return Validation(total / (weight or 1.0), weight, time.perf_counter() - began)
