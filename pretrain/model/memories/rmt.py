"""The Recurrent Memory Transformer (Bulatov, Kuratov, Burtsev 2022, arXiv 2207.06881).

The memory is p vectors: [memory; tokens; memory] runs through the stack, and the output at the last
p places is the next segment's memory. They are written from the memory that was read, so that a
memory can pass through a segment unchanged; in a document's first segment, where nothing is read,
from learned vectors. Gradient flows through all segments of a window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.config.model import ModelConfig
from pretrain.model.memories.recurrence import SegmentRecurrence, VectorState
from pretrain.model.state import State


class RecurrentMemory(SegmentRecurrence):
    """The vectors of one segment, replaced by the next one's."""

    @classmethod
    def sizes(cls, config: ModelConfig) -> tuple[int, int]:
        """See `SegmentRecurrence.sizes`."""
        return 1, config.memory.rmt.vectors

    def write_inputs(
        self, state: VectorState, learned: Tensor, new: Tensor | None, initial: VectorState | None
    ) -> Tensor:
        """See `SegmentRecurrence.write_inputs`."""
        vectors, held = state
        if new is not None:
            begun = learned
            if initial is not None:
                begun = torch.where(initial.held[..., None], initial.vectors, learned)
            vectors = torch.where(new[:, None, None], begun, vectors)
            held = held | new[:, None]
        return torch.where(held[..., None], vectors, learned)

    def metrics(self, state: State) -> dict[str, Tensor]:
        """`memory_norm`: the Frobenius norm of the vectors."""
        assert isinstance(state, VectorState)
        return {"memory_norm": state.vectors.double().square().sum()}
