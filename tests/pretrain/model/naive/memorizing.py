"""Memorizing Transformers read aloud: in one layer, a list of keys and values beside the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.pretrain.model.naive import transformer_xl


class Naive(transformer_xl.Naive):
    """A store of keys and values, from which the oldest fall out."""

    def attention(
        self, name: str, x: Tensor, documents: list[int], memory: Any, first: Any
    ) -> tuple[Tensor, Any]:
        near, cache = super().attention(name, x, documents, memory[:2], first[:2])
        if not memory[2:]:
            return near, cache
        reads, store = self.recall(name, x, documents, store_of(memory[2:]), store_of(first[2:]))
        rows = []
        for local, read in zip(near.unflatten(1, (self.config.n_heads, -1)), reads, strict=True):
            g = 1 / (1 + torch.exp(-self.weights[f"{name}.gate"][:, None]))
            rows.append(local if read is None else g * read + (1 - g) * local)
        return torch.stack(rows).flatten(1), (*cache, *as_tensors(store, memory[2:]))

    def recall(
        self, name: str, x: Tensor, documents: list[int], store: Any, begins_with: Any
    ) -> tuple[list[Tensor | None], Any]:
        """What each token reads, [H, D], None where there is nothing, and the store after them."""
        reads: list[Tensor | None] = []
        held, segment = 0, self.config.segment
        for begin in range(0, len(x), segment):
            tokens = range(begin, min(begin + segment, len(x)))
            for t in tokens:
                may = self.read_memory and documents[t] == held and store
                reads.append(self.nearest(name, x[t], store) if may else None)
            for t in tokens:
                if documents[t] != held:
                    store, held = begins_with, documents[t]
                key, value = (
                    self.project(f"{name}.{part}_proj", x[t]).unflatten(0, (-1, self.config.d_head))
                    for part in "kv"
                )
                store = [*store, (length_one(key).detach(), value.detach())]
                store = store[-self.config.memory.memorizing.capacity :]
        return reads, store

    def nearest(self, name: str, x: Tensor, store: list[tuple[Tensor, Tensor]]) -> Tensor:
        """[H, D] of one token's attention to its neighbours in the store."""
        group, heads = self.config.n_heads // self.config.n_kv_heads, []
        queries = self.project(f"{name}.q_proj", x).unflatten(0, (self.config.n_heads, -1))
        for head, query in enumerate(queries):
            kv = head // group
            pairs = [(length_one(query) @ key[kv], value[kv]) for key, value in store]
            pairs.sort(key=lambda pair: -float(pair[0].detach()))
            pairs = pairs[: self.config.memory.memorizing.neighbours]
            weights = [torch.exp(self.weights[f"{name}.scale"][head] * score) for score, _ in pairs]
            total = torch.stack(weights).sum()
            parts = [w / total * value for w, (_, value) in zip(weights, pairs, strict=True)]
            heads.append(torch.stack(parts).sum(0))
        return torch.stack(heads)


def store_of(memory: Any) -> list[tuple[Tensor, Tensor]]:
    """The stored keys and values [K, D] of (keys [C, K, D], values, stored [C]), constants."""
    rows = zip(*memory, strict=True)
    return [(key.detach(), value.detach()) for key, value, stored in rows if stored]


def as_tensors(store: list[tuple[Tensor, Tensor]], like: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `store_of`: right-aligned, in tensors as `like`."""
    keys, values, stored = (torch.zeros_like(part) for part in like)
    for row, (key, value) in zip(range(len(stored) - len(store), len(stored)), store, strict=True):
        keys[row], values[row], stored[row] = key, value, True
    return keys, values, stored


def length_one(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
