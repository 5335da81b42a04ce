"""The SwiGLU feed-forward, which can recompute its hidden activations in the backward."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pretrain.config.model import ModelConfig
from pretrain.config.training import Checkpointing
from pretrain.model.pointwise import swiglu, swiglu_backward

_CHUNK = 2**15
"""Tokens whose hidden activations are in memory at once when they are recomputed."""


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), its weights initialised in the constructor (see `Projection`).

    Without checkpointing the hidden activations are saved. Otherwise (`selective`, or `full` with a
    window longer than a chunk) they exist for one chunk of tokens at a time, in the forward and in
    the backward.
    """

    def __init__(self, config: ModelConfig, checkpointing: Checkpointing) -> None:
        super().__init__()
        self._checkpointing = checkpointing
        inner, outer = (config.d_ff, config.d_model), (config.d_model, config.d_ff)
        residual_std = config.init_std / math.sqrt(2 * config.n_layers)
        self.gate_proj = _drawn(inner, config.init_std)
        self.up_proj = _drawn(inner, config.init_std)
        self.down_proj = _drawn(outer, residual_std)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d_model] -> [B, T, d_model]."""
        tokens = x.flatten(0, -2)
        weights = self.gate_proj, self.up_proj, self.down_proj
        long = self._checkpointing == "full" and len(tokens) > _CHUNK
        if self._checkpointing == "selective" or long or not torch.is_grad_enabled():
            y: Tensor = _InChunks.apply(tokens, *weights)  # type: ignore[no-untyped-call]
            return y.view_as(x)
        hidden = swiglu(F.linear(x, self.gate_proj), F.linear(x, self.up_proj))
        return F.linear(hidden, self.down_proj)


def _drawn(shape: tuple[int, int], std: float) -> nn.Parameter:
    return nn.Parameter(nn.init.normal_(torch.empty(shape), std=std))


class _InChunks(torch.autograd.Function):
    """x [n, d_model], weights [out, in] -> [n, d_model]; saves only its inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate, up, down)
        y = torch.empty_like(x)
        for out, rows in zip(torch.split(y, _CHUNK), torch.split(x, _CHUNK), strict=True):
            hidden = swiglu(F.linear(rows, gate), F.linear(rows, up))
            torch.mm(hidden, down.t(), out=out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, gate, up, down = ctx.saved_tensors
        precise = torch.promote_types(torch.float32, x.dtype)
        d_x = torch.empty_like(x)
        sums = [torch.zeros_like(weight, dtype=precise) for weight in (gate, up, down)]
        for out, rows, given in zip(
            torch.split(d_x, _CHUNK),
            torch.split(x, _CHUNK),
            torch.split(d_y, _CHUNK),
            strict=True,
        ):
            opened, raised = F.linear(rows, gate), F.linear(rows, up)
            d_opened, d_raised = swiglu_backward(given @ down, opened, raised)
            torch.mm(d_opened, gate, out=out)
            torch.addmm(out, d_raised, up, out=out)
            hidden = swiglu(opened, raised)
            for total, a, b in zip(
                sums, (d_opened, d_raised, given), (rows, rows, hidden), strict=True
            ):
                total += a.t() @ b
        d_gate, d_up, d_down = (total.to(gate.dtype) for total in sums)
        return d_x, d_gate, d_up, d_down
