"""Memory vectors that the top of the stack passes to its bottom: what several memories share.

A segment runs through all layers as [read places; tokens; write places]. The read places are the
memory's vectors; what the stack returns at the write places, after the final norm, is the segment's
contribution to the memory. Attention is causal over all of them: tokens see the read places, and
write places see both. The loop over the segments of a window is sequential by nature, so ZeRO-3
gathers each layer's weights once per segment; every rank runs the same number of segments.

Documents: a document that starts in a segment sees no read place, and the write places continue the
segment's last document, so they see that one alone. Read places that a lane may not see are cut off
by marking the first place after them as a document's start, so that an empty memory takes no part
in any softmax.

Shapes: B lanes, T tokens, S segments, N tokens per segment, p vectors per segment, C segments whose
vectors are kept, R read places, d_model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config.model import ModelConfig
from pretrain.model import local_attention
from pretrain.model.memories.contract import Carried
from pretrain.model.state import State, mapped, overwrite
from pretrain.model.window import Continuation, Window, resets

Run: TypeAlias = Callable[[Tensor, Window], Tensor]
"""All layers and the final norm over a segment's places: x [B, R + n + p, d_model] -> the same."""

Continue: TypeAlias = Callable[[Tensor, Continuation], Tensor]
"""The same over some places of an open segment, whose keys and values are cached."""


class VectorState(NamedTuple):
    """The vectors of the last segments of the open document."""

    vectors: Tensor
    """[B, C * p, d_model], the newest last, 0 where nothing is held."""
    held: Tensor
    """[B, C] bool: the segments whose p vectors are held, the newest last."""


class LearnedVectors(nn.Module):
    """Vectors that are a parameter; they decay like the embedding, which they take the place of."""

    def __init__(self, count: int, width: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))
        # Drawn independently: equal vectors at all places would differ by their position alone.
        nn.init.normal_(self.weight, std=std)

    def forward(self) -> Tensor:
        """A copy [p, d_model]: ZeRO-3 may release the weight itself when this returns."""
        return self.weight.clone()


class _Segment(NamedTuple):
    """How the places of one segment of a window lie."""

    read: int
    """R, at least as many as any lane sees."""
    window: Window
    new: Tensor | None
    """[B] bool: lanes in which a document starts; None if there are none."""


class SegmentRecurrence(nn.Module, ABC):
    """The loop over the segments of a window, and the vectors that pass between them."""

    from_eos: ClassVar[bool] = False
    """Whether the learned vectors begin as the embedding of EOS in a model that was trained without
    them, instead of random."""

    horizon: int | None = None
    """Segments of a group, counted from the window's first: no gradient flows into vectors of an
    earlier group or of the carried state. None: gradient flows into all of them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.kept, self.count = self.sizes(config)
        self.learned = LearnedVectors(self.count, config.d_model, config.init_std)

    @classmethod
    @abstractmethod
    def sizes(cls, config: ModelConfig) -> tuple[int, int]:
        """C, the segments whose vectors are kept, and p, the vectors of a segment."""

    @abstractmethod
    def write_inputs(
        self, state: VectorState, learned: Tensor, new: Tensor | None, initial: VectorState | None
    ) -> Tensor:
        """The inputs [B, p, d_model] of the write places.

        `state` is that before the segment, `learned` are the learned vectors [p, d_model], `new`
        [B] bool the lanes in which a document starts, None if there are none, and `initial` the
        memory with which these begin, None if it is empty.
        """

    @abstractmethod
    def metrics(self, state: State) -> dict[str, Tensor]:
        """See `Attention.metrics`."""

    @classmethod
    def places(cls, config: ModelConfig, tokens: int) -> int:
        """Places of a segment of `tokens` tokens, if the memory is full."""
        kept, count = cls.sizes(config)
        return kept * count + tokens + count

    def empty(self, lanes: int, like: Tensor) -> State:
        """No vectors are held, so there are no read places to see."""
        return VectorState(
            like.new_zeros(lanes, self.kept * self.count, self.config.d_model),
            like.new_zeros(lanes, self.kept, dtype=torch.bool),
        )

    def over(
        self, x: Tensor, starts: Tensor, carried: Carried, read_memory: bool, run: Run
    ) -> tuple[Tensor, State]:
        """Embedded tokens x [B, T, d_model], starts [B, T] bool -> the stack's output at the
        tokens [B, T, d_model], after the final norm, and the state after the window."""
        state, initial = _own(carried.before), None
        if carried.initial is not None:
            initial = _own(mapped(Tensor.detach, carried.initial))
        # Before the loop, because reading the documents' places waits for the device.
        segments = self._segments(starts, state, initial, read_memory, x.dtype)
        learned = self.learned()
        outputs = []
        for index, now in enumerate(torch.split(x, self.config.segment, dim=1)):
            read, window, new = segments[index]
            if self.horizon is not None and index % self.horizon == 0:
                state = _own(mapped(Tensor.detach, state))
            write = self.write_inputs(state, learned, new, initial)
            seen = state.vectors[:, state.vectors.shape[1] - read :]
            output = run(torch.cat((seen, now, write), dim=1), window)
            outputs.append(output[:, read : -self.count])
            state = self._after(state, output[:, -self.count :], new, initial)
        return torch.cat(outputs, dim=1), state

    def _segments(
        self,
        starts: Tensor,
        state: VectorState,
        initial: VectorState | None,
        read_memory: bool,
        dtype: torch.dtype,
    ) -> list[_Segment]:
        """The layout of each segment of a window."""
        kernel = local_attention.choose(
            self.config.local_attention, starts.device.type, dtype, self.config.d_head
        )
        of_segments = torch.split(starts, self.config.segment, dim=1)
        new = resets(torch.stack([own.any(dim=1) for own in of_segments], dim=1))
        held = state.held
        found = []
        for own, begins in zip(of_segments, new, strict=True):
            visible = held.sum(dim=1) * self.count * ~own[:, 0] * read_memory
            read = int(visible.max())
            marks = F.pad(own, (read, self.count))
            marks.scatter_(1, (read - visible)[:, None], True)
            window = Window.of(marks, self.config, kernel, dtype, span=marks.shape[1])
            found.append(_Segment(read, window, begins))
            held = _newest(_begun(held, begins, initial and initial.held), None)
        return found

    def _after(
        self,
        state: VectorState,
        written: Tensor,
        new: Tensor | None,
        initial: VectorState | None,
    ) -> VectorState:
        """The state after a segment whose write places returned `written` [B, p, d_model]."""
        vectors = _begun(state.vectors, new, initial and initial.vectors)
        held = _begun(state.held, new, initial and initial.held)
        return VectorState(_newest(vectors, written), _newest(held, None))

    def layout(self, state: State, places: Tensor, reach: int) -> Continuation:
        """The layout of the tokens at `places` [n], int64, of an open segment, all below `reach`.

        The read places come before them, C * p whatever is held.
        """
        before = self.kept * self.count
        return self._layout(state, places + before, reach + before)

    def close(self, state: State, run: Continue) -> None:
        """Write a full segment to its memory, in place, and open the next one."""
        before = _own(state)
        inputs = self.write_inputs(before, self.learned(), None, None)
        whole = self.places(self.config, self.config.segment)
        places = torch.arange(whole - self.count, whole, device=inputs.device)
        written = run(inputs, self._layout(state, places, whole))
        overwrite(state, self._after(before, written, None, None))
        self.reopen(state, run)

    def reopen(self, state: State, run: Continue) -> None:
        """Run the read places of an open segment, after the memory has changed."""
        vectors, _ = _own(state)
        places = torch.arange(vectors.shape[1], device=vectors.device)
        run(vectors, self._layout(state, places, len(places)))

    def _layout(self, state: State, places: Tensor, reach: int) -> Continuation:
        """The layout of `places` [n] among [read places; tokens; write places].

        A read place of which nothing is held is seen by such places alone: every place needs one
        that it sees.
        """
        vectors, held = _own(state)
        layout = Continuation.of(places, reach, self.config, vectors.dtype)
        holds = held.repeat_interleave(self.count, dim=1)
        holds = F.pad(holds, (0, self.config.segment + self.count), value=True)
        seen = holds[:, None, :reach] | ~holds[:, places, None]
        return replace(layout, visible=(layout.visible & seen)[:, None])


def _begun(own: Tensor, new: Tensor | None, initial: Tensor | None) -> Tensor:
    """`own` [B, ...], and in `new` lanes [B] what a document begins with, or 0."""
    if new is None:
        return own
    first = torch.zeros_like(own) if initial is None else initial
    return torch.where(new.view(-1, *[1] * (own.ndim - 1)), first, own)


def _newest(own: Tensor, added: Tensor | None) -> Tensor:
    """`own` [B, C, ...] with `added` as its newest, or True; the oldest fall out."""
    if added is None:
        added = torch.ones_like(own[:, :1])
    return torch.cat((own[:, added.shape[1] :], added), dim=1)


def _own(state: State) -> VectorState:
    assert isinstance(state, VectorState)
    return state
