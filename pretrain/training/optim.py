"""Optimizers, their parameter groups and states, and the learning rate as a function of the step.

There is no state of the schedule to save: a resumed run computes the rate of step k from k.

An optimizer is one of torch's interface whose groups say what it keeps of a parameter: `moments`
have a number for every element and are partitioned as the masters are, under the names here;
factors, of groups that are `factored`, are whole on every rank. All are float32.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from pretrain.config.optim import OptimConfig
from pretrain.trained import WEIGHTS
from pretrain.training.adafactor import Adafactor
from pretrain.training.muon import Muon
from pretrain.training.uncompiled import AdamW

Group: TypeAlias = dict[str, Any]
"""A parameter group: torch's keys, `peak`, `moments`, and its optimizer's own."""

EMA = WEIGHTS["ema"]
"""The average of the weights among the moments: partitioned and stored as they are, though no
optimizer reads or writes it."""

_ADAMW: Group = {"moments": ("exp_avg", "exp_avg_sq")}


class Kept(NamedTuple):
    """The states of a parameter, by name."""

    moments: tuple[str, ...]
    """Of the parameter's shape."""
    factors: dict[str, tuple[int, ...]]
    """The shapes of the others."""


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter, int]], gates: Container[str], config: OptimConfig
) -> list[Group]:
    """The groups: decayed matrices, undecayed vectors, undecayed gates with their own rate.

    Muon's matrices are two groups, of which it orthogonalises that of the blocks'. `parameters`
    yields name, parameter and number of dimensions (which a flattened ZeRO-3 parameter does not
    have); `gates` holds the names of the gates. Empty groups are left out. Every group's `peak` is
    its peak rate. The gates have a separate rate, because with the model's they hardly leave their
    initial value.
    """
    hidden: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    gated: list[nn.Parameter] = []
    for name, parameter, dimensions in parameters:
        if name in gates:
            gated.append(parameter)
        elif dimensions < 2:
            plain.append(parameter)
        elif config.name == "muon" and name.startswith("layers."):
            hidden.append(parameter)
        else:
            matrices.append(parameter)
    decayed = {"peak": config.peak, "weight_decay": config.weight_decay}
    of_matrices, of_vectors, of_gates = _kept_of(config)
    groups = [
        {"params": hidden, **decayed, "moments": ("momentum",), "orthogonal": True},
        {"params": matrices, **decayed, **of_matrices},
        {"params": plain, **decayed, "weight_decay": 0.0, **of_vectors},
        {"params": gated, "peak": config.gate_lr, "weight_decay": 0.0, **of_gates},
    ]
    average = (EMA,) if config.ema_decay else ()
    return [
        {**group, "lr": 0.0, "moments": (*group["moments"], *average)}
        for group in groups
        if group["params"]
    ]


def _kept_of(config: OptimConfig) -> tuple[Group, Group, Group]:
    """What the groups of matrices, vectors and gates have of their optimizer's own."""
    if config.name == "adafactor":
        matrix = {"moments": (), "factored": True, "scaled": True}
        vector = {"moments": ("exp_avg_sq",), "factored": False, "scaled": True}
        return matrix, vector, {**vector, "scaled": False}
    own = {**_ADAMW, "orthogonal": False} if config.name == "muon" else _ADAMW
    return own, own, own


def kept(group: Group, shape: tuple[int, ...]) -> Kept:
    """What the optimizer keeps of a parameter of this shape in this group."""
    factors = {"row": shape[:1], "column": shape[1:]} if group.get("factored") else {}
    return Kept(group["moments"], factors)


def make(
    groups: list[Group], config: OptimConfig, dtype: torch.dtype, fused: bool
) -> torch.optim.Optimizer:
    """The optimizer of the configuration; `dtype` is that of activations.

    `fused` takes torch's fused AdamW.
    """
    if config.name == "adafactor":
        return Adafactor(groups, config.adafactor)
    if config.name == "muon":
        return Muon(groups, config, dtype, fused)
    betas = (config.beta1, config.beta2)
    return AdamW(groups, betas=betas, eps=config.eps, fused=fused)


def ema_decay(config: OptimConfig, steps: int) -> float:
    """The decay with which the average takes in the weights after so many steps of the optimizer.

    min(decay, (1 + steps) / (10 + steps)), so that the first weights of a run soon count for
    little.
    """
    return min(config.ema_decay, (1 + steps) / (10 + steps))


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
