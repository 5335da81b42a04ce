"""The contract of a segment memory: what a kind of `memory.kind` has to bring, and nothing else.

**A layer's memory** is a kind of `Attention`: it attends inside the segment and to what the layer
remembers of the segments before, over all segments of a window at once. It is a subclass instead of
a part of the attention because memories that hold a layer's inputs project them with the layer's
own weights, and ZeRO-3 wants weights read inside the module that owns them. A new kind is one
module beside this one, a line in `kinds.py`, a line in `config.MEMORY_KINDS`, and a line in the
list of the conformance test.

**The state** is a value, never a buffer: a NamedTuple of tensors [lanes, ...] that comes in and
goes out, all zero where nothing is remembered. Its sizes are the configuration's (whatever grows
with a document has a capacity), so checkpoints, host copies and `pretrain plan` need to know
nothing of a kind. It is carried over windows with its gradient cut, by the trainer.

**A recurrence over the whole stack** (memory vectors that the top layer hands to the first) is not
a layer's: its layers are `LocalAttention`s, and it is a module of the Transformer beside them,
which runs `Transformer.stack` once a segment, with its vectors put around the segment's tokens. A
`ModelState` then holds one state, that of the recurrence. Every rank runs equally many segments.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.model.projection import Projection
from pretrain.model.state import State
from pretrain.model.stream import OpenSegment
from pretrain.model.window import Continuation, Window


class Carried(NamedTuple):
    """What a layer is given of the past."""

    before: State
    """Before the window."""
    initial: State | None = None
    """What a document that starts in the window begins with, a constant; None: the empty memory."""


class Attended(NamedTuple):
    """What a layer, or a part of it, gives."""

    output: Tensor
    """[B, T, H, D] of the heads, [B, T, d_model] of a layer."""
    state: State
    """After the window."""
    auxiliary: Tensor | None = None
    """A loss of the memory's own, a scalar summed over tokens, beside that of the targets."""


class Attention(nn.Module, ABC):
    """A layer's projections, and in subclasses its attention and its memory.

    Shapes: B lanes, T tokens, H query heads, K key/value heads, D size of a head.
    """

    gates: ClassVar[tuple[str, ...]] = ()
    """Parameters of its own that mix memory and local attention: float32 always, with a learning
    rate of their own and no weight decay; a model without this memory has none."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
        self.q_proj = Projection(config.d_model, width, config.init_std)
        self.k_proj = Projection(config.d_model, heads, config.init_std)
        self.v_proj = Projection(config.d_model, heads, config.init_std)
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
        queries, keys, values = (
            torch.unflatten(projection(x), 2, (-1, self.config.d_head))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return queries, keys, values

    @abstractmethod
    def empty(self, lanes: int, like: Tensor) -> State:
        """The memory before a document's first token, on the device of `like`.

        Reading it gives exactly what attention without a past gives. `like` has the dtype of the
        activations.
        """

    @abstractmethod
    def attend(self, x: Tensor, window: Window, carried: Carried) -> Attended:
        """All segments of the window; x [B, T, d_model], the result's output [B, T, H, D].

        A token reads the memory where `window.readable` and is written to it where
        `window.writable`; where `window.reset`, nothing from before the segment is kept.
        """

    @abstractmethod
    def decode(self, x: Tensor, layout: Continuation, segment: OpenSegment) -> Tensor:
        """The heads [B, n, H, D] of the next n tokens x [B, n, d_model] of an open segment."""

    def close(self, segment: OpenSegment) -> None:
        """Write a full segment to its memory; its places are then those of the next one."""

    def metrics(self, state: State) -> dict[str, Tensor]:
        """What the log shows of a memory, by name: squares summed over the lanes, in float64.

        Shown is the root of their mean over all lanes of all ranks.
        """
        return {}

    @classmethod
    def flops(cls, config: ModelConfig, window: int) -> dict[str, int]:
        """FLOPs by part of one forward of all layers over `window` tokens of a lane."""
        heads, kv_heads, size = config.n_heads, config.n_kv_heads, config.d_head
        full, rest = divmod(window, config.segment)
        squares = full * config.segment**2 + rest**2
        projections = window * 2 * config.d_model * size * (2 * heads + 2 * kv_heads)
        return {
            "projections": config.n_layers * projections,
            "local_attention": config.n_layers * 2 * 2 * squares * heads * size,
        }

    @classmethod
    def recomputed_flops(cls, config: ModelConfig, window: int) -> int:
        """Of these what every backward computes again, whatever is checkpointed."""
        return 0

    @classmethod
    def passing_flops(cls, config: ModelConfig, segments: int, parts: int) -> int:
        """FLOPs of a forward of all layers by which one part of a lane's window, of `segments`
        segments, takes more than its share, to pass its memories to the other `parts`."""
        return 0

    @classmethod
    def passed_numbers(cls, config: ModelConfig) -> int:
        """Numbers that a part of a lane's window hands to each other part in a forward: float32."""
        return 0
