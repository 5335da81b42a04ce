"""Infini-attention: exact attention inside a segment, gated with a memory of the segments before.

A layer sees the whole window at once; only the memory's small states run over segments. Shapes: B
lanes, T tokens, S segments, N tokens of a segment, H query heads, K key/value heads, G = H / K
query heads that share one, D size of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.model import local_attention
from pretrain.model.local_attention import Attend, Kernel
from pretrain.model.memories import infini
from pretrain.model.memories.infini import TORCH, MemoryState, Products, Resets, resets
from pretrain.model.memories.infini_parallel import Parts, StatePassing
from pretrain.model.rotary import Rotary, rotary, rotary_at, rotate


@dataclass(frozen=True)
class Window:
    """How a window's tokens fall into segments and documents; the same for every layer.

    A token's document is readable if the memory before the segment holds it (no document starts at
    or before the token within its segment), writable if it is still open at the segment's end (none
    starts after the token). `reset` marks segments in which a document starts.
    """

    tokens: int
    attend: Attend
    positions: Rotary
    readable: Tensor
    """[B, S, N] bool."""
    writable: Tensor | None
    """[B, S, N] bool, False for the padding of a short last segment; None: everywhere."""
    reset: Resets
    products: Products
    """What computes the memory's part."""
    passing: StatePassing | None = None
    """Where these tokens are a part of a window: how its memories pass to the other parts."""

    @classmethod
    def of(
        cls,
        starts: Tensor,
        config: ModelConfig,
        kernel: Kernel,
        dtype: torch.dtype,
        products: Products = TORCH,
        parts: Parts | None = None,
    ) -> Window:
        """The layout of `starts` [B, T] bool, True at each document's first token."""
        lanes, tokens = starts.shape
        # One segment shorter than N is computed at its own length instead of being padded.
        length = min(config.segment, tokens)
        segments = math.ceil(tokens / length)
        padded = F.pad(starts, (0, segments * length - tokens)).view(lanes, segments, length)
        present = torch.arange(segments * length, device=starts.device) < tokens
        started = padded.cumsum(dim=2)
        in_segment = started[:, :, -1:]
        starting = in_segment.squeeze(2) > 0
        writable = (started == in_segment) & present.view(segments, length)
        passing = None
        if parts is not None and config.memory.kind != "none":
            passing = StatePassing.of(starting, parts)
        return cls(
            tokens=tokens,
            attend=kernel(padded.flatten(0, 1)),
            positions=rotary(0, length, config, starts.device, dtype),
            readable=started == 0,
            writable=None if bool(writable.all()) else writable,
            reset=resets(starting),
            products=products,
            passing=passing,
        )

    def segmented(self, x: Tensor) -> Tensor:
        """[B, T, heads, D] -> [B, S, N, heads, D], the last segment padded with 0."""
        _, segments, length = self.readable.shape
        if self.tokens < segments * length:
            x = F.pad(x, (0, 0, 0, 0, 0, segments * length - self.tokens))
        return torch.unflatten(x, 1, (segments, length))


@dataclass(frozen=True)
class Continuation:
    """The next n tokens of an open segment, in streaming; one document, no boundary.

    Where the tokens stand is a tensor: so a GPU can replay a step as a graph.
    """

    places: Tensor
    """[n] int64, the tokens' places in the segment."""
    positions: Rotary
    visible: Tensor
    """[n, reach] bool: of the segment's first places those at or before each token's own."""

    @classmethod
    def of(
        cls, places: Tensor, reach: int, config: ModelConfig, dtype: torch.dtype
    ) -> Continuation:
        """The layout of tokens at `places`, one after another, all below `reach`."""
        return cls(
            places=places,
            positions=rotary_at(places, config, dtype),
            visible=torch.arange(reach, device=places.device) <= places[:, None],
        )


class OpenSegment(NamedTuple):
    """What streaming keeps of a layer: memory, and keys and values of the segment not yet full.

    All of it is written in place.
    """

    memory: MemoryState | None
    keys: Tensor
    """[B, N, K, D] without positions, for the memory."""
    turned_keys: Tensor
    """[B, N, K, D] with rotary positions, for the local attention."""
    values: Tensor
    """[B, N, K, D]."""

    @classmethod
    def empty(
        cls, memory: MemoryState | None, lanes: int, config: ModelConfig, like: Tensor
    ) -> OpenSegment:
        """A segment without a token, on the device and in the dtype of `like`."""
        shape = (lanes, config.segment, config.n_kv_heads, config.d_head)
        return cls(memory, *(like.new_zeros(shape) for _ in range(3)))

    def copied(self) -> OpenSegment:
        """The same in tensors of its own."""
        memory, *parts = self
        own = None if memory is None else MemoryState(*(part.clone() for part in memory))
        return OpenSegment(own, *(part.clone() for part in parts))


class Projection(nn.Linear):
    """A linear map without bias, drawn from normal(0, std).

    Drawn in the constructor, since ZeRO-3 may partition a module's weights when that returns.
    """

    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        self.std = std
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Draw the weights."""
        nn.init.normal_(self.weight, std=self.std)


class InfiniAttention(nn.Module):
    """Equations 4 to 11 with grouped-query heads; `memory.kind` none leaves equation 4 and 11."""

    gate: nn.Parameter | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
        self.q_proj = Projection(config.d_model, width, config.init_std)
        self.k_proj = Projection(config.d_model, heads, config.init_std)
        self.v_proj = Projection(config.d_model, heads, config.init_std)
        residual_std = config.init_std / math.sqrt(2 * config.n_layers)
        self.o_proj = Projection(width, config.d_model, residual_std)
        gate = torch.full((config.n_heads,), config.memory.initial_gate, dtype=torch.float32)
        self.register_parameter(
            "gate", nn.Parameter(gate) if config.memory.kind != "none" else None
        )

    def forward(
        self,
        x: Tensor,
        state: MemoryState | OpenSegment | None,
        *,
        layout: Window | Continuation,
        read_memory: bool = True,
        initial: MemoryState | None = None,
    ) -> tuple[Tensor, MemoryState | OpenSegment | None]:
        """x [B, T, d_model] -> the same shape, and the state after it.

        A Window takes and returns the memory (None for kind none), a Continuation an OpenSegment.
        initial: the memory that a document which starts in the window begins with, if not empty.
        """
        queries, keys, values = (
            torch.unflatten(projection(x), 2, (-1, self.config.d_head))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        after: MemoryState | OpenSegment | None
        if isinstance(layout, Window):
            assert not isinstance(state, OpenSegment)
            heads, after = self._window(queries, keys, values, state, layout, read_memory, initial)
        else:
            assert isinstance(state, OpenSegment)
            heads, after = self._continue(queries, keys, values, state, layout)
        return self.o_proj(heads.flatten(2)), after

    def _window(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        carried: MemoryState | None,
        window: Window,
        read_memory: bool,
        initial: MemoryState | None,
    ) -> tuple[Tensor, MemoryState | None]:
        queries, keys, values = (window.segmented(x) for x in (queries, keys, values))
        local = window.attend(
            rotate(queries, window.positions).flatten(0, 1),
            rotate(keys, window.positions).flatten(0, 1),
            values.flatten(0, 1),
        ).view(queries.shape)
        if carried is None:
            return self._tokens(local, window), None
        assert self.gate is not None
        advance = infini.advance if window.passing is None else window.passing.advance
        products = window.products
        before, after = advance(
            *(keys, values, carried, window.writable, window.reset),
            *(self.config.memory, products, initial),
        )
        readable = window.readable & read_memory
        heads = products.gated_read(local, queries, before, readable, self.gate)
        heads = self._whole_where_empty(heads, local, before, readable)
        return self._tokens(heads, window), after

    def _continue(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        segment: OpenSegment,
        layout: Continuation,
    ) -> tuple[Tensor, OpenSegment]:
        new_parts = (keys, rotate(keys, layout.positions), values)
        for part, new in zip(segment[1:], new_parts, strict=True):
            part.index_copy_(1, layout.places, new)
        reach = layout.visible.shape[1]
        heads = local_attention.attend_to_visible(
            rotate(queries, layout.positions),
            segment.turned_keys[:, :reach],
            segment.values[:, :reach],
            layout.visible,
        )
        if segment.memory is not None:
            assert self.gate is not None
            before = MemoryState(*(part[:, None] for part in segment.memory))
            everywhere = torch.ones((), dtype=torch.bool, device=queries.device)
            everywhere = everywhere.expand(1, 1, queries.shape[1])
            local = heads[:, None]
            heads = infini.gated_read(local, queries[:, None], before, everywhere, self.gate)
            heads = self._whole_where_empty(heads, local, before, everywhere).squeeze(1)
        return heads, segment

    def _whole_where_empty(
        self, heads: Tensor, local: Tensor, before: MemoryState, readable: Tensor
    ) -> Tensor:
        """`heads` [B, S, N, H, D], or the local attention where memory has nothing for a token."""
        if self.config.memory.when_empty == "zero":
            return heads
        # Features are above 0, so z is 0 where nothing has been written, and nowhere else.
        holding = (before.normaliser > 0).flatten(2).any(dim=2)[..., None]
        return torch.where((holding & readable)[..., None, None], heads, local)

    def close(self, segment: OpenSegment) -> None:
        """Write a full segment to its memory; its places are then those of the next one."""
        if segment.memory is None:
            return
        written = segment.keys[:, None], segment.values[:, None]
        _, after = infini.advance(*written, segment.memory, None, (None,), self.config.memory)
        for part, new in zip(segment.memory, after, strict=True):
            part.copy_(new)

    def _tokens(self, heads: Tensor, window: Window) -> Tensor:
        """[B, S, N, H, D] -> [B, T, H, D]."""
        return heads.flatten(1, 2)[:, : window.tokens]
