"""Rotary position embedding, for the local attention and what it sees of earlier segments.

Infini-attention's memory and the store of Memorizing Transformers use no positions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.config.model import ModelConfig
from pretrain.model.compiling import fused


class Rotary(NamedTuple):
    """Cosines and sines of consecutive positions, [positions, 1, d_head / 2] each, times the
    attention factor."""

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
    factor = attention_factor(config)
    return Rotary((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype))


def attention_factor(config: ModelConfig) -> float:
    """What rotated queries and keys are multiplied by: 1 but for yarn (arXiv 2309.00071)."""
    scaling = config.rope_scaling
    if scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0


def _frequencies(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Radians per position of each pair of components [d_head / 2].

    Rounded as in Hugging Face's models, for import and export: at far positions an angle depends
    on the last bit of its frequency.
    """
    exponents = torch.arange(0, config.d_head, 2, device=device, dtype=dtype) / config.d_head
    powers = config.rope_theta**exponents
    frequencies = 1.0 / powers
    scaling = config.rope_scaling
    if scaling.kind == "none":
        return frequencies
    lowered = frequencies / scaling.factor
    if scaling.kind == "linear":
        return lowered
    if scaling.kind == "yarn":
        kept = 1 - _ramp(config, frequencies)
        return 1.0 / (scaling.factor * powers) * (1 - kept) + frequencies * kept
    turns = scaling.original_length / (2 * math.pi / frequencies)
    kept = (turns - scaling.low_turns) / (scaling.high_turns - scaling.low_turns)
    return torch.lerp(lowered, frequencies, kept.clamp(0, 1))


def _ramp(config: ModelConfig, like: Tensor) -> Tensor:
    """Yarn's share of the lowered frequency in each pair of components [d_head / 2].

    It rises from 0 at the pair that makes `high_turns` turns within the original length to 1 at
    that of `low_turns`, linearly in the pair's number.
    """
    scaling = config.rope_scaling

    def pair(turns: float) -> float:
        times = scaling.original_length / (turns * 2 * math.pi)
        return config.d_head * math.log(times) / (2 * math.log(config.rope_theta))

    first, last = pair(scaling.high_turns), pair(scaling.low_turns)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.d_head - 1)
    if first == last:
        last += 0.001
    pairs = torch.arange(len(like), dtype=like.dtype, device=like.device)
    return ((pairs - first) / (last - first)).clamp(0, 1)


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
