"""Elementwise operations, with backwards that save little and make few passes over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pretrain.model.compiling import fused


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight, over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., width] / sqrt(mean(x^2) + eps) * weight [width]."""
    normed: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return normed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_normed: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_rms_norm_backward(d_normed, *ctx.saved_tensors), None


@fused
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    precise = torch.promote_types(torch.float32, x.dtype)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
    scale = norm.square().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight).to(x.dtype), scale


@fused
def _rms_norm_backward(
    d_normed: Tensor, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    d_normed, wide = d_normed.to(scale.dtype), weight.to(scale.dtype)
    product = d_normed * x
    d_weight = product.flatten(0, -2).t() @ scale.flatten()
    along = (product @ wide)[..., None].mul_(scale.pow(3)).div_(x.shape[-1])
    d_x = (d_normed * wide).mul_(scale).addcmul_(x, along, value=-1)
    return d_x.to(x.dtype), d_weight.to(weight.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    product: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return product


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_product: Tensor) -> tuple[Tensor, Tensor]:
        return swiglu_backward(d_product, *ctx.saved_tensors)


@fused
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


@fused
def swiglu_backward(d_product: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, from that of their `swiglu`."""
    d_gate: Tensor = torch.ops.aten.silu_backward(d_product * up, gate)
    return d_gate, F.silu(gate).mul_(d_product)
