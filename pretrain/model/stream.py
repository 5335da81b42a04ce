"""The state of streaming and generation, of constant size for any length of document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config.model import ModelConfig
from pretrain.model import local_attention
from pretrain.model.rotary import rotate
from pretrain.model.state import State, mapped, overwrite
from pretrain.model.window import Continuation


@dataclass(frozen=True)
class OpenSegment:
    """A layer's memory, and what it keeps of the segment that is not yet full.

    The tensors of both are updated in place.
    """

    memory: State
    cache: NamedTuple
    """Tensors [B, ...] of fixed sizes: a `LocalCache`, or that of the memory's kind."""

    def copied(self) -> OpenSegment:
        """A copy in new tensors."""
        return OpenSegment(mapped(torch.clone, self.memory), mapped(torch.clone, self.cache))

    def remember(self, memory: State) -> None:
        """Copy `memory` into this segment's memory."""
        overwrite(self.memory, memory)


class LocalCache(NamedTuple):
    """The KV cache of an open segment of N tokens."""

    keys: Tensor
    """[B, N, K, D] without positions, for the memory."""
    turned_keys: Tensor
    """[B, N, K, D] with rotary positions, for the local attention."""
    values: Tensor
    """[B, N, K, D]."""

    @classmethod
    def empty(cls, lanes: int, length: int, config: ModelConfig, like: Tensor) -> LocalCache:
        """The cache of a segment of `length` tokens, on the device and in the dtype of `like`."""
        shape = (lanes, length, config.n_kv_heads, config.d_head)
        return cls(*(like.new_zeros(shape) for _ in range(3)))

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, layout: Continuation) -> Tensor:
        """Cache the next n tokens' keys and values; returns their local attention [B, n, H, D].

        queries [B, n, H, D]; keys, values [B, n, K, D]; without positions.
        """
        new_parts = (keys, rotate(keys, layout.positions), values)
        for part, new in zip(self, new_parts, strict=True):
            part.index_copy_(1, layout.places, new)
        reach = layout.visible.shape[-1]
        return local_attention.attend_to_visible(
            rotate(queries, layout.positions),
            self.turned_keys[:, :reach],
            self.values[:, :reach],
            layout.visible,
        )


class StreamState(NamedTuple):
    """The state of all layers of a stream."""

    filled: int
    """Tokens in the open segment."""
    layers: tuple[OpenSegment, ...]
    recurrence: State | None = None
    """The memory of a recurrence over the whole stack; None if the layers have the memory."""

    def copied(self) -> StreamState:
        """A copy in new tensors, so that a text can be continued in two ways."""
        recurrence = None if self.recurrence is None else mapped(torch.clone, self.recurrence)
        return StreamState(self.filled, tuple(layer.copied() for layer in self.layers), recurrence)
