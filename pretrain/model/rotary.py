"""Rotary position embedding, for the local attention and what it sees of earlier segments.

Infini-attention's memory and the store of Memorizing Transformers use no positions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.config import ModelConfig
from pretrain.model.compiling import fused


class Rotary(NamedTuple):
    """Cosines and sines of consecutive positions, [positions, 1, d_head / 2] each."""

    cosine: Tensor
    sine: Tensor


def rotary(
    first: int, length: int, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Rotary:
    """Tables for the positions first .. first + length - 1 within a segment."""
    return rotary_at(torch.arange(first, first + length, device=device), config, dtype)


def rotary_at(places: Tensor, config: ModelConfig, dtype: torch.dtype) -> Rotary:
    """Tables for the positions `places` [positions], int64, within a segment.

    Angles are computed in float32 or better and only their cosines and sines are cast to `dtype`.
    """
    precise = torch.promote_types(torch.float32, dtype)
    frequencies = _frequencies(config, places.device, precise)
    angles = (places.to(precise)[:, None] * frequencies)[:, None, :]
    return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))


def _frequencies(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Radians per position of each pair of components [d_head / 2].

    Rounded as in Hugging Face's models, for import and export: at far positions an angle depends
    on the last bit of its frequency.
    """
    exponents = torch.arange(0, config.d_head, 2, device=device, dtype=dtype) / config.d_head
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling.kind == "none":
        return frequencies
    lowered = frequencies / scaling.factor
    if scaling.kind == "linear":
        return lowered
    turns = scaling.original_length / (2 * math.pi / frequencies)
    kept = (turns - scaling.low_turns) / (scaling.high_turns - scaling.low_turns)
    return torch.lerp(lowered, frequencies, kept.clamp(0, 1))


def rotate(x: Tensor, table: Rotary) -> Tensor:
    """`x` [..., positions, heads, d_head] rotated by its positions, in Llama's half-split order."""
    turned: Tensor = _Rotate.apply(x, *table)  # type: ignore[no-untyped-call]
    return turned


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turned(x, cosine, sine)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_turned: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turned(d_turned, cosine, -sine), None, None


@fused
def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    # Tables expanded to all heads: working on half a head at a time is slow on a CPU.
    heads = x.shape[-2]
    along = torch.cat((cosine, cosine), dim=-1).expand(-1, heads, -1).contiguous()
    across = torch.cat((-sine, sine), dim=-1).expand(-1, heads, -1).contiguous()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1).mul_(across).addcmul_(x, along)
