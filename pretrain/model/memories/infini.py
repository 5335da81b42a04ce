"""Infini-attention (equations 4 to 11): local attention, gated with a compressive memory.

Only the small states are computed segment by segment; everything else for the whole window at once.
Shapes: B lanes, T tokens, S segments, N tokens per segment, H query heads, K key/value heads, each
with a memory, D size of a head. M and z are float32 (float64 in a float64 model).
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.config.model import ModelConfig
from pretrain.model.memories import infini_backend, infini_grad
from pretrain.model.memories.contract import Attended, Attention, Carried
from pretrain.model.memories.infini_grad import TORCH, Products, restarted
from pretrain.model.memories.infini_parallel import Passing
from pretrain.model.state import State
from pretrain.model.stream import LocalCache, OpenSegment
from pretrain.model.window import Continuation, Resets, Window

Divisor = Literal["paper", "inclusive"]
"""The divisor of Linear + Delta: z before the segment, or after it."""


class MemoryState(NamedTuple):
    """M and z of one layer. In a window, a segment axis S follows the lanes."""

    matrix: Tensor
    """[B, K, D, D]: rows are features of keys, columns are values."""
    normaliser: Tensor
    """[B, K, D]: sum of the features of all keys written."""


class InfiniAttention(Attention):
    """The attention of both update rules."""

    gates: ClassVar[tuple[str, ...]] = ("gate",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.gate = nn.Parameter(
            torch.full((config.n_heads,), config.memory.initial_gate, dtype=torch.float32)
        )

    @property
    def divisor(self) -> Divisor | None:
        """The divisor of the delta rule; None for the linear rule."""
        return None

    def empty(self, lanes: int, like: Tensor) -> MemoryState:
        """M = 0 and z = 0, which reads as 0."""
        heads, size = self.config.n_kv_heads, self.config.d_head
        precise = torch.promote_types(torch.float32, like.dtype)
        return MemoryState(
            like.new_zeros(lanes, heads, size, size, dtype=precise),
            like.new_zeros(lanes, heads, size, dtype=precise),
        )

    def attend(self, x: Tensor, window: Window, carried: Carried) -> Attended:
        """See `Attention.attend`."""
        queries, keys, values = (window.segmented(part) for part in self.projected(x))
        local = window.local(queries, keys, values)
        before, after = self._advanced(keys, values, window, carried)
        products = self._products(x)
        heads = products.gated_read(local, queries, *before, window.readable, self.gate)
        heads = self._local_where_empty(heads, local, before, window.readable)
        return Attended(window.joined(heads), after)

    def memory_after(self, x: Tensor, window: Window, carried: Carried) -> State:
        """See `Attention.memory_after`."""
        keys, values = self.projected_keys(x), self.projected_values(x)
        return self._advanced(window.segmented(keys), window.segmented(values), window, carried)[1]

    def _advanced(
        self, keys: Tensor, values: Tensor, window: Window, carried: Carried
    ) -> tuple[MemoryState, MemoryState]:
        """The memory before each segment and after the last, of keys and values [B, S, N, K, D]."""
        return advance(
            keys,
            values,
            _own(carried.before),
            window.writable,
            window.reset,
            self.divisor,
            self._products(keys),
            None if carried.initial is None else _own(carried.initial),
            None if window.parts is None else Passing(window.parts, window.reset_of_parts),
        )

    def _products(self, like: Tensor) -> Products:
        """Those for activations like this."""
        return infini_backend.choose(
            self.config.memory.kernel, like.device.type, like.dtype, self.config.d_head
        )

    def decode(self, x: Tensor, layout: Continuation, segment: OpenSegment) -> Tensor:
        """See `Attention.decode`."""
        queries, keys, values = self.projected(x)
        assert isinstance(segment.cache, LocalCache)
        local = segment.cache.attend(queries, keys, values, layout)[:, None]
        before = MemoryState(*(part[:, None] for part in segment.memory))
        everywhere = torch.ones((), dtype=torch.bool, device=x.device)
        everywhere = everywhere.expand(1, 1, queries.shape[1])
        heads = TORCH.gated_read(local, queries[:, None], *before, everywhere, self.gate)
        return self._local_where_empty(heads, local, before, everywhere).squeeze(1)

    def close(self, segment: OpenSegment) -> None:
        """See `Attention.close`."""
        assert isinstance(segment.cache, LocalCache)
        written = segment.cache.keys[:, None], segment.cache.values[:, None]
        _, after = advance(*written, _own(segment.memory), None, (None,), self.divisor)
        segment.remember(after)

    def metrics(self, state: State) -> dict[str, Tensor]:
        """`memory_norm`: the Frobenius norm of M."""
        return {"memory_norm": _own(state).matrix.double().square().sum()}

    @classmethod
    def flops(cls, config: ModelConfig, window: int) -> dict[str, int]:
        """See `Attention.flops`."""
        heads, kv_heads, size = config.n_heads, config.n_kv_heads, config.d_head
        # sigma(Q) M with sigma(Q) z, and sigma(K)^T V.
        return super().flops(config, window) | {
            "memory_read": config.n_layers * window * 2 * heads * size * (size + 1),
            "memory_write": config.n_layers * window * 2 * kv_heads * size * size,
        }

    @classmethod
    def recomputed_flops(cls, config: ModelConfig, window: int) -> int:
        """The read."""
        return cls.flops(config, window)["memory_read"]

    def _local_where_empty(
        self, heads: Tensor, local: Tensor, before: MemoryState, readable: Tensor
    ) -> Tensor:
        """`heads` [B, S, N, H, D]; with `when_empty=local`, local attention instead where a token
        has no memory to read."""
        if self.config.memory.when_empty == "zero":
            return heads
        # Features are positive, so z is 0 exactly where nothing has been written.
        holding = (before.normaliser > 0).flatten(2).any(dim=2)[..., None]
        return torch.where((holding & readable)[..., None, None], heads, local)


class LinearAttention(InfiniAttention):
    """Equation 8."""

    @classmethod
    def passed_numbers(cls, config: ModelConfig) -> int:
        """M and z of each part."""
        return config.n_layers * config.n_kv_heads * config.d_head * (config.d_head + 1)


class DeltaAttention(InfiniAttention):
    """Equation 9."""

    @property
    def divisor(self) -> Divisor | None:
        """See `MemoryConfig.normaliser`."""
        return self.config.memory.normaliser

    @classmethod
    def flops(cls, config: ModelConfig, window: int) -> dict[str, int]:
        """See `Attention.flops`."""
        size, segments = config.d_head, -(-window // config.segment)
        # sigma(K) z, sigma(K)^T D^-1 sigma(K), and one step of the scan per segment.
        products = window * size * (size + 1) + segments * size**3
        return super().flops(config, window) | {
            "memory_delta": config.n_layers * 2 * config.n_kv_heads * products
        }

    @classmethod
    def recomputed_flops(cls, config: ModelConfig, window: int) -> int:
        """The read, and the division by z."""
        division = config.n_layers * 2 * config.n_kv_heads * window * config.d_head
        return super().recomputed_flops(config, window) + division

    @classmethod
    def passing_flops(cls, config: ModelConfig, segments: int, parts: int) -> int:
        """Linear only adds. Delta composes the segments' maps, [D, D] times [D, 2 D] each, and then
        the maps of all parts in turn."""
        products = 2 * segments + parts
        return config.n_layers * config.n_kv_heads * products * 2 * config.d_head**3

    @classmethod
    def passed_numbers(cls, config: ModelConfig) -> int:
        """z, and then a map (A, B), of each part."""
        return config.n_layers * config.n_kv_heads * config.d_head * (2 * config.d_head + 1)


def advance(
    keys: Tensor,
    values: Tensor,
    carried: MemoryState,
    writable: Tensor | None,
    reset: Resets,
    divisor: Divisor | None,
    products: Products = TORCH,
    initial: MemoryState | None = None,
    passing: Passing | None = None,
) -> tuple[MemoryState, MemoryState]:
    """The states before each segment, [B, S, ...], and the state after the last one.

    keys, values: [B, S, N, K, D], keys without positions; carried: the state before the window;
    writable: [B, S, N] bool, None for everywhere; reset: segments in which a document starts, which
    discard the state before them; divisor: None for Linear; initial: the state with which documents
    that start in the window begin, a constant, None for the empty memory. With `passing` the
    segments are a part of the window, while `carried` and the state after are those of the whole
    window, the same for all parts.

    Linear (8): M_s = M_{s-1} + sigma(K)^T V. Linear + Delta (9), with D_s = diag(sigma(K) z):
    M_s = (I - sigma(K)^T D_s^-1 sigma(K)) M_{s-1} + sigma(K)^T V; the delta term is 0 on an empty
    memory. The paper uses z_{s-1} as z (`divisor` "paper"). If a segment adds much more to z than
    it held before, as after a document that started near a segment's end, the update's smallest
    eigenvalue is near 1 - dz / z_{s-1}, far below -1, so the contents of M grow instead of being
    replaced. With z_s ("inclusive") every eigenvalue is between 0 and 1.
    """
    scan = infini_grad.scan if passing is None else passing.scan
    added, key_sum, features = products.sums(keys, values, writable)
    if divisor is None and passing is not None:
        # One exchange for both: z is one more column of M.
        first = None if initial is None else _with_column(initial)
        whole, last = scan(
            _with_column(carried), _with_column(MemoryState(added, key_sum)), reset, None, first
        )
        return _without_column(whole), _without_column(last)
    first_matrix, first_z = initial or (None, None)
    z, last_z = scan(carried.normaliser, key_sum, reset, None, first_z)
    transition = None
    if divisor is not None:
        of_segments = restarted_segments(z, reset, first_z)
        if divisor == "inclusive":
            of_segments = of_segments + key_sum
        transition = products.delta_transition(keys, features, of_segments, writable)
    matrices, last_matrix = scan(carried.matrix, added, reset, transition, first_matrix)
    return MemoryState(matrices, z), MemoryState(last_matrix, last_z)


def restarted_segments(z: Tensor, reset: Resets, initial: Tensor | None) -> Tensor:
    """z [B, S, K, D] before each segment; after a reset, that of the document that starts in it."""
    if all(lanes is None for lanes in reset):
        return z
    by_segment = zip(z.unbind(1), reset, strict=True)
    return torch.stack([restarted(one, lanes, initial) for one, lanes in by_segment], dim=1)


def _own(state: State) -> MemoryState:
    assert isinstance(state, MemoryState)
    return state


def _with_column(state: MemoryState) -> Tensor:
    """M with z as one more column: [..., D, D + 1]."""
    return torch.cat((state.matrix, state.normaliser[..., None]), dim=-1)


def _without_column(joined: Tensor) -> MemoryState:
    """The inverse of `_with_column`."""
    return MemoryState(joined[..., :-1], joined[..., -1])
