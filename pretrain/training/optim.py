"""Parameter groups of AdamW and the learning rate as a pure function of the step.

There is no state to save: a resumed run computes the rate of step k from k.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from typing import Any

from torch import nn

from pretrain.config import OptimConfig


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter, int]], gates: Container[str], config: OptimConfig
) -> list[dict[str, Any]]:
    """AdamW's groups: decayed matrices, undecayed vectors, undecayed gates with their own rate.

    `parameters` yields name, parameter and number of dimensions (which a flattened ZeRO-3 parameter
    does not have); `gates` holds the names of the gates. Empty groups are left out. Every group's
    `peak` is its peak rate. The gates have a separate rate, because with the model's they hardly
    leave their initial value.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    gated: list[nn.Parameter] = []
    for name, parameter, dimensions in parameters:
        group = gated if name in gates else decayed if dimensions >= 2 else plain
        group.append(parameter)
    groups = [
        {"params": decayed, "peak": config.lr, "weight_decay": config.weight_decay},
        {"params": plain, "peak": config.lr, "weight_decay": 0.0},
        {"params": gated, "peak": config.gate_lr, "weight_decay": 0.0},
    ]
    return [{**group, "lr": 0.0} for group in groups if group["params"]]


def rate_fraction(config: OptimConfig, steps: int, step: int) -> float:
    """The learning rate of `step` (1 to `steps`) as a fraction of the peak.

    Linear warm-up reaches the peak at step `warmup_steps`; then cosine down to `final_fraction` at
    the last step, or wsd: the peak until `decay_steps` before the end and linear from there.
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    final = config.final_fraction
    if config.schedule == "wsd":
        into_decay = step - (steps - config.decay_steps)
        return 1.0 if into_decay <= 0 else 1.0 - (1.0 - final) * into_decay / config.decay_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
