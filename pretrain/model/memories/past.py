"""Attention to slots of earlier segments beside the segment: what several memories share.

Such a memory keeps inputs of its layer, and projects them with the layer's weights of today. What
is kept is a constant, sg(x): its keys and values have a gradient for the projections alone. So all
segments of a window are computed at once: the slots before each segment are rows of one *pool*, the
carried inputs followed by the window's.

Shapes: B lanes, T tokens, S segments, N tokens per segment, R slots, P rows of the pool, H query
heads, K key/value heads, D size of a head, d_model width of a layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config.model import ModelConfig
from pretrain.model import local_attention
from pretrain.model.local_attention import Past
from pretrain.model.memories.contract import Attention
from pretrain.model.projection import Projected
from pretrain.model.rotary import rotary, rotate
from pretrain.model.stream import OpenSegment
from pretrain.model.window import Continuation, Window


class Slots(NamedTuple):
    """The slots before each segment of a window, and those after the last one."""

    rows: Tensor
    """[B, S + 1, R] int64: rows of the pool."""
    visible: Tensor
    """[B, S + 1, R] bool: slots that hold something of the document that is then open."""


class PastCache(NamedTuple):
    """What a layer keeps of an open segment, after the slots of its memory."""

    slots: Tensor
    """[B, R] bool: those that hold something."""
    inputs: Tensor
    """[B, N, d_model] of the segment's tokens."""
    turned_keys: Tensor
    """[B, R + N, K, D] with rotary positions, a slot's before 0."""
    values: Tensor
    """[B, R + N, K, D]."""


class PastAttention(Attention):
    """Attention to [slots of the memory; segment], one rotary position per slot."""

    def projected_pool(
        self, pool: Tensor, window: Window
    ) -> tuple[Projected, Projected, Tensor, Tensor]:
        """Keys and values [B, P, K, D] of the pool [B, P, d_model], and those of its last rows, the
        window's segments: [B, S, N, K, D]."""
        split = (-1, self.config.d_head)
        keys, values = (
            Projected(*(torch.unflatten(part, 2, split) for part in projection(pool, shared=True)))
            for projection in (self.k_proj, self.v_proj)
        )
        if self.k_norm is not None:
            keys = self.k_norm(keys)
        shape = window.starts.shape[1:]
        own_keys, own_values = (
            torch.unflatten(x.whole[:, -shape.numel() :], 1, shape) for x in (keys, values)
        )
        return keys, values, own_keys, own_values

    def attend_to_slots(
        self,
        queries: Tensor,
        keys: Projected,
        values: Projected,
        own_keys: Tensor,
        own_values: Tensor,
        slots: Slots,
        window: Window,
    ) -> Tensor:
        """The heads [B, S, N, H, D] of queries [B, S, N, H, D].

        Keys and values are those of `projected_pool`.
        """
        before = slots.rows[:, :-1]
        positions = window.once(
            "positions of slots",
            lambda: rotary(
                -before.shape[2], before.shape[2], self.config, queries.device, queries.dtype
            ),
        )
        past_keys = rotate(gathered(keys.of_weight, before), positions)
        turned = torch.cat((past_keys, rotate(own_keys, window.positions)), dim=2)
        shown = torch.cat((gathered(values.of_weight, before), own_values), dim=2)
        attend = window.once(
            "attention to slots",
            lambda: window.kernel(
                window.starts.flatten(0, 1),
                Past(slots.visible[:, :-1].flatten(0, 1), window.readable.flatten(0, 1)),
            ),
        )
        attended = attend(
            rotate(queries, window.positions).flatten(0, 1),
            turned.flatten(0, 1),
            shown.flatten(0, 1),
        )
        return attended.view(queries.shape)

    def decode_after_slots(
        self, x: Tensor, layout: Continuation, cache: PastCache
    ) -> tuple[Tensor, Tensor]:
        """The heads [B, n, H, D] of the next n tokens x [B, n, d_model], which are cached, and
        their queries [B, n, H, D] without positions."""
        queries, keys, values = self.projected(x)
        held = cache.slots.shape[1]
        cache.inputs.index_copy_(1, layout.places, x)
        cache.turned_keys.index_copy_(1, layout.places + held, rotate(keys, layout.positions))
        cache.values.index_copy_(1, layout.places + held, values)
        count, reach = layout.visible.shape[-2:]
        past = cache.slots[:, None, None].expand(-1, 1, count, -1)
        visible = torch.cat((past, layout.visible.expand(len(x), 1, count, reach)), dim=-1)
        heads = local_attention.attend_to_visible(
            rotate(queries, layout.positions),
            cache.turned_keys[:, : held + reach],
            cache.values[:, : held + reach],
            visible,
        )
        return heads, queries

    def cache(self, lanes: int, length: int, slots: int, like: Tensor) -> PastCache:
        """The cache of an empty segment of `length` tokens after that many empty slots."""
        keys = (lanes, slots + length, self.config.n_kv_heads, self.config.d_head)
        return PastCache(
            like.new_zeros(lanes, slots, dtype=torch.bool),
            like.new_zeros(lanes, length, self.config.d_model),
            like.new_zeros(keys),
            like.new_zeros(keys),
        )

    def fill_slots(self, cache: PastCache, inputs: Tensor, visible: Tensor) -> None:
        """Put the slots' inputs [B, R, d_model] into the cache; visible [B, R] bool."""
        _, keys, values = self.projected(inputs)
        slots = inputs.shape[1]
        positions = rotary(-slots, slots, self.config, inputs.device, inputs.dtype)
        cache.slots.copy_(visible)
        cache.turned_keys[:, :slots] = rotate(keys, positions)
        cache.values[:, :slots] = values


def past_cache(segment: OpenSegment) -> PastCache:
    """The cache of an open segment of a `PastAttention`."""
    assert isinstance(segment.cache, PastCache)
    return segment.cache


def last_starts(window: Window) -> Tensor:
    """[B, S + 1] int64: the window's last document start before each segment, and before the
    window's end; -1 if there is none."""
    lanes, _, length = window.starts.shape
    places = torch.arange(window.starts[0].numel(), device=window.starts.device)
    so_far = torch.where(window.starts.flatten(1), places, -1).cummax(dim=1).values
    ends = so_far[:, length - 1 :: length]
    return torch.cat((ends.new_full((lanes, 1), -1), ends), dim=1)


def latest(window: Window, carried: Tensor, initial: Tensor | None) -> Slots:
    """The last R inputs of the open document before each segment.

    carried [B, R] bool: the carried slots that hold something; initial: the same of the memory that
    documents begin with, of which the newest precede the document's own inputs. The pool is
    [initial; carried; window], its first part only where `initial` is given.
    """
    count = carried.shape[1]
    length = window.starts.shape[2]
    segments = torch.arange(window.starts.shape[1] + 1, device=carried.device)
    ends = (segments * length).clamp(max=window.tokens)
    places = ends[:, None] + torch.arange(-count, 0, device=carried.device)
    starts = last_starts(window)[..., None]
    kept = [carried] if initial is None else [initial, carried]
    held = torch.cat((*kept, carried.new_ones(len(carried), window.starts[0].numel())), dim=1)
    rows = (places + count * len(kept)).expand(len(carried), -1, -1)
    of_document = places >= starts
    if initial is not None:
        rows = torch.where(of_document | (starts < 0), rows, places - starts + count)
        of_document = torch.ones_like(of_document)
    visible = held.gather(1, rows.flatten(1)).view(rows.shape)
    return Slots(rows, visible & (of_document | (starts < 0)))


def gathered(pool: Tensor, rows: Tensor) -> Tensor:
    """pool [B, P, ...], rows [B, S, R] -> [B, S, R, ...]."""
    lanes, size = pool.shape[:2]
    offsets = torch.arange(lanes, device=pool.device)[:, None, None] * size
    found = pool.flatten(0, 1).flatten(1).index_select(0, (rows + offsets).flatten())
    return found.view(*rows.shape, *pool.shape[2:])


def kept(pool: Tensor, slots: Slots) -> Tensor:
    """The inputs [B, R, d_model] after the window, a constant, 0 in slots that hold nothing."""
    after = gathered(pool.detach(), slots.rows[:, -1:]).squeeze(1)
    # Not by a product: what overflowed in another document must not be kept.
    return after.masked_fill(~slots.visible[:, -1, :, None], 0)


def slot_flops(config: ModelConfig, window: int, slots: int) -> int:
    """FLOPs of a layer's attention to `slots` slots by every token of a window."""
    return 2 * 2 * window * slots * config.n_heads * config.d_head
