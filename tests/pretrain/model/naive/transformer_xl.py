"""Transformer-XL read aloud, in a whole model: a loop over lanes, segments, tokens and heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.pretrain.model.naive.block import NaiveModel, Seen


class Naive(NaiveModel):
    """A cache of inputs, from which a token falls out for each that enters."""

    def attention(
        self, name: str, x: Tensor, documents: list[int], memory: Any, first: Any
    ) -> tuple[Tensor, Any]:
        begins_with = cache_of(first) if first else [None] * len(memory[0])
        cache, cached = cache_of(memory), 0
        rows = []
        for begin in range(0, len(x), self.config.segment):
            segment = range(begin, min(begin + self.config.segment, len(x)))
            past = [
                self.seen(name, slot - len(cache), one)
                for slot, one in enumerate(cache)
                if one is not None
            ]
            tokens = {t: self.seen(name, t - begin, x[t]) for t in segment}
            for t in segment:
                own = [tokens[u] for u in range(begin, t + 1) if documents[u] == documents[t]]
                reads = self.read_memory and documents[t] == cached
                query = self.project(f"{name}.q_proj", x[t])
                rows.append(self.attended(query, t - begin, [*(past if reads else []), *own]))
            for t in segment:
                if documents[t] != cached:
                    cache, cached = begins_with, documents[t]
                cache = [*cache[1:], x[t].detach()]
        inputs = [torch.zeros_like(x[0]) if one is None else one for one in cache]
        return torch.stack(rows), (
            torch.stack(inputs), torch.tensor([one is not None for one in cache])
        )  # fmt: skip

    def seen(self, name: str, position: int, x: Tensor) -> Seen:
        """A token whose input is x [d_model]."""
        return Seen(position, *(self.project(f"{name}.{part}_proj", x) for part in "kv"))


def cache_of(memory: Any) -> list[Tensor | None]:
    """The slots of inputs [m, d_model], held [m] bool: each a constant [d_model], or None."""
    pairs = zip(*memory, strict=True)
    return [one.detach() if held else None for one, held in pairs]
