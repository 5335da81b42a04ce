"""The contract of a segment memory: everything that a kind of `memory.kind` has to implement.

**A layer's memory** is a subclass of `Attention`: it attends within the segment and to the layer's
memory of earlier segments, over all segments of a window at once. It is a subclass instead of a
part of the attention because memories that store a layer's inputs project them with the layer's
weights, and ZeRO-3 requires weights to be read inside the module that owns them. A new kind is one
module beside this one; CONTRIBUTING.md lists the lines elsewhere that register, test and describe
it.

**The state** is a value, never a buffer: a NamedTuple of tensors [lanes, ...] that is taken and
returned, all zero when empty. Its sizes depend only on the configuration (whatever grows with a
document has a capacity), so checkpoints, host copies and `pretrain plan` work for any kind. The
trainer carries it from window to window, detached.

**A recurrence over the whole stack** (memory vectors that the top layer passes to the first) does
not belong to a layer: the layers are `LocalAttention`s, and the Transformer has a
`recurrence.SegmentRecurrence`, which runs all layers once per segment, with its vectors put around
the segment's tokens. A `ModelState` then holds one state, that of the recurrence. All ranks run the
same number of segments.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.config.model import ModelConfig
from pretrain.model.projection import HeadNorm, Projection
from pretrain.model.state import State
from pretrain.model.stream import LocalCache, OpenSegment
from pretrain.model.window import Continuation, Window


class Carried(NamedTuple):
    """The memory that a layer is given."""

    before: State
    """Before the window."""
    initial: State | None = None
    """With which documents that start in the window begin, a constant; None: the empty memory."""


class Attended(NamedTuple):
    """The result of a layer, or of its attention."""

    output: Tensor
    """[B, T, H, D] of the heads, [B, T, d_model] of a layer."""
    state: State
    """After the window."""
    auxiliary: Tensor | None = None
    """An auxiliary loss of the memory, a scalar summed over tokens, added to the targets' loss."""


class Attention(nn.Module, ABC):
    """A layer's projections, and in subclasses its attention and its memory.

    Shapes: B lanes, T tokens, H query heads, K key/value heads, D size of a head.
    """

    gates: ClassVar[tuple[str, ...]] = ()
    """Names of parameters that mix memory and local attention: with a separate learning rate, no
    weight decay, and exported as stored (float32); a model without this memory has none."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
        bias = config.qkv_bias
        self.q_proj = Projection(config.d_model, width, config.init_std, bias)
        self.k_proj = Projection(config.d_model, heads, config.init_std, bias)
        self.v_proj = Projection(config.d_model, heads, config.init_std, bias)
        self.q_norm = HeadNorm(config.d_head, config.norm_eps) if config.qk_norm else None
        self.k_norm = HeadNorm(config.d_head, config.norm_eps) if config.qk_norm else None
        residual_std = config.init_std / math.sqrt(2 * config.n_layers)
        self.o_proj = Projection(width, config.d_model, residual_std)

    def forward(
        self, x: Tensor, past: Carried | OpenSegment, layout: Window | Continuation
    ) -> Attended:
        """x [B, T, d_model] -> the same shape.

        A Window takes what was carried; a Continuation takes an OpenSegment, which it writes to.
        """
        if isinstance(layout, Window):
            assert isinstance(past, Carried)
            attended = self.attend(x, layout, past)
        else:
            assert isinstance(past, OpenSegment)
            attended = Attended(self.decode(x, layout, past), past.memory)
        return attended._replace(output=self.o_proj(attended.output.flatten(2)))

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, D], keys and values [B, T, K, D] of x [B, T, d_model]."""
        # In this order, in which autograd adds up the three gradients of x: runs of before the
        # other memories resume to the bit.
        return self.projected_queries(x), self.projected_keys(x), self.projected_values(x)

    def projected_queries(self, x: Tensor) -> Tensor:
        """Queries [B, T, H, D] of x [B, T, d_model], after their norm if there is one."""
        queries = torch.unflatten(self.q_proj(x), 2, (-1, self.config.d_head))
        return queries if self.q_norm is None else self.q_norm(queries)

    def projected_keys(self, x: Tensor) -> Tensor:
        """Keys [B, T, K, D] of x [B, T, d_model], after their norm if there is one."""
        keys = torch.unflatten(self.k_proj(x), 2, (-1, self.config.d_head))
        return keys if self.k_norm is None else self.k_norm(keys)

    def projected_values(self, x: Tensor) -> Tensor:
        """Values [B, T, K, D] of x [B, T, d_model]."""
        return torch.unflatten(self.v_proj(x), 2, (-1, self.config.d_head))

    @abstractmethod
    def empty(self, lanes: int, like: Tensor) -> State:
        """The memory before a document's first token, on the device of `like`.

        Reading it gives exactly the result of attention without a memory. `like` has the dtype of
        the activations.
        """

    @abstractmethod
    def attend(self, x: Tensor, window: Window, carried: Carried) -> Attended:
        """All segments of the window; x [B, T, d_model], the result's output [B, T, H, D].

        A token reads the memory where `window.readable` and is written to it where
        `window.writable`; where `window.reset`, nothing from before the segment is kept.
        """

    def memory_after(self, x: Tensor, window: Window, carried: Carried) -> State:
        """The state that `attend` returns, where nothing needs its output."""
        return self.attend(x, window, carried).state

    @abstractmethod
    def decode(self, x: Tensor, layout: Continuation, segment: OpenSegment) -> Tensor:
        """The heads [B, n, H, D] of the next n tokens x [B, n, d_model] of an open segment."""

    def opened(self, memory: State, lanes: int, length: int, like: Tensor) -> OpenSegment:
        """An empty segment of `length` tokens after `memory`, in the dtype of `like`."""
        return OpenSegment(memory, LocalCache.empty(lanes, length, self.config, like))

    def reopen(self, segment: OpenSegment) -> None:
        """Compute again what the cache holds of the memory, after the memory has changed."""

    def close(self, segment: OpenSegment) -> None:
        """Write a full segment to its memory; its places are then reused for the next segment."""

    def metrics(self, state: State) -> dict[str, Tensor]:
        """Metrics of a memory for the log, by name: sums over the lanes, in float64.

        The log shows their mean over all lanes of all ranks; the sums of a name that ends in
        `_norm` are of squares, and the log shows the root of their mean.
        """
        return {}

    @classmethod
    def of_layer(cls, config: ModelConfig, layer: int) -> Attention:
        """The attention of the layer `layer`, from 0."""
        return cls(config)

    @classmethod
    def flops(cls, config: ModelConfig, window: int) -> dict[str, int]:
        """FLOPs by part of one forward of all layers over `window` tokens of a lane."""
        heads, kv_heads, size = config.n_heads, config.n_kv_heads, config.d_head
        full, rest = divmod(window, config.span)
        squares = full * config.span**2 + rest**2
        projections = window * 2 * config.d_model * size * (2 * heads + 2 * kv_heads)
        return {
            "projections": config.n_layers * projections,
            "local_attention": config.n_layers * 2 * 2 * squares * heads * size,
        }

    @classmethod
    def recomputed_flops(cls, config: ModelConfig, window: int) -> int:
        """FLOPs among these that every backward recomputes, whatever the checkpointing."""
        return 0

    @classmethod
    def missing_flops(cls, config: ModelConfig, window: int) -> int:
        """FLOPs that the backward has less than two forwards, since some of its gradients are not
        computed."""
        return 0

    @classmethod
    def auxiliary_flops(cls, config: ModelConfig, window: int) -> int:
        """FLOPs among these of an auxiliary loss, which is computed with gradients alone."""
        return 0

    @classmethod
    def passing_flops(cls, config: ModelConfig, segments: int, parts: int) -> int:
        """FLOPs in a forward of all layers that a part of `segments` segments of a lane's window
        needs in addition to its share, to pass its memories to the other `parts`."""
        return 0

    @classmethod
    def passed_numbers(cls, config: ModelConfig) -> int:
        """float32 numbers that a part of a lane's window sends to each other part in a forward."""
        return 0
