"""AutoCompressors: summaries of all earlier segments as a prompt, the newest `capacity` of them."""

from __future__ import annotations

from torch import Tensor

from tests.pretrain.model.naive.recurrence import NaiveRecurrence


class NaiveAutoCompressor(NaiveRecurrence):
    """[summaries; tokens; summary tokens]."""

    def carried(self, vectors: list[Tensor], index: int) -> list[Tensor]:
        group = self.config.memory.autocompressor.backprop_segments
        return [row.detach() for row in vectors] if index % group == 0 else vectors

    def written(self, vectors: list[Tensor], learned: list[Tensor]) -> list[Tensor]:
        return learned

    def kept(self, vectors: list[Tensor], output: list[Tensor]) -> list[Tensor]:
        settings = self.config.memory.autocompressor
        return [*vectors, *output][-settings.capacity * settings.vectors :]
