"""Memorizing Transformers (arXiv 2203.08913): one layer also attends to the nearest of many keys.

The layer stores keys and values of the open document's tokens, up to a capacity, the oldest out. A
query attends to the k stored keys of the largest dot product with it, by a softmax of their own,
and a gate per head mixes the result with the local attention: g * memory + (1 - g) * local, g =
sigmoid(b). Stored keys and the queries that search them have length 1 and no positions; their
products are multiplied by a learned scale per head. What is stored is a constant. Every layer, this
one included, has the cache of Transformer-XL.

In a window, a segment searches what was carried and the window's earlier segments. The capacity
counts back from the segment's start, and the cached tokens are searched too, as in the authors'
code. Tokens with nothing to read keep the local attention unchanged.

Shapes: B lanes, T tokens, S segments, N tokens per segment, C capacity, P rows of the pool, H query
heads, K key/value heads, D size of a head, k neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from pretrain.config.model import ModelConfig
from pretrain.model.memories.contract import Attended, Attention, Carried
from pretrain.model.memories.nearest import Found, attend_to_found, nearest
from pretrain.model.memories.past import last_starts, past_cache
from pretrain.model.memories.transformer_xl import CachedAttention, CacheState
from pretrain.model.state import State
from pretrain.model.stream import OpenSegment
from pretrain.model.window import Continuation, Window

_EPSILON = 1e-6
"""Added to a squared length before dividing by it, as in the authors' code."""


Rows: TypeAlias = tuple[range, ...]
"""Runs of rows of a lane's pool, the oldest first."""


class StoreState(NamedTuple):
    """The cache and the store of a layer."""

    inputs: Tensor
    """[B, m, d_model], see `CacheState`."""
    held: Tensor
    """[B, m] bool, see `CacheState`."""
    keys: Tensor
    """[B, C, K, D] of length 1, without positions, the newest last."""
    values: Tensor
    """[B, C, K, D]."""
    stored: Tensor
    """[B, C] bool: the rows that hold a token of the open document, the last ones."""


class MemorizingAttention(CachedAttention):
    """Attention to the segment and the cache, gated with attention to the nearest stored keys."""

    gates: ClassVar[tuple[str, ...]] = ("gate",)

    def __init__(self, config: ModelConfig, size: int) -> None:
        """`size`: the slots of the cache."""
        super().__init__(config, size)
        self.gate = nn.Parameter(torch.zeros(config.n_heads, dtype=torch.float32))
        scale = config.memory.memorizing.initial_scale
        self.scale = nn.Parameter(torch.full((config.n_heads,), scale))

    @classmethod
    def of_layer(cls, config: ModelConfig, layer: int) -> Attention:
        """One layer has the store, the others the cache alone."""
        kind = cls if layer == store_layer(config) else CachedAttention
        return kind(config, cls.slots(config))

    @classmethod
    def slots(cls, config: ModelConfig) -> int:
        """See `CachedAttention.slots`."""
        return config.memory.memorizing.cache or config.segment

    def cached(self, state: State) -> CacheState:
        """See `CachedAttention.cached`."""
        return CacheState(*_own(state)[:2])

    def empty(self, lanes: int, like: Tensor) -> State:
        """No row holds a token, so nothing is read."""
        capacity = self.config.memory.memorizing.capacity
        shape = (lanes, capacity, self.config.n_kv_heads, self.config.d_head)
        inputs, held = super().empty(lanes, like)
        return StoreState(
            inputs,
            held,
            like.new_zeros(shape),
            like.new_zeros(shape),
            like.new_zeros(lanes, capacity, dtype=torch.bool),
        )

    def attend(self, x: Tensor, window: Window, carried: Carried) -> Attended:
        """See `Attention.attend`."""
        near = self.attend_to_cache(x, window, carried)
        stores = [_own(state) for state in (carried.initial, carried.before) if state is not None]
        keys = _pool([store.keys for store in stores], unit(near.keys.detach()))
        values = _pool([store.values for store in stores], near.values.detach())
        rows = rows_before(window, [store.stored for store in stores])
        queries = unit(near.queries)
        found, reads = self._found(queries, keys, rows, window)
        read = attend_to_found(queries, self.scale, found, keys, values)
        heads = self._gated(near.heads, read, reads)
        state = StoreState(*near.cache, *_after(keys, values, rows, stores[0].stored))
        return Attended(window.joined(heads), state)

    def memory_after(self, x: Tensor, window: Window, carried: Carried) -> State:
        """See `Attention.memory_after`."""
        return self.attend(x, window, carried).state

    def _found(
        self, queries: Tensor, keys: Tensor, rows: Sequence[Sequence[Rows]], window: Window
    ) -> tuple[Found, Tensor]:
        """The neighbours of queries [B, S, N, H, D] in the pool, and [B, S, N] bool, the tokens
        that have something to read; the neighbours of others have no meaning."""
        count = self.config.memory.memorizing.neighbours
        holding = torch.tensor([[bool(one) for one in lane[:-1]] for lane in rows])
        reads = window.readable & holding.to(keys.device)[..., None]
        precise = torch.promote_types(torch.float32, queries.dtype)
        scores = queries.new_zeros(*queries.shape[:-1], count, dtype=precise)
        places = torch.zeros_like(scores, dtype=torch.int64)
        for lane, of_segments in enumerate(reads.sum(dim=2).tolist()):
            for segment, tokens in enumerate(of_segments):
                if tokens:
                    readers = lane, segment, slice(tokens)  # the first ones of a segment
                    scores[readers], places[readers] = _nearest_of(
                        rows[lane][segment], queries[readers], keys[lane], count
                    )
        return Found(scores, places), reads

    def _gated(self, near: Tensor, read: Tensor, reads: Tensor) -> Tensor:
        """[B, ..., H, D]; reads [B, ...] bool: tokens that have something to read."""
        share = torch.sigmoid(self.gate).to(near.dtype)[:, None]
        return torch.where(reads[..., None, None], torch.lerp(near, read, share), near)

    def decode(self, x: Tensor, layout: Continuation, segment: OpenSegment) -> Tensor:
        """See `Attention.decode`."""
        near, queries = self.decode_after_slots(x, layout, past_cache(segment))
        queries, store = unit(queries), _own(segment.memory)
        count = self.config.memory.memorizing.neighbours
        lanes = zip(queries, store.keys, store.stored, strict=True)
        found = [nearest(one, keys, count, stored) for one, keys, stored in lanes]
        together = Found(*map(torch.stack, zip(*found, strict=True)))
        read = attend_to_found(queries, self.scale, together, store.keys, store.values)
        return self._gated(near, read, store.stored[:, -1:].expand(-1, x.shape[1]))

    def after(self, segment: OpenSegment) -> State:
        """See `CachedAttention.after`."""
        store, cache = _own(segment.memory), past_cache(segment)
        keys = unit(self.projected_keys(cache.inputs))
        new = keys, cache.values[:, self.size :], store.stored.new_ones(keys.shape[:2])
        entered = zip(store[2:], new, strict=True)
        return StoreState(
            *self.cache_after(segment),
            *(torch.cat(parts, dim=1)[:, keys.shape[1] :] for parts in entered),
        )

    def metrics(self, state: State) -> dict[str, Tensor]:
        """`store_tokens`: tokens in the store."""
        return super().metrics(state) | {"store_tokens": _own(state).stored.double().sum()}

    @classmethod
    def flops(cls, config: ModelConfig, window: int) -> dict[str, int]:
        """See `Attention.flops`; for a full store."""
        memory, width = config.memory.memorizing, config.n_heads * config.d_head
        return super().flops(config, window) | {
            "store_search": _search_flops(config, window),
            "store_read": 2 * window * min(memory.neighbours, memory.capacity) * width,
        }

    @classmethod
    def missing_flops(cls, config: ModelConfig, window: int) -> int:
        """See `Attention.missing_flops`: the search has no backward."""
        return 2 * _search_flops(config, window)


def store_layer(config: ModelConfig) -> int:
    """The layer with the store, from 0."""
    return (config.memory.memorizing.layer or math.ceil(config.n_layers * 3 / 4)) - 1


def _search_flops(config: ModelConfig, window: int) -> int:
    return 2 * window * config.memory.memorizing.capacity * config.n_heads * config.d_head


def unit(x: Tensor) -> Tensor:
    """x [..., D] of length 1; computed in float32 or better."""
    precise = x.to(torch.promote_types(torch.float32, x.dtype))
    squared = torch.linalg.vecdot(precise, precise)[..., None]
    found: Tensor = precise * (squared + _EPSILON).rsqrt()
    return found.to(x.dtype)


def rows_before(window: Window, stored: Sequence[Tensor]) -> list[list[Rows]]:
    """For each lane, the rows of the pool with the newest C tokens of the open document before each
    segment, and after the last one.

    The pool is [initial store; carried store; window], its first part only where there are two
    stores; stored: what they hold, [B, C] bool.
    """
    capacity = stored[0].shape[1]
    base = capacity * len(stored)  # the row of the window's first token
    counts = [part.sum(dim=1).tolist() for part in stored]
    found = []
    for lane, starts in enumerate(last_starts(window).tolist()):
        carried, initial = counts[-1][lane], counts[0][lane] if len(stored) > 1 else 0
        of_lane: list[Rows] = []
        for segment, start in enumerate(starts):
            end = min(segment * window.starts.shape[2], window.tokens)
            first = max(start, end - capacity, 0)
            before = min(carried if start < 0 else initial, capacity - (end - first))
            # What was carried is followed by the window's rows; an initial store is not.
            runs = (
                (range(base + first - before, base + end),)
                if start < 0
                else (range(capacity - before, capacity), range(base + first, base + end))
            )
            of_lane.append(tuple(run for run in runs if run))
        found.append(of_lane)
    return found


def _nearest_of(rows: Rows, queries: Tensor, keys: Tensor, count: int) -> Found:
    """The neighbours of queries [n, H, D] in these rows of keys [P, K, D]."""
    shown = [keys[run.start : run.stop] for run in rows]
    if len(shown) == 1:
        found = nearest(queries, shown[0], count)
        return found._replace(rows=found.rows + rows[0].start)
    found = nearest(queries, torch.cat(shown), count)
    numbers = torch.cat([torch.arange(run.start, run.stop, device=keys.device) for run in rows])
    return found._replace(rows=numbers[found.rows])


def _pool(stores: Sequence[Tensor], own: Tensor) -> Tensor:
    """[B, P, K, D] of stores [B, C, K, D] and the window's own [B, S, N, K, D]."""
    return torch.cat((*(store.detach() for store in stores), own.flatten(1, 2)), dim=1)


def _after(
    keys: Tensor, values: Tensor, rows: Sequence[Sequence[Rows]], like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The store after the window: keys and values [B, C, K, D], and what it holds, as `like`."""
    lanes, capacity = like.shape
    parts = [pool.new_zeros(lanes, capacity, *pool.shape[2:]) for pool in (keys, values)]
    stored = torch.zeros_like(like)
    for lane, of_segments in enumerate(rows):
        first = capacity - sum(map(len, of_segments[-1]))
        stored[lane, first:] = True
        for run in of_segments[-1]:
            for part, pool in zip(parts, (keys, values), strict=True):
                part[lane, first : first + len(run)] = pool[lane, run.start : run.stop]
            first += len(run)
    return parts[0], parts[1], stored


def _own(state: State) -> StoreState:
    assert isinstance(state, StoreState)
    return state
