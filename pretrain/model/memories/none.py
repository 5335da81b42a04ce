"""No memory: attention within the segment only (equation 4), or within a window of `full`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pretrain.model.memories.contract import Attended, Attention, Carried
from pretrain.model.state import State
from pretrain.model.stream import LocalCache, OpenSegment
from pretrain.model.window import Continuation, Window


class Nothing(NamedTuple):
    """The empty state."""


class LocalAttention(Attention):
    """Attention within a segment and document."""

    def empty(self, lanes: int, like: Tensor) -> State:
        """The empty state, for any number of lanes."""
        return Nothing()

    def attend(self, x: Tensor, window: Window, carried: Carried) -> Attended:
        """See `Attention.attend`."""
        queries, keys, values = (window.segmented(part) for part in self.projected(x))
        return Attended(window.joined(window.local(queries, keys, values)), carried.before)

    def memory_after(self, x: Tensor, window: Window, carried: Carried) -> State:
        """See `Attention.memory_after`."""
        return carried.before

    def decode(self, x: Tensor, layout: Continuation, segment: OpenSegment) -> Tensor:
        """See `Attention.decode`."""
        assert isinstance(segment.cache, LocalCache)
        return segment.cache.attend(*self.projected(x), layout)
