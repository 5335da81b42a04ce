"""Memorizing Transformers read aloud: a loop over lanes, segments, tokens and heads."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.pretrain.model.naive.block import NaiveModel


class NaiveMemorizing(NaiveModel):
    """The memory of a layer is a list of inputs, and in one layer a list of keys and values."""

    def attention(
        self, name: str, x: Tensor, documents: list[int], memory: Any, first: Any
    ) -> tuple[Tensor, Any]:
        settings, segment = self.config.memory.memorizing, self.config.segment
        cache, store = self.lists(memory)
        held = 0  # documents are counted from 0, the one that was carried in
        outputs = []
        for begin in range(0, len(x), segment):
            tokens = range(begin, min(begin + segment, len(x)))
            for t in tokens:
                before = [u for u in range(begin, t + 1) if documents[u] == documents[t]]
                own = [(x[u], u - begin) for u in before]
                old: list[tuple[Tensor, int]] = []
                near: list[tuple[Tensor, Tensor]] = []
                if self.read_memory and documents[t] == held:
                    old = [(c, index - len(cache)) for index, c in enumerate(cache)]
                    near = store
                outputs.append(self.token(name, x[t], t - begin, old + own, near))
            if documents[tokens[-1]] != held:
                held = documents[tokens[-1]]
                cache, store = self.lists(first)
            for t in tokens:
                if documents[t] == held:
                    cache.append(x[t].detach())
                    key, value = (x[t] @ self.weights[f"{name}.{p}_proj.weight"].T for p in "kv")
                    keys = [length_one(one) for one in key.split(self.config.d_head)]
                    store.append((torch.cat(keys).detach(), value.detach()))
            cache = cache[-(settings.cache or segment) :]
            store = store[-settings.capacity :]
        return torch.stack(outputs), self.tensors(name, cache, store)

    def token(
        self,
        name: str,
        x: Tensor,
        place: int,
        seen: list[tuple[Tensor, int]],
        store: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """All heads of one token, joined."""
        size, group = self.config.d_head, self.config.n_heads // self.config.n_kv_heads
        heads = []
        for head in range(self.config.n_heads):
            rows = slice(head * size, (head + 1) * size)
            kv = slice(head // group * size, (head // group + 1) * size)
            q, k, v = (
                self.weights[f"{name}.{part}_proj.weight"][columns]
                for part, columns in (("q", rows), ("k", kv), ("v", kv))
            )
            (query,) = self.turn((q @ x)[None], [place])
            keys = self.turn(torch.stack([k @ y for y, _ in seen]), [at for _, at in seen])
            scores = [query @ key / math.sqrt(size) for key in keys]
            local = average(scores, [v @ y for y, _ in seen])
            if store and f"{name}.gate" in self.weights:
                read = self.recalled(name, head, q @ x, [(a[kv], b[kv]) for a, b in store])
                g = 1 / (1 + torch.exp(-self.weights[f"{name}.gate"][head]))
                local = g * read + (1 - g) * local
            heads.append(local)
        return torch.cat(heads)

    def recalled(
        self, name: str, head: int, query: Tensor, store: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        similar = [(length_one(query) @ key, value) for key, value in store]
        similar.sort(key=lambda pair: -float(pair[0].detach()))
        nearest = similar[: self.config.memory.memorizing.neighbours]
        scale = self.weights[f"{name}.scale"][head]
        return average([scale * score for score, _ in nearest], [value for _, value in nearest])

    def lists(self, memory: Any) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """The cached inputs, and the stored keys and values, each joined over heads."""
        if not memory:
            return [], []
        inputs, held, *store = memory
        cache = [x.detach() for x, there in zip(inputs, held, strict=True) if there]
        if not store:
            return cache, []
        rows = zip(*store, strict=True)
        return cache, [
            (k.flatten().detach(), v.flatten().detach()) for k, v, there in rows if there
        ]

    def tensors(self, name: str, cache: list[Tensor], store: list[tuple[Tensor, Tensor]]) -> Any:
        """The memory as tensors, right-aligned."""
        settings, width = self.config.memory.memorizing, self.config.n_kv_heads
        inputs = right_aligned(cache, settings.cache or self.config.segment, self.config.d_model)
        if f"{name}.gate" not in self.weights:
            return inputs
        shape = (width, self.config.d_head)
        keys, values = (
            right_aligned([row[part] for row in store], settings.capacity, math.prod(shape))
            for part in (0, 1)
        )
        return (*inputs, keys[0].view(-1, *shape), values[0].view(-1, *shape), keys[1])


def average(scores: list[Tensor], values: list[Tensor]) -> Tensor:
    """The softmax of the scores, over the values."""
    weights = [torch.exp(score) for score in scores]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)  # type: ignore[return-value]


def length_one(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def right_aligned(rows: list[Tensor], size: int, width: int) -> tuple[Tensor, Tensor]:
    """[size, width] and which rows are held, [size] bool."""
    full = torch.zeros(size, width, dtype=torch.float64)
    if rows:
        full[size - len(rows) :] = torch.stack(rows)
    return full, torch.arange(size) >= size - len(rows)
