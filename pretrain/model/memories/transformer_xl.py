"""Transformer-XL (arXiv 1901.02860): each layer also attends to its cached inputs.

A layer caches the last m inputs of the open document. Their keys and values are computed anew with
today's weights, which so learn from them; the inputs are constants (the paper's SG). Positions are
those of the rotary embedding, a slot's before its segment, instead of the paper's sinusoids with u,
v and W_R.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.model.memories.contract import Attended, Carried
from pretrain.model.memories.past import (
    PastAttention,
    PastCache,
    Slots,
    kept,
    latest,
    slot_flops,
)
from pretrain.model.state import State
from pretrain.model.stream import OpenSegment
from pretrain.model.window import Continuation, Window


class CacheState(NamedTuple):
    """The last m inputs of a layer."""

    inputs: Tensor
    """[B, m, d_model], the newest last."""
    held: Tensor
    """[B, m] bool: the slots that hold an input of the open document."""


class CachedAttention(PastAttention):
    """Attention to the segment and to the layer's cached inputs."""

    def size(self) -> int:
        """The slots m of the cache."""
        return self.config.memory.transformer_xl.cache or self.config.segment

    def empty(self, lanes: int, like: Tensor) -> State:
        """No slot holds an input, so none is attended to."""
        size = self.size()
        return CacheState(
            like.new_zeros(lanes, size, self.config.d_model),
            like.new_zeros(lanes, size, dtype=torch.bool),
        )

    def attend(self, x: Tensor, window: Window, carried: Carried) -> Attended:
        """See `Attention.attend`."""
        pool, slots = pooled(x, window, _own(carried.before), carried.initial)
        queries = window.segmented(self.projected_queries(x))
        heads = self.attend_to_slots(queries, *self.projected_pool(pool, window), slots, window)
        return Attended(window.joined(heads), CacheState(kept(pool, slots), slots.visible[:, -1]))

    def opened(self, memory: State, lanes: int, length: int, like: Tensor) -> OpenSegment:
        """See `Attention.opened`."""
        return OpenSegment(memory, self.cache(lanes, length, self.size(), like))

    def decode(self, x: Tensor, layout: Continuation, segment: OpenSegment) -> Tensor:
        """See `Attention.decode`."""
        heads, _ = self.decode_after_slots(x, layout, _cache(segment))
        return heads

    def close(self, segment: OpenSegment) -> None:
        """See `Attention.close`."""
        inputs, held = _own(segment.memory)
        new = _cache(segment).inputs
        everywhere = held.new_ones(new.shape[:2])
        size = self.size()
        segment.remember(
            CacheState(
                torch.cat((inputs, new), dim=1)[:, -size:],
                torch.cat((held, everywhere), dim=1)[:, -size:],
            )
        )
        self.reopen(segment)

    def reopen(self, segment: OpenSegment) -> None:
        """See `Attention.reopen`."""
        self.fill_slots(_cache(segment), *_own(segment.memory))

    def metrics(self, state: State) -> dict[str, Tensor]:
        """`cached_tokens`: slots that hold an input."""
        return {"cached_tokens": _own(state).held.double().sum()}

    @classmethod
    def flops(cls, config: ModelConfig, window: int) -> dict[str, int]:
        """See `Attention.flops`; the carried inputs are projected once a window."""
        size = config.memory.transformer_xl.cache or config.segment
        return super().flops(config, window) | cache_flops(config, window, size)


def pooled(
    x: Tensor, window: Window, before: CacheState, initial: State | None
) -> tuple[Tensor, Slots]:
    """The pool [B, P, d_model] of the cache and the window's x [B, T, d_model]; its slots."""
    first = [] if initial is None else [_own(initial)]
    slots = window.once(
        "cached inputs", lambda: latest(window, before.held, first[0].held if first else None)
    )
    parts = (*(one.inputs.detach() for one in first), before.inputs.detach(), window.padded(x))
    return torch.cat(parts, dim=1), slots


def cache_flops(config: ModelConfig, window: int, size: int) -> dict[str, int]:
    """FLOPs of all layers for a cache of `size` inputs: attention to it, and its projection."""
    projected = 2 * size * config.d_model * 2 * config.n_kv_heads * config.d_head
    return {
        "cache": config.n_layers * (slot_flops(config, window, size) + projected),
    }


def _own(state: State) -> CacheState:
    assert isinstance(state, CacheState)
    return state


def _cache(segment: OpenSegment) -> PastCache:
    assert isinstance(segment.cache, PastCache)
    return segment.cache
