"""Compressive Transformer (arXiv 1911.05507): a cache of inputs, and older inputs compressed.

A layer keeps the last n_m inputs of the open document, in whole segments, and n_cm compressed
slots. After each segment its N inputs enter the cache, the oldest N fall out, and a strided
convolution f (kernel = stride = c) makes N / c slots of them. A block of c inputs that are not all
of the open document makes no slot, so that none mixes documents: up to c - 1 first tokens of a
document that starts inside a block are never compressed.

What is kept is a constant (the paper's sg): its keys and values are computed anew with today's
weights, which so learn from it. f has no gradient of the language-model loss. It learns from the
layer's reconstruction loss || A(sg h, sg old) - A(sg h, f(sg old)) ||^2 alone: h are the tokens of
a segment that read the memory, old the N inputs that leave the cache when the segment is full, A
attention by content, without positions, with the layer's W_Q, W_K and W_V under sg.

Shapes: those of past.py; n_m cached inputs, n_cm compressed slots, c the rate. The slots of a
segment are [compressed; cached], R = n_cm + n_m.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config.model import ModelConfig
from pretrain.model import local_attention
from pretrain.model.memories.contract import Attended, Carried
from pretrain.model.memories.past import (
    PastAttention,
    Slots,
    gathered,
    kept,
    last_starts,
    past_cache,
    slot_flops,
)
from pretrain.model.projection import Projected, Projection
from pretrain.model.state import State
from pretrain.model.stream import OpenSegment
from pretrain.model.window import Continuation, Window


class CompressiveState(NamedTuple):
    """The compressed slots and the cached inputs of a layer, the newest last."""

    compressed: Tensor
    """[B, n_cm, d_model]."""
    compressed_held: Tensor
    """[B, n_cm] bool: the slots that hold something of the open document."""
    cached: Tensor
    """[B, n_m, d_model]."""
    cached_held: Tensor
    """[B, n_m] bool."""


class Sizes(NamedTuple):
    """The shape of the memory."""

    segment: int
    """N."""
    cached: int
    """n_m, a multiple of N."""
    compressed: int
    """n_cm."""
    rate: int
    """c, a divisor of N."""

    @classmethod
    def of(cls, config: ModelConfig) -> Sizes:
        """Those of the configuration."""
        own = config.memory.compressive
        return cls(config.segment, own.cache or config.segment, own.compressed, own.rate)

    @property
    def blocks(self) -> int:
        """Blocks of a segment."""
        return self.segment // self.rate

    def leaving(self, window: Window) -> int:
        """How many of a memory's cached inputs leave it within the window."""
        return min(self.cached, window.starts.shape[1] * self.segment)


class Compared(NamedTuple):
    """What attention by content sees, in each segment."""

    rows: Tensor
    """[B, S, rows] int64: rows of the pool."""
    mask: Tensor | None
    """[B * S, 1, 1, rows] bool: those in blocks of one document; None: all. All True in a segment
    that has none."""


class Layout(NamedTuple):
    """The rows of the pool that each segment uses.

    The pool is [compressed slots; blocks that leave the cache in the window, compressed; cached
    inputs; the window's inputs], with `initial` both first pairs twice, those of `initial` first.
    """

    slots: Slots
    """The memory's."""
    old: Compared
    """The N inputs that leave the cache when the segment is full."""
    new: Compared
    """The N / c slots that they become."""
    readers: Tensor
    """[B, S, N] bool: the tokens that attend to these two."""


class CompressiveAttention(PastAttention):
    """Attention to the segment, the cached inputs and the compressed slots."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.sizes = Sizes.of(config)
        inputs = self.sizes.rate * config.d_model
        # A convolution whose stride is its kernel is a product with each block. Its slots have the
        # scale of inputs from the start.
        self.compression = Projection(inputs, config.d_model, 1 / math.sqrt(inputs))

    def empty(self, lanes: int, like: Tensor) -> State:
        """No slot holds anything, so none is attended to."""
        tensors = []
        for size in (self.sizes.compressed, self.sizes.cached):
            tensors.append(like.new_zeros(lanes, size, self.config.d_model))
            tensors.append(like.new_zeros(lanes, size, dtype=torch.bool))
        return CompressiveState(*tensors)

    def attend(self, x: Tensor, window: Window, carried: Carried) -> Attended:
        """See `Attention.attend`."""
        pool, layout = self._pooled(x, window, carried)
        keys, values, own_keys, own_values = self.projected_pool(pool, window)
        queries = window.segmented(self.projected_queries(x))
        heads = self.attend_to_slots(
            queries, keys, values, own_keys, own_values, layout.slots, window
        )
        auxiliary = None
        if torch.is_grad_enabled():
            auxiliary = self.reconstruction(queries.detach(), keys, values, layout)
        return Attended(window.joined(heads), self._state(pool, layout), auxiliary)

    def memory_after(self, x: Tensor, window: Window, carried: Carried) -> State:
        """See `Attention.memory_after`."""
        return self._state(*self._pooled(x, window, carried))

    def _pooled(self, x: Tensor, window: Window, carried: Carried) -> tuple[Tensor, Layout]:
        memories = [_own(one) for one in (carried.initial, carried.before) if one is not None]
        layout = window.once("compressive layout", lambda: laid_out(window, self.sizes, memories))
        return self.pool(x, window, memories), layout

    def _state(self, pool: Tensor, layout: Layout) -> CompressiveState:
        """The memory after the window."""
        after, held = kept(pool, layout.slots), layout.slots.visible[:, -1]
        size = self.sizes.compressed
        return CompressiveState(after[:, :size], held[:, :size], after[:, size:], held[:, size:])

    def pool(self, x: Tensor, window: Window, memories: Sequence[CompressiveState]) -> Tensor:
        """The pool [B, P, d_model] of x [B, T, d_model], with a gradient into x and f."""
        inputs = window.padded(x)
        cached = [one.cached.detach() for one in memories]
        compressed = [one.compressed.detach() for one in memories]
        blocks = leaving_blocks(cached, inputs.detach(), window, self.sizes)
        slots = self.compression(blocks.flatten(2))
        return torch.cat(
            (with_blocks(compressed, slots, window, self.sizes), *cached, inputs), dim=1
        )

    def reconstruction(
        self, queries: Tensor, keys: Projected, values: Projected, layout: Layout
    ) -> Tensor:
        """The reconstruction loss, a scalar with a gradient into f alone.

        queries [B, S, N, H, D], without positions and a gradient; keys and values of the pool.
        """
        with torch.no_grad():
            target = by_content(queries, keys.whole, values.whole, layout.old)
        found = by_content(queries, keys.of_input, values.of_input, layout.new)
        precise = torch.promote_types(torch.float32, found.dtype)
        error = (found - target).to(precise).square().sum(dim=(-2, -1))
        weight = self.config.memory.compressive.reconstruction_weight
        return weight * torch.where(layout.readers, error, 0).sum()

    def opened(self, memory: State, lanes: int, length: int, like: Tensor) -> OpenSegment:
        """See `Attention.opened`."""
        slots = self.sizes.compressed + self.sizes.cached
        return OpenSegment(memory, self.cache(lanes, length, slots, like))

    def decode(self, x: Tensor, layout: Continuation, segment: OpenSegment) -> Tensor:
        """See `Attention.decode`."""
        heads, _ = self.decode_after_slots(x, layout, past_cache(segment))
        return heads

    def close(self, segment: OpenSegment) -> None:
        """See `Attention.close`."""
        compressed, compressed_held, cached, cached_held = _own(segment.memory)
        new = past_cache(segment).inputs
        leaving = self.sizes.segment
        blocks, whole = (
            torch.unflatten(part[:, :leaving], 1, (-1, self.sizes.rate))
            for part in (cached, cached_held)
        )
        slots, held = self.compression(blocks.flatten(2)), whole.all(dim=2)
        segment.remember(
            CompressiveState(
                _newest(compressed, slots * held[..., None]),
                _newest(compressed_held, held),
                _newest(cached, new),
                _newest(cached_held, cached_held.new_ones(new.shape[:2])),
            )
        )
        self.reopen(segment)

    def reopen(self, segment: OpenSegment) -> None:
        """See `Attention.reopen`."""
        compressed, compressed_held, cached, cached_held = _own(segment.memory)
        self.fill_slots(
            past_cache(segment),
            torch.cat((compressed, cached), dim=1),
            torch.cat((compressed_held, cached_held), dim=1),
        )

    def metrics(self, state: State) -> dict[str, Tensor]:
        """`cached_tokens` and `compressed_slots`: those that hold something."""
        own = _own(state)
        return {
            "cached_tokens": own.cached_held.double().sum(),
            "compressed_slots": own.compressed_held.double().sum(),
        }

    @classmethod
    def missing_flops(cls, config: ModelConfig, window: int) -> int:
        """See `Attention.missing_flops`: what leaves the cache, the attention that is to be
        reconstructed, and the queries of the other one are constants."""
        sizes = Sizes.of(config)
        wanted = 2 * slot_flops(config, window, sizes.segment)
        of_queries = slot_flops(config, window, sizes.blocks) // 2
        return config.n_layers * (_compression_flops(config, window) + wanted + of_queries)

    @classmethod
    def auxiliary_flops(cls, config: ModelConfig, window: int) -> int:
        """See `Attention.auxiliary_flops`: the reconstruction loss."""
        return config.n_layers * _reconstruction_flops(config, window)

    @classmethod
    def flops(cls, config: ModelConfig, window: int) -> dict[str, int]:
        """See `Attention.flops`; what is carried, and each new slot, is projected once a window."""
        sizes, segments = Sizes.of(config), -(-window // config.segment)
        slots = sizes.compressed + sizes.cached
        projected = slots + segments * sizes.blocks
        projection = 2 * projected * config.d_model * 2 * config.n_kv_heads * config.d_head
        parts = {
            "slots": slot_flops(config, window, slots) + projection,
            "compression": _compression_flops(config, window),
            "reconstruction": _reconstruction_flops(config, window),
        }
        counted = {name: config.n_layers * part for name, part in parts.items()}
        return super().flops(config, window) | counted


def _reconstruction_flops(config: ModelConfig, window: int) -> int:
    """FLOPs of a layer's attention to what leaves the cache, and to the slots it becomes."""
    sizes = Sizes.of(config)
    return slot_flops(config, window, sizes.segment + sizes.blocks)


def _compression_flops(config: ModelConfig, window: int) -> int:
    """FLOPs of a layer's compression of as many inputs as the window's whole segments have."""
    return 2 * -(-window // config.segment) * config.segment * config.d_model**2


def laid_out(window: Window, sizes: Sizes, memories: Sequence[CompressiveState]) -> Layout:
    """The layout of a window for `memories`: `initial`, if it is given, and the carried one."""
    written = torch.ones_like(window.starts) if window.writable is None else window.writable
    written = written.flatten(1)
    cached_held = [one.cached_held for one in memories]
    blocks_held = leaving_blocks(cached_held, written, window, sizes).all(dim=2)
    slots_held = with_blocks([one.compressed_held for one in memories], blocks_held, window, sizes)
    inputs_held = torch.cat((*cached_held, written), dim=1)
    size, initial = sizes.compressed, len(memories) == 2
    with_own = size + sizes.leaving(window) // sizes.rate
    compressed = aligned(window, slots_held, with_own, initial, sizes.blocks, size + sizes.blocks)
    cached = aligned(window, inputs_held, sizes.cached, initial, sizes.segment, sizes.cached)
    cached = cached._replace(rows=cached.rows + slots_held.shape[1])
    pairs = zip(compressed, cached, strict=True)
    slots = Slots(*(torch.cat((one[..., :size], other), dim=2) for one, other in pairs))
    return compared(window, slots, Slots(*(part[:, :-1, size:] for part in compressed)), sizes)


def compared(window: Window, slots: Slots, new: Slots, sizes: Sizes) -> Layout:
    """The layout of the memory's `slots`; `new` [B, S, N / c] are those that the inputs become
    which leave the cache when the segment is full."""
    first = sizes.compressed
    old = slots.rows[:, :-1, first : first + sizes.segment]
    some = new.visible.any(dim=2, keepdim=True)
    mask = old_mask = None
    if not bool(new.visible.all()):
        mask = (new.visible | ~some).flatten(0, 1)[:, None, None]
        old_mask = mask.repeat_interleave(sizes.rate, dim=3)
    shape = window.starts.shape[1:]
    present = torch.arange(shape.numel(), device=old.device).view(shape) < window.tokens
    readers = window.readable & some & present
    return Layout(slots, Compared(old, old_mask), Compared(new.rows, mask), readers)


def aligned(
    window: Window, held: Tensor, memory: int, initial: bool, step: int, count: int
) -> Slots:
    """The last `count` rows of the open document before each segment, [B, S + 1, count].

    The rows are `memory` of `initial`, if it is given, as many of the carried memory, and then
    `step` of each segment of the window; held [B, rows] bool.
    """
    last = last_starts(window)[..., None]
    begun = last >= 0
    first = last.clamp(min=0) // window.starts.shape[2]
    segments = torch.arange(window.starts.shape[1] + 1, device=held.device)[:, None]
    # Places in [memory; the window's rows from the segment on in which the document starts].
    places = (segments - first) * step + torch.arange(count, device=held.device)
    of_memory = places < memory
    passed = torch.where(of_memory & begun, 0, memory * initial)
    rows = places + passed + torch.where(of_memory, 0, first * step)
    # A window shorter than a segment has fewer rows than a step.
    visible = F.pad(held, (0, step)).gather(1, rows.flatten(1)).view(rows.shape)
    if not initial:
        visible = visible & ~(of_memory & begun)
    return Slots(rows.clamp(max=held.shape[1] - 1), visible)


def leaving_blocks(
    cached: Sequence[Tensor], inputs: Tensor, window: Window, sizes: Sizes
) -> Tensor:
    """What leaves the cache in the window, [B, blocks, c, ...]: of each memory's `cached`
    [B, n_m, ...], and then of the window's inputs [B, S * N, ...]."""
    count = sizes.leaving(window)
    rest = window.starts.shape[1] * sizes.segment - count
    parts = [*(part[:, :count] for part in cached), inputs[:, :rest]]
    return torch.unflatten(torch.cat(parts, dim=1), 1, (-1, sizes.rate))


def with_blocks(
    compressed: Sequence[Tensor], blocks: Tensor, window: Window, sizes: Sizes
) -> Tensor:
    """Each memory's `compressed` [B, n_cm, ...] followed by its own of the `leaving_blocks`, and
    at the end the window's."""
    own = sizes.leaving(window) // sizes.rate
    parts = []
    for one in compressed[:-1]:
        parts += [one, blocks[:, :own]]
        blocks = blocks[:, own:]
    return torch.cat((*parts, compressed[-1], blocks), dim=1)


def by_content(queries: Tensor, keys: Tensor, values: Tensor, seen: Compared) -> Tensor:
    """Attention without positions [B, S, N, H, D] to rows of the pool's keys, values [B, P, K, D];
    queries [B, S, N, H, D]."""
    attended = local_attention.attend_to_visible(
        queries.flatten(0, 1),
        gathered(keys, seen.rows).flatten(0, 1),
        gathered(values, seen.rows).flatten(0, 1),
        seen.mask,
    )
    return attended.view(queries.shape)


def _newest(slots: Tensor, new: Tensor) -> Tensor:
    return torch.cat((slots, new), dim=1)[:, new.shape[1] :]


def _own(state: State) -> CompressiveState:
    assert isinstance(state, CompressiveState)
    return state
