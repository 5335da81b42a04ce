"""A recurrence over the whole stack read aloud: a loop over lanes, segments, places and heads.

What the two published recurrences differ in is in rmt.py and autocompressor.py.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from pretrain.model.memories.recurrence import VectorState
from pretrain.model.state import ModelState
from tests.pretrain.model.naive.block import NaiveModel, Seen


class NaiveRecurrence(NaiveModel):
    """Which place sees which is written out for every place; vectors are lists of rows."""

    def __call__(
        self, tokens: Tensor, starts: Tensor, state: ModelState
    ) -> tuple[Tensor, list[list[tuple[Tensor, ...]]]]:
        """Logits [B, T, V], and the model's one memory of each lane."""
        logits, after = [], []
        for lane in range(len(tokens)):
            documents = [int(starts[lane, : t + 1].sum()) for t in range(tokens.shape[1])]
            x = self.weights["embedding.weight"][tokens[lane]]
            x.retain_grad()
            self.embedded.append(x)
            first = [] if self.initial is None else held(self.initial, lane)
            outputs, vectors = self.lane(x, documents, held(state, lane), first)
            head = self.weights.get("lm_head.weight", self.weights["embedding.weight"])
            logits.append(torch.stack(outputs) @ head.T)
            after.append([as_tensors(vectors, state, lane)])
        return torch.stack(logits), after

    def lane(
        self, x: Tensor, documents: list[int], vectors: list[Tensor], first: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The output at each token, and the vectors after the last segment."""
        learned = list(self.weights["recurrence.learned.weight"])
        outputs = []
        open_document = 0
        for index, begin in enumerate(range(0, len(x), self.config.segment)):
            segment = range(begin, min(begin + self.config.segment, len(x)))
            last = documents[segment[-1]]
            vectors = self.carried(vectors, index)
            own = vectors if last == open_document else first
            writes = self.written(own, learned)
            seen = self.sees(
                len(vectors), [documents[t] for t in segment], len(writes), open_document
            )
            places = torch.stack([*vectors, *(x[t] for t in segment), *writes])
            out = list(self.stack(places, seen))
            outputs += out[len(vectors) : len(vectors) + len(segment)]
            vectors = self.kept(own, out[len(vectors) + len(segment) :])
            open_document = last
        return outputs, vectors

    def sees(
        self, reads: int, documents: list[int], writes: int, open_document: int
    ) -> list[list[int]]:
        """For each of [read places; tokens; write places] the places that it sees."""
        found = [list(range(place + 1)) for place in range(reads)]
        for place, document in enumerate([*documents, *[documents[-1]] * writes]):
            readable = self.read_memory and document == open_document
            before = [
                reads + other
                for other in range(place + 1)
                if other >= len(documents) or documents[other] == document
            ]
            found.append([*(range(reads) if readable else ()), *before])
        return found

    def stack(self, x: Tensor, seen: list[list[int]]) -> Tensor:
        for layer in range(self.config.n_layers):
            x, _ = self.block(f"layers.{layer}", x, [], seen, None)
        return self.norm("norm", x)

    def attention(
        self, name: str, x: Tensor, documents: list[int], memory: Any, first: Any
    ) -> tuple[Tensor, Any]:
        """The heads of all places x [places, d_model]; `memory`: the places that each sees."""
        q, k, v = (self.project(f"{name}.{part}_proj", x) for part in "qkv")
        rows = [
            self.attended(q[place], place, [Seen(other, k[other], v[other]) for other in others])
            for place, others in enumerate(memory)
        ]
        return torch.stack(rows), ()

    def carried(self, vectors: list[Tensor], index: int) -> list[Tensor]:
        """The vectors that the window's segment `index` reads."""
        return vectors

    @abstractmethod
    def written(self, vectors: list[Tensor], learned: list[Tensor]) -> list[Tensor]:
        """The inputs of the write places; `vectors` are those of the document, none for a new one
        that begins with nothing."""

    @abstractmethod
    def kept(self, vectors: list[Tensor], output: list[Tensor]) -> list[Tensor]:
        """The document's vectors after a segment that wrote `output`."""


def held(state: ModelState, lane: int) -> list[Tensor]:
    """The rows that the state holds."""
    memory = state[0]
    assert isinstance(memory, VectorState)
    rows = memory.vectors[lane]
    share = len(rows) // memory.held.shape[1]
    return [row for place, row in enumerate(rows) if memory.held[lane, place // share]]


def as_tensors(vectors: list[Tensor], like: ModelState, lane: int) -> tuple[Tensor, Tensor]:
    """The inverse of `held`: right-aligned, 0 where nothing is held."""
    rows, flags = (torch.zeros_like(part[lane]) for part in like[0])
    missing = len(rows) - len(vectors)
    share = len(rows) // len(flags)
    return torch.stack([*rows[:missing], *vectors]), torch.arange(len(flags)) * share >= missing
