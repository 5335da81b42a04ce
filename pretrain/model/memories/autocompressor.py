"""AutoCompressors (Chevalier, Wettig, Ajith, Chen 2023, arXiv 2305.14788).

A segment is compressed into p summary vectors: the output at p places after its tokens, whose
inputs are learned. A segment sees the summaries of all earlier segments of its document, as a soft
prompt. The published model keeps them all; here the newest `capacity` segments' are kept, so that
the state has a fixed size. Gradient flows within groups of `backprop_segments` segments.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pretrain.config.model import ModelConfig
from pretrain.model.memories.recurrence import SegmentRecurrence, VectorState
from pretrain.model.state import State


class Summaries(SegmentRecurrence):
    """The accumulated summaries of a document."""

    from_eos: ClassVar[bool] = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.horizon = config.memory.autocompressor.backprop_segments

    @classmethod
    def sizes(cls, config: ModelConfig) -> tuple[int, int]:
        """See `SegmentRecurrence.sizes`."""
        settings = config.memory.autocompressor
        return settings.capacity, settings.vectors

    def write_inputs(
        self, state: VectorState, learned: Tensor, new: Tensor | None, initial: VectorState | None
    ) -> Tensor:
        """See `SegmentRecurrence.write_inputs`: the learned vectors everywhere."""
        return learned.expand(len(state.held), -1, -1)

    def metrics(self, state: State) -> dict[str, Tensor]:
        """`summaries`: summary vectors that are held."""
        assert isinstance(state, VectorState)
        return {"summaries": state.held.double().sum() * self.count}
