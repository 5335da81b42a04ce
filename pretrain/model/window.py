"""How the tokens of a forward are divided into segments and documents, the same for every layer.

Shapes: B lanes, T tokens, S segments, N tokens per segment, H query heads, K key/value heads, D
size of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config.model import ModelConfig
from pretrain.model.local_attention import Attend, Kernel
from pretrain.model.rotary import Rotary, rotary, rotary_at, rotate

T = TypeVar("T")

Resets: TypeAlias = Sequence[Tensor | None]
"""For each segment, the lanes [B] bool in which a document starts in it; None if there are none."""


class Parts(Protocol):
    """The parts of a window that several ranks share, from the view of one of them.

    A part is a run of consecutive whole segments, the same in every lane.
    """

    index: int
    count: int

    def gather(self, own: Tensor) -> Tensor:
        """Every part's tensor, in order: `own` [...] -> [P, ...], with its gradient.

        All parts must call it the same number of times and in the same order, also in the backward.
        """


def resets(starting: Tensor) -> Resets:
    """The resets for `starting` [B, S] bool: whether a document starts in the segment."""
    # Most segments have no start in any lane, and then need no pass over the state.
    somewhere = starting.any(dim=0).tolist()
    return [
        lanes if any_ else None for lanes, any_ in zip(starting.unbind(1), somewhere, strict=True)
    ]


def resets_of_parts(starting: Tensor, parts: Parts) -> Resets:
    """The resets of whole parts; `starting` [B, S] is for this part's segments."""
    everywhere = parts.gather(starting.any(dim=1).to(torch.uint8))
    return resets(everywhere.bool().T)


@dataclass(frozen=True)
class Window:
    """The layout of a window, or of a part of one.

    A token can read the memory if its document began before the segment (no document starts at or
    before the token within the segment), and is written to it if its document continues past the
    segment (none starts after the token). `reset` marks segments in which a document starts.
    """

    tokens: int
    starts: Tensor
    """[B, S, N] bool, False for the padding of a short last segment."""
    kernel: Kernel
    attend: Attend
    positions: Rotary
    readable: Tensor
    """[B, S, N] bool; False everywhere if the memory is written but not read."""
    writable: Tensor | None
    """[B, S, N] bool, False for the padding of a short last segment; None: everywhere."""
    reset: Resets
    parts: Parts | None
    """Given if these tokens are a part of a window and memories pass between the parts."""
    reset_of_parts: Resets
    _built: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        starts: Tensor,
        config: ModelConfig,
        kernel: Kernel,
        dtype: torch.dtype,
        read_memory: bool = True,
        parts: Parts | None = None,
        span: int | None = None,
    ) -> Window:
        """The layout of `starts` [B, T] bool, True at each document's first token.

        `span`: tokens of a segment; None: `config.span`.
        """
        lanes, tokens = starts.shape
        # A single segment shorter than N is computed at its length instead of being padded.
        length = min(span or config.span, tokens)
        segments = math.ceil(tokens / length)
        padded = F.pad(starts, (0, segments * length - tokens)).view(lanes, segments, length)
        present = torch.arange(segments * length, device=starts.device) < tokens
        started = padded.cumsum(dim=2)
        in_segment = started[:, :, -1:]
        starting = in_segment.squeeze(2) > 0
        writable = (started == in_segment) & present.view(segments, length)
        return cls(
            tokens=tokens,
            starts=padded,
            kernel=kernel,
            attend=kernel(padded.flatten(0, 1)),
            positions=rotary(0, length, config, starts.device, dtype),
            readable=(started == 0) & read_memory,
            writable=None if bool(writable.all()) else writable,
            reset=resets(starting),
            parts=parts,
            reset_of_parts=[] if parts is None else resets_of_parts(starting, parts),
        )

    def once(self, name: str, build: Callable[[], T]) -> T:
        """What `build` returns, built by the first layer that asks for `name`.

        For layouts that depend on the documents alone and so are the same for every layer.
        """
        if name not in self._built:
            self._built[name] = build()
        built: T = self._built[name]
        return built

    def padded(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, S * N, ...], the last segment padded with 0."""
        missing = self.starts[0].numel() - self.tokens
        return F.pad(x, (*(0, 0) * (x.ndim - 2), 0, missing)) if missing else x

    def segmented(self, x: Tensor) -> Tensor:
        """[B, T, heads, D] -> [B, S, N, heads, D], the last segment padded with 0."""
        return torch.unflatten(self.padded(x), 1, self.starts.shape[1:])

    def joined(self, x: Tensor) -> Tensor:
        """The inverse of `segmented`: [B, S, N, heads, D] -> [B, T, heads, D]."""
        return x.flatten(1, 2)[:, : self.tokens]

    def local(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention inside segments and documents, [B, S, N, H, D].

        queries [B, S, N, H, D]; keys, values [B, S, N, K, D]; without positions.
        """
        attended = self.attend(
            rotate(queries, self.positions).flatten(0, 1),
            rotate(keys, self.positions).flatten(0, 1),
            values.flatten(0, 1),
        )
        return attended.view(queries.shape)


@dataclass(frozen=True)
class Continuation:
    """The layout of the next n tokens of an open segment, in streaming; one document, no boundary.

    Their places are a tensor, so that a step can be replayed as a CUDA graph.
    """

    places: Tensor
    """[n] int64, the tokens' places in the segment."""
    positions: Rotary
    visible: Tensor
    """[n, reach] bool, or [B, 1, n, reach]: the places that each token sees, at or before it."""

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
