"""Rotary position embedding, for the local attention alone: the memory sees no positions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.model.compiling import fused


class Rotary(NamedTuple):
    """Cosines and sines of consecutive positions, [positions, 1, d_head / 2] each."""

    cosine: Tensor
    sine: Tensor


def rotary(
    first: int, length: int, d_head: int, theta: float, device: torch.device, dtype: torch.dtype
) -> Rotary:
    """Tables for the positions first .. first + length - 1 within a segment."""
    return rotary_at(torch.arange(first, first + length, device=device), d_head, theta, dtype)


def rotary_at(places: Tensor, d_head: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Tables for the positions `places` [positions], int64, within a segment.

    Angles are computed in float32 or better and only their cosines and sines are cast to `dtype`.
    """
    precise = torch.promote_types(torch.float32, dtype)
    exponents = torch.arange(0, d_head, 2, device=places.device, dtype=precise) / d_head
    angles = (places.to(precise)[:, None] * theta**-exponents)[:, None, :]
    return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, table: Rotary) -> Tensor:
    """`x` [..., positions, heads, d_head] turned by its positions, in Llama's half-split order."""
    turned: Tensor = _Rotate.apply(x, *table)  # type: ignore[no-untyped-call]
    return turned


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turned(x, cosine, sine)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turned(slope, cosine, -sine), None, None


@fused
def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.empty_like(x, memory_format=torch.contiguous_format)
    left, right = turned.chunk(2, dim=-1)
    torch.mul(first, cosine, out=left).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=right).addcmul_(first, sine)
    return turned
