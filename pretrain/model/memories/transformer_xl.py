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

from pretrain.config.model import ModelConfig
from pretrain.model.memories.contract import Attended, Attention, Carried
from pretrain.model.memories.past import (
    PastAttention,
    Slots,
    kept,
    latest,
    past_cache,
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


class Near(NamedTuple):
    """Attention of a window to its segments and the cache, and what it projected for it."""

    heads: Tensor
    """[B, S, N, H, D]."""
    cache: CacheState
    """After the window."""
    queries: Tensor
    """[B, S, N, H, D] without positions."""
    keys: Tensor
    """[B, S, N, K, D] without positions."""
    values: Tensor
    """[B, S, N, K, D]."""


class CachedAttention(PastAttention):
    """Attention to the segment and to the layer's cached inputs."""

    def __init__(self, config: ModelConfig, size: int) -> None:
        """`size`: the slots m of the cache."""
        super().__init__(config)
        self.size = size

    @classmethod
    def of_layer(cls, config: ModelConfig, layer: int) -> Attention:
        """See `Attention.of_layer`."""
        return cls(config, cls.slots(config))

    @classmethod
    def slots(cls, config: ModelConfig) -> int:
        """The slots m of every layer's cache."""
        return config.memory.transformer_xl.cache or config.segment

    def cached(self, state: State) -> CacheState:
        """The cached inputs of a memory."""
        assert isinstance(state, CacheState)
        return state

    def empty(self, lanes: int, like: Tensor) -> State:
        """No slot holds an input, so none is attended to."""
        return CacheState(
            like.new_zeros(lanes, self.size, self.config.d_model),
            like.new_zeros(lanes, self.size, dtype=torch.bool),
        )

    def attend(self, x: Tensor, window: Window, carried: Carried) -> Attended:
        """See `Attention.attend`."""
        near = self.attend_to_cache(x, window, carried)
        return Attended(window.joined(near.heads), near.cache)

    def memory_after(self, x: Tensor, window: Window, carried: Carried) -> State:
        """See `Attention.memory_after`."""
        return self._cache(*self._pooled(x, window, carried))

    def attend_to_cache(self, x: Tensor, window: Window, carried: Carried) -> Near:
        """Attention of the window's x [B, T, d_model] to the segment and the cache."""
        pool, slots = self._pooled(x, window, carried)
        queries = window.segmented(self.projected_queries(x))
        projected = self.projected_pool(pool, window)
        heads = self.attend_to_slots(queries, *projected, slots, window)
        return Near(heads, self._cache(pool, slots), queries, *projected[2:])

    def _pooled(self, x: Tensor, window: Window, carried: Carried) -> tuple[Tensor, Slots]:
        initial = None if carried.initial is None else self.cached(carried.initial)
        return pooled(x, window, self.cached(carried.before), initial)

    def _cache(self, pool: Tensor, slots: Slots) -> CacheState:
        """The cached inputs after the window."""
        return CacheState(kept(pool, slots), slots.visible[:, -1])

    def opened(self, memory: State, lanes: int, length: int, like: Tensor) -> OpenSegment:
        """See `Attention.opened`."""
        return OpenSegment(memory, self.cache(lanes, length, self.size, like))

    def decode(self, x: Tensor, layout: Continuation, segment: OpenSegment) -> Tensor:
        """See `Attention.decode`."""
        heads, _ = self.decode_after_slots(x, layout, past_cache(segment))
        return heads

    def close(self, segment: OpenSegment) -> None:
        """See `Attention.close`."""
        segment.remember(self.after(segment))
        self.reopen(segment)

    def after(self, segment: OpenSegment) -> State:
        """The memory after a full segment."""
        return self.cache_after(segment)

    def cache_after(self, segment: OpenSegment) -> CacheState:
        """The cached inputs after a full segment."""
        inputs, held = self.cached(segment.memory)
        new = past_cache(segment).inputs
        everywhere = held.new_ones(new.shape[:2])
        return CacheState(
            torch.cat((inputs, new), dim=1)[:, -self.size :],
            torch.cat((held, everywhere), dim=1)[:, -self.size :],
        )

    def reopen(self, segment: OpenSegment) -> None:
        """See `Attention.reopen`."""
        self.fill_slots(past_cache(segment), *self.cached(segment.memory))

    def metrics(self, state: State) -> dict[str, Tensor]:
        """`cached_tokens`: slots that hold an input."""
        return {"cached_tokens": self.cached(state).held.double().sum()}

    @classmethod
    def flops(cls, config: ModelConfig, window: int) -> dict[str, int]:
        """See `Attention.flops`; the carried inputs are projected once a window."""
        return super().flops(config, window) | cache_flops(config, window, cls.slots(config))


def pooled(
    x: Tensor, window: Window, before: CacheState, initial: CacheState | None
) -> tuple[Tensor, Slots]:
    """The pool [B, P, d_model] of the cache and the window's x [B, T, d_model]; its slots."""
    slots = window.once(
        "cached inputs", lambda: latest(window, before.held, initial.held if initial else None)
    )
    first = () if initial is None else (initial.inputs.detach(),)
    return torch.cat((*first, before.inputs.detach(), window.padded(x)), dim=1), slots


def cache_flops(config: ModelConfig, window: int, size: int) -> dict[str, int]:
    """FLOPs of all layers for a cache of `size` inputs: attention to it, and its projection."""
    projected = 2 * size * config.d_model * 2 * config.n_kv_heads * config.d_head
    return {
        "cache": config.n_layers * (slot_flops(config, window, size) + projected),
    }
