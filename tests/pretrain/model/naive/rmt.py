"""The Recurrent Memory Transformer: the output at the memory's places is the next memory."""

from __future__ import annotations

from torch import Tensor

from tests.pretrain.model.naive.recurrence import NaiveRecurrence


class NaiveRMT(NaiveRecurrence):
    """[memory; tokens; memory]."""

    def written(self, vectors: list[Tensor], learned: list[Tensor]) -> list[Tensor]:
        return vectors or learned

    def kept(self, vectors: list[Tensor], output: list[Tensor]) -> list[Tensor]:
        return output
