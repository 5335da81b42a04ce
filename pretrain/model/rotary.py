"""Rotary position embedding, for the local attention alone: the memory sees no positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
    first, second = x.chunk(2, dim=-1)
    turned = (
        torch.addcmul(first * table.cosine, second, table.sine, value=-1),
        torch.addcmul(second * table.cosine, first, table.sine),
    )
    return torch.cat(turned, dim=-1)
