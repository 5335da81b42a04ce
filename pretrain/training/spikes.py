"""Spikes: finite steps whose loss or gradient norm lies far above those of the steps before.

Bounds are the mean plus `deviations` sample standard deviations of the last `steps` applied steps,
of the loss and of the gradient norm before clipping. A skipped step does not count: else a spike
would widen the bounds for the next one. Every rank has the same numbers and computes the bounds
with exactly rounded sums, so all decide alike on any mixture of machines.
"""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple, TypeAlias

from pretrain.config.training import SpikeConfig

Recent: TypeAlias = tuple[tuple[float, float], ...]
"""Loss and gradient norm of the last applied steps, the newest last."""


class Bounds(NamedTuple):
    """The largest loss and gradient norm that are no spike."""

    loss: float = math.inf
    grad_norm: float = math.inf

    def exceeded(self, loss: float, grad_norm: float) -> str:
        """What a step exceeded, for the log."""
        pairs = (("loss", loss, self.loss), ("gradient norm", grad_norm, self.grad_norm))
        found = [f"{name} {value:.4g} above {most:.4g}" for name, value, most in pairs
                 if value > most]  # fmt: skip
        return " and ".join(found)


def bounds(recent: Recent, config: SpikeConfig) -> Bounds:
    """The bounds of the next step; infinite until there are `config.steps` applied steps."""
    if not config.deviations or len(recent) < config.steps:
        return Bounds()
    losses, norms = zip(*recent[-config.steps :], strict=True)
    return Bounds(*(
        statistics.fmean(values) + config.deviations * statistics.stdev(values)
        for values in (losses, norms)
    ))  # fmt: skip


def noted(recent: Recent, loss: float, grad_norm: float, config: SpikeConfig) -> Recent:
    """`recent` after one more applied step; nothing is kept where spikes are not skipped."""
    return (*recent, (loss, grad_norm))[-config.steps :] if config.deviations else ()
