"""Optimizers on whole matrices in one process, read aloud from their publications."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pretrain.config.optim import OptimConfig

Parameters = Mapping[str, nn.Parameter]
Step = Callable[[float], None]
"""A step at a fraction of the peak rates, from the parameters' gradients."""


def stepper(named: Parameters, config: OptimConfig, lr: float) -> Step:
    """The configured optimizer; matrices decay by 0.1, vectors and gates do not."""
    return {"adamw": adamw, "adafactor": adafactor, "muon": muon}[config.name](named, config, lr)


def adamw(named: Parameters, config: OptimConfig, lr: float) -> Step:
    """torch's own."""
    gates = [p for name, p in named.items() if name.endswith(".gate")]
    vectors = [p for n, p in named.items() if p.ndim == 1 and not n.endswith(".gate")]
    matrices = [p for p in named.values() if p.ndim == 2]
    assert len(gates) + len(vectors) + len(matrices) == len(named)
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "peak": lr, "weight_decay": 0.1},
            {"params": vectors, "peak": lr, "weight_decay": 0.0},
            {"params": gates, "peak": config.gate_lr, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )

    def step(fraction: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * fraction
        optimizer.step()

    return step


def adafactor(named: Parameters, config: OptimConfig, lr: float) -> Step:
    """Shazeer and Stern (2018), algorithms 4 and 5, with a given rate; gates are not scaled."""
    rows: dict[str, Tensor | float] = dict.fromkeys(named, 0.0)
    columns: dict[str, Tensor | float] = dict.fromkeys(named, 0.0)
    done = 0

    @torch.no_grad()
    def step(fraction: float) -> None:
        nonlocal done
        done += 1
        beta = 1 - done**-0.8
        for name, x in named.items():
            assert x.grad is not None
            g, gate = x.grad, name.endswith(".gate")
            squares = g * g + 1e-30
            if x.ndim == 2:
                n, m = x.shape
                rows[name] = beta * rows[name] + (1 - beta) * squares @ torch.ones(m)
                columns[name] = beta * columns[name] + (1 - beta) * torch.ones(n) @ squares
                moment = torch.outer(rows[name], columns[name]) / rows[name].sum()  # type: ignore
            else:
                moment = rows[name] = beta * rows[name] + (1 - beta) * squares
            u = g / moment.sqrt()
            u = u / max(1.0, float(u.square().mean().sqrt()) / 1.0)
            rate = (config.gate_lr if gate else lr) * fraction
            size = 1.0 if gate else max(1e-3, float(x.square().mean().sqrt()))
            x.copy_(x * (1 - rate * 0.1 * (x.ndim == 2)) - rate * size * u)

    return step


def muon(named: Parameters, config: OptimConfig, lr: float) -> Step:
    """Liu et al. (2025): the blocks' matrices by Newton-Schulz, the others by AdamW."""
    hidden = {n: p for n, p in named.items() if n.startswith("layers.") and p.ndim == 2}
    others = adamw({n: p for n, p in named.items() if n not in hidden}, config, lr)
    momenta = {name: torch.zeros_like(p) for name, p in hidden.items()}

    @torch.no_grad()
    def step(fraction: float) -> None:
        for name, x in hidden.items():
            assert x.grad is not None
            momenta[name] = 0.95 * momenta[name] + x.grad
            update = newton_schulz(0.95 * momenta[name] + x.grad)
            scale = 0.2 * math.sqrt(max(x.shape))
            x.copy_(x * (1 - lr * fraction * 0.1) - lr * fraction * scale * update)
        others(fraction)

    return step


def newton_schulz(g: Tensor) -> Tensor:
    """Jordan's five steps; of a tall matrix, those of its transpose."""
    if len(g) > len(g.T):
        return newton_schulz(g.T).T
    x = g / g.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x
